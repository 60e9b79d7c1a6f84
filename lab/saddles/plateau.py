"""The plateau of the paper's MNIST autoencoder (experiments/figure2), from a point on it that a short training reached.

Kernels are trained as matrices, float[channels, others], so that Muon is defined on them.
"""

import math
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from lab.runs import DataConfig, ModelConfig
from lab.runs.tasks import load_data, make_task
from lab.saddles.network_runs import Point, draw_batch, gradient

REACH_STEPS, REACH_RATE = 256, 1.0  # of the SGD that reaches the plateau from the usual initial weights
LEFT = 0.9  # of the loss of the best constant image
EVALUATED, CERTIFIED = 64, 256  # images
EPSILON, RHO = 1.2e-3, 1e-3


class Matrices(nn.Module):
    """A network whose parameters of more than two dimensions are trained as matrices."""

    def __init__(self, task: nn.Module) -> None:
        super().__init__()
        self._task = [task]  # in a list, so that its own parameters are not trained
        self._shapes = {name: p.shape for name, p in task.named_parameters()}
        flat = {name: p.detach().flatten(1) if p.ndim > 2 else p.detach() for name, p in task.named_parameters()}
        self.flat = nn.ParameterDict({name.replace(".", "_"): nn.Parameter(p.clone()) for name, p in flat.items()})

    def forward(self, *batch: Tensor) -> Tensor:
        """Return the task's mean loss of a batch."""
        weights = {name: self.flat[name.replace(".", "_")].view(shape) for name, shape in self._shapes.items()}
        loss: Tensor = torch.func.functional_call(self._task[0], weights, batch)
        return loss


class Plateau:
    """The autoencoder on its plateau, or ("usual") at its usual initial weights."""

    steps, batch = 1000, 16
    starts: tuple[str, ...] = ("saddle", "usual")

    def __init__(self, data_dir: Path) -> None:
        self.data = load_data(DataConfig("mnist"), data_dir, train=True)
        self.evaluated = self.data.batch(torch.arange(EVALUATED), torch.device("cpu"))
        self.certified = [
            self.data.batch(part, torch.device("cpu")) for part in torch.split(torch.arange(CERTIFIED), 128)
        ]
        self.plateau = float(self.evaluated[0].var(correction=0))  # loss of the best constant image
        self._reached = lru_cache(maxsize=None)(self._reach)

    def make(self, start: str, seed: int) -> nn.Module:
        """See `Network`."""
        task = self._usual(seed)
        if start == "saddle":
            task.load_state_dict(self._reached(seed))
        return task

    def is_hidden(self, name: str) -> bool:
        """Return True except for the first and last kernels."""
        return name not in ("flat.network_0_weight", "flat.network_9_weight")

    def measure(self, task: nn.Module) -> tuple[float, float]:
        """See `Network`; there is no subspace."""
        return float(task(*self.evaluated)), math.nan

    def has_left(self, point: Point) -> bool:
        """Return True if the loss is below LEFT times that of the best constant image."""
        return point.loss < LEFT * self.plateau

    def saddle_function(self, task: nn.Module) -> tuple[str, nn.Module, float, float | None]:
        """Return the network, with the rho of experiments/figure2."""
        return "", task, EPSILON, RHO

    def _usual(self, seed: int) -> Matrices:
        return Matrices(make_task(ModelConfig("mnist-autoencoder"), self.data.shape, self.data.classes, seed))

    def _reach(self, seed: int) -> dict[str, Tensor]:
        task = self._usual(seed)
        sgd = torch.optim.SGD(task.parameters(), REACH_RATE)
        for step in range(REACH_STEPS):
            gradient(self, task, draw_batch(len(self.data), self.batch, 100 + seed, step))
            sgd.step()
        return {name: tensor.clone() for name, tensor in task.state_dict().items()}
