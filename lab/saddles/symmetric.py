"""A character transformer whose blocks consist of equal copies: all heads are equal, and all hidden units of the MLP.

Copies have equal gradients, so the networks with equal copies are an invariant subspace of SGD and of every other
optimizer that treats copies alike. Its points are saddles across it where the loss has negative curvature across it.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from lab.runs import DataConfig, ModelConfig
from lab.runs.tasks import load_data, make_task
from lab.saddles.network_runs import Point, draw_batch, gradient

WIDTH, DEPTH, HEADS, CONTEXT, WINDOWS = 32, 2, 4, 32, 512
UNITS = 4 * WIDTH
# Parameters with copies, by the end of the name: the shape with a dimension of copies, and its index.
COPIES = {
    "attention.inwards.weight": ((3, HEADS, -1, WIDTH), 1),
    "attention.inwards.bias": ((3, HEADS, -1), 1),
    "attention.outwards.weight": ((WIDTH, HEADS, -1), 1),
    "mlp.0.weight": ((UNITS, WIDTH), 0),
    "mlp.0.bias": ((UNITS,), 0),
    "mlp.2.weight": ((WIDTH, UNITS), 1),
}
REACH_STEPS, REACH_RATE = 800, 0.01  # of the AdamW that trains within the subspace, with a cosine to 0
ROUNDING = 1e-7  # relative perturbation of the copies, that of one rounding in float32
LEFT = 0.1  # relative distance from the subspace
EVALUATED, CERTIFIED = 64, 128  # windows
EPSILON = 1e-6


def mean_of_copies(name: str, p: Tensor) -> Tensor | None:
    """Return a parameter with all copies replaced by their mean, None if it has no copies."""
    for end, (shape, dim) in COPIES.items():
        if name.endswith(end):
            copies = p.view(shape)
            return copies.mean(dim, keepdim=True).expand_as(copies).reshape(p.shape)
    return None


@torch.no_grad()
def project(task: nn.Module) -> None:
    """Replace all copies by their mean, in place."""
    for name, p in task.named_parameters():
        if (mean := mean_of_copies(name, p)) is not None:
            p.copy_(mean)


def distance(task: nn.Module) -> float:
    """Return ||w - mean of copies|| / ||w|| of the parameters with copies, in float64."""
    across = whole = 0.0
    for name, p in task.named_parameters():
        exact = p.detach().double()
        if (mean := mean_of_copies(name, exact)) is not None:
            across, whole = across + float((exact - mean).square().sum()), whole + float(exact.square().sum())
    return math.sqrt(across / whole)


class Symmetric:
    """The transformer at trained symmetric weights, exactly ("saddle") or up to "rounding", or at its "usual" ones."""

    steps, batch = 1000, 8
    starts: tuple[str, ...] = ("rounding", "saddle", "usual")

    def __init__(self) -> None:
        self.data = load_data(DataConfig("text", context=CONTEXT, limit=WINDOWS), None, train=True)
        every = torch.arange(WINDOWS)
        self.evaluated = self.data.batch(every[:: WINDOWS // EVALUATED], torch.device("cpu"))
        self.certified = [self.data.batch(every[:: WINDOWS // CERTIFIED], torch.device("cpu"))]
        self._reached = lru_cache(maxsize=None)(self._reach)

    def make(self, start: str, seed: int) -> nn.Module:
        """See `Network`."""
        task = self.usual(seed)
        if start == "usual":
            return task
        task.load_state_dict(self._reached(seed))
        if start == "rounding":
            rng = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for name, p in task.named_parameters():
                    if mean_of_copies(name, p) is not None:
                        p.mul_(1 + ROUNDING * torch.randn(p.shape, generator=rng))
        return task

    def is_hidden(self, name: str) -> bool:
        """Return True for the matrices of blocks."""
        return "blocks" in name

    def measure(self, task: nn.Module) -> tuple[float, float]:
        """See `Network`."""
        return float(task(*self.evaluated)), distance(task)

    def has_left(self, point: Point) -> bool:
        """Return True if the distance from the subspace is at least LEFT."""
        return point.distance >= LEFT

    def saddle_function(self, task: nn.Module) -> tuple[str, nn.Module, float, float | None]:
        """Return the loss across the subspace, whose gradient is 0 except for rounding; rho is estimated."""
        return ", across the subspace", Across(task), EPSILON, None

    def usual(self, seed: int) -> nn.Module:
        """Return the network at its usual initial weights."""
        config = ModelConfig("char-transformer", width=WIDTH, depth=DEPTH, heads=HEADS)
        return make_task(config, self.data.shape, self.data.classes, seed)

    def symmetric(self, seed: int) -> nn.Module:
        """Return the network at its usual initial weights, except that all copies equal the first."""
        task = self.usual(seed)
        with torch.no_grad():
            for name, p in task.named_parameters():
                for end, (shape, dim) in COPIES.items():
                    if name.endswith(end):
                        copies = p.view(shape)
                        copies.copy_(copies.narrow(dim, 0, 1).clone().expand_as(copies))
        return task

    def _reach(self, seed: int) -> dict[str, Tensor]:
        """Train within the subspace, by projection after each step."""
        task = self.symmetric(seed)
        adamw = torch.optim.AdamW(task.parameters(), REACH_RATE, betas=(0.9, 0.99), weight_decay=0.0)
        for step in range(REACH_STEPS):
            adamw.param_groups[0]["lr"] = REACH_RATE * (1 + math.cos(math.pi * step / REACH_STEPS)) / 2
            gradient(self, task, draw_batch(len(self.data), self.batch, 100 + seed, step))
            adamw.step()
            project(task)
        return {name: tensor.clone() for name, tensor in task.state_dict().items()}


class Across(nn.Module):
    """The loss as a function of the deviations of copies from their mean, which are 0 first.

    Its gradient there is 0 by symmetry, so that `packsaddle.certify` needs the curvature across the subspace only.
    """

    def __init__(self, task: nn.Module) -> None:
        super().__init__()
        self._task = [task]  # in a list, so that its own parameters do not count
        named = {name: p.detach() for name, p in task.named_parameters()}
        self._means = {name: mean for name, p in named.items() if (mean := mean_of_copies(name, p)) is not None}
        self.deviations = nn.ParameterDict(
            {name.replace(".", "_"): nn.Parameter(torch.zeros_like(mean)) for name, mean in self._means.items()}
        )

    def forward(self, *batch: Tensor) -> Tensor:
        """Return the mean loss of a batch; deviations count without their mean."""
        weights = {}
        for name, mean in self._means.items():
            z = self.deviations[name.replace(".", "_")]
            of_copies = mean_of_copies(name, z)
            assert of_copies is not None
            weights[name] = mean + z - of_copies
        loss: Tensor = torch.func.functional_call(self._task[0], weights, batch)
        return loss
