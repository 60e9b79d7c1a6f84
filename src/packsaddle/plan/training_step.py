"""Timing of a training step, forward and backward pass and optimizer, of one of packsaddle's models or a user's."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from packsaddle.errors import ConfigError
from packsaddle.plan.model_size import MODELS, build_model
from packsaddle.plan.timing import Timing, repeated
from packsaddle.runs.tasks.models import CharTransformer
from packsaddle.runs.training import muon_and_adamw

StepOptimizer = Literal["sgd", "adamw", "muon"]


@dataclass(frozen=True)
class TrainingStep:
    """A model and a batch, to time the model's training step.

    The loss is the first scalar that the model returns, or else the mean square of all that it returns.

    >>> import torch
    >>> from packsaddle.plan import TrainingStep
    >>> step = TrainingStep(torch.nn.Linear(8, 2), torch.ones(4, 8))
    >>> step.loss().shape, step.time("adamw").low > 0
    (torch.Size([]), True)
    """

    model: nn.Module
    batch: Any  # the model's argument, a tuple of its arguments, or a dict by keyword

    @classmethod
    def of_model(cls, name: str, batch: int) -> "TrainingStep":
        """Return the step of a model by its `name` in `MODELS`, on `batch` random examples. Raises ConfigError."""
        model = build_model(name)
        shape = MODELS[name][1]
        return cls(model, random_batch(model, shape, batch, tokens=isinstance(model, CharTransformer)))

    def to(self, device: torch.device | str) -> "TrainingStep":
        """Return the step with model and batch on a device."""
        return TrainingStep(self.model.to(device), _moved(self.batch, device))

    def loss(self) -> Tensor:
        """Return the loss on the batch. Raises ConfigError if no output of the model depends on its parameters."""
        if isinstance(self.batch, Mapping):
            output = self.model(**self.batch)
        else:
            output = self.model(*(self.batch if isinstance(self.batch, tuple) else (self.batch,)))
        found = [t for t in _tensors(output) if t.requires_grad]
        if not found:
            raise ConfigError(f"the model must return a loss, or tensors with gradients, got {type(output).__name__}")
        squares = torch.stack([t.float().square().mean() for t in found]).sum()
        return next((t for t in found if t.numel() == 1), squares)

    def time(self, optimizer: StepOptimizer | None = None) -> Timing:
        """Time forward pass, backward pass and the optimizer's step, if any, repeatedly until the minimum is stable."""
        optimizers = _optimizers(self.model, optimizer) if optimizer else []

        def step() -> None:
            self.model.zero_grad()
            self.loss().backward()  # type: ignore[no-untyped-call]
            for each in optimizers:
                each.step()

        return repeated(step)


def random_batch(model: nn.Module, shape: tuple[int, ...], batch: int, *, tokens: bool) -> Tensor:
    """Return `batch` random examples: float32, or with `tokens` int64 below the size of the smallest embedding.

    Raises ConfigError for batch < 1, and for tokens of a model without an embedding.
    """
    if batch < 1:
        raise ConfigError(f"batch must be at least 1, got {batch}")
    rng = torch.Generator().manual_seed(0)
    if not tokens:
        return torch.rand(batch, *shape, generator=rng)
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    if not sizes:
        raise ConfigError("int64 inputs are for a model with an nn.Embedding, and this one has none")
    return torch.randint(min(sizes), (batch, *shape), generator=rng)


def _moved(batch: Any, device: torch.device | str) -> Any:
    """Return the batch with its tensors on a device."""
    if isinstance(batch, Mapping):
        return {name: _moved(part, device) for name, part in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_moved(part, device) for part in batch)
    return batch.to(device) if isinstance(batch, Tensor) else batch


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors in a model's output, a tensor or nested tuples, lists and dicts."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | tuple | list):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)


def _optimizers(model: nn.Module, name: StepOptimizer) -> list[torch.optim.Optimizer]:
    """Return the named optimizer with a tiny learning rate; "muon": Muon for hidden matrices, AdamW for the others."""
    rate, trained = 1e-9, [p for p in model.parameters() if p.requires_grad]
    if name == "sgd":
        return [torch.optim.SGD(trained, rate, momentum=0.9)]
    if name == "adamw":
        return [torch.optim.AdamW(trained, rate)]
    return muon_and_adamw(model, muon={"lr": rate}, adamw={"lr": rate})
