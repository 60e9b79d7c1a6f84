"""The model for which a plan is made: the number of coordinates that workers exchange, and the time of a training
step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from packsaddle.comm.group import Solo
from packsaddle.compressors import Compressor, RandomK
from packsaddle.errors import ConfigError
from packsaddle.feedback.compression import Compression
from packsaddle.feedback.slices import Slice, places
from packsaddle.plan.coding import LONGEST
from packsaddle.plan.timing import Timing, repeated, side_by_side
from packsaddle.sgd.optimizer import CompressedSGD


@dataclass(frozen=True)
class ModelSize:
    """The size of a model: the numbers of coordinates that one step exchanges, compressed and uncompressed."""

    name: str  # name of the model in printed plans, e.g. "d = 25,000,000" if only the size is known
    d: int  # number of compressed coordinates
    dense: int  # number of uncompressed coordinates
    shapes: tuple[torch.Size, ...] = ()  # shapes of the compressed tensors, in the model's order; empty: unknown
    itemsize: int = 4  # bytes of an uncompressed coordinate in packsaddle's exchanges: 4, or 8 in float64
    gradient_bytes: int | None = None  # bytes of all gradients, which DDP sends; None: 4 for each coordinate

    def bind(self, compressor: Compressor) -> Compressor:
        """Return the compressor adapted to the shapes of the model's tensors. If the shapes are unknown, the compressor
        is returned unchanged."""
        return compressor.for_tensors(self.shapes) if self.shapes else compressor

    @classmethod
    def of_size(cls, d: int) -> "ModelSize":
        """Return the size of a model with d compressed coordinates and unknown shapes. Raises ConfigError for d < 1."""
        if d < 1:
            raise ConfigError(f"d must be at least 1, got {d}")
        return cls(f"d = {d:,}", d, 0)

    @classmethod
    def of_model(cls, name: str, model: nn.Module) -> "ModelSize":
        """Return the size of `model`, counting only parameters that require gradients. `name` is the name of the model
        in messages. Raises ConfigError if no parameter would be compressed."""
        named = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ConfigError(f"model {name} has no parameters that require gradients")
        of = Slice(places(named, Compression.dense_below), named[0][1].device)
        if not of.compressed_d:
            few = f"every tensor is a vector or below {Compression.dense_below} elements"
            raise ConfigError(f"model {name} has nothing to compress: {few}")
        # DDP sends gradients in the dtypes of the parameters, and packsaddle in at least float32.
        gradient_bytes, itemsize = sum(p.nbytes for _, p in named), max(4, *(p.element_size() for _, p in named))
        return cls(name, of.compressed_d, of.d - of.compressed_d, tuple(of.shapes), itemsize, gradient_bytes)


def update_seconds(d: int, *, repeats: int = 5, device: torch.device | str = "cpu") -> float:
    """Return the seconds by which a step of CompressedSGD on d coordinates takes longer than a step of torch.optim.SGD,
    not counting encoding and decoding. The result is the time that the error memory takes.

    Times are minima over `repeats` steps on `device`. They are measured on at most 2^25 coordinates. For a larger d,
    they are scaled in proportion to d.
    """
    n = min(d, LONGEST)
    gradient = torch.randn(1, n, generator=torch.Generator().manual_seed(0)).to(device)

    def stepper(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Callable[[], None]:
        weight = nn.Parameter(torch.zeros_like(gradient))
        optimizer = make([weight])

        def step() -> None:
            weight.grad = gradient
            optimizer.step()
            optimizer.zero_grad()

        return step

    # Compressing to k = 1 coordinate takes almost no time, so only the error memory is timed.
    spec = Compression(RandomK(k=1), dense_below=0)
    times = side_by_side(
        {
            "compressed": stepper(lambda ps: CompressedSGD(ps, 1e-6, spec, process_group=Solo())),
            "plain": stepper(lambda ps: torch.optim.SGD(ps, 1e-6)),
        },
        repeats=repeats,
    )
    return max(0.0, times["compressed"].low - times["plain"].low) * d / n


@dataclass(frozen=True)
class TrainingStep:
    """A model and a batch of examples, with which a training step of the model is timed.

    The loss is the first output of the model that requires gradients and has a single element. If there is none, the
    loss is the sum, over all outputs that require gradients, of the mean of their squares.

    >>> import torch
    >>> from packsaddle.plan import TrainingStep
    >>> model = torch.nn.Linear(8, 2)
    >>> step = TrainingStep(model, torch.ones(4, 8))
    >>> step.loss().shape, step.time([torch.optim.AdamW(model.parameters())]).low > 0
    (torch.Size([]), True)
    """

    model: nn.Module
    batch: Any  # the model's argument, a tuple of its arguments, or a dict of keyword arguments

    @classmethod
    def of_model(cls, model: nn.Module, shape: tuple[int, ...], batch: int, *, tokens: bool) -> "TrainingStep":
        """Return the training step of `model` on `batch` random examples of this `shape`. Examples are float32 or, with
        `tokens`, int64 numbers below the size of the smallest embedding. Raises ConfigError for batch < 1, and for
        `tokens` if the model has no embedding."""
        if batch < 1:
            raise ConfigError(f"batch must be at least 1, got {batch}")
        rng = torch.Generator().manual_seed(0)
        if not tokens:
            return cls(model, torch.rand(batch, *shape, generator=rng))
        sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
        if not sizes:
            raise ConfigError("int64 inputs are for a model with an nn.Embedding, and this one has none")
        return cls(model, torch.randint(min(sizes), (batch, *shape), generator=rng))

    def to(self, device: torch.device | str) -> "TrainingStep":
        """Return this training step with its model and batch moved to a `device`."""
        batch = dict(self.batch) if isinstance(self.batch, Mapping) else self.batch
        return TrainingStep(self.model.to(device), tree_map_only(Tensor, lambda t: t.to(device), batch))

    def loss(self) -> Tensor:
        """Return the loss on the batch. Raises ConfigError if no output of the model requires gradients."""
        if isinstance(self.batch, Mapping):
            output = self.model(**self.batch)
        else:
            output = self.model(*(self.batch if isinstance(self.batch, tuple) else (self.batch,)))
        output = dict(output) if isinstance(output, Mapping) else output
        found = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        if not found:
            raise ConfigError(f"the model must return a loss, or tensors with gradients, got {type(output).__name__}")
        squares = torch.stack([t.float().square().mean() for t in found]).sum()
        return next((t for t in found if t.numel() == 1), squares)

    def time(self, optimizers: Sequence[torch.optim.Optimizer] = ()) -> Timing:
        """Measure the seconds of a whole training step: a forward pass, a backward pass, and a step of each of
        `optimizers`. Returns the median, lowest and highest time of several such steps. Steps are repeated until the
        minimum is reproducible (see `repeated`)."""

        def step() -> None:
            self.model.zero_grad()
            self.loss().backward()  # type: ignore[no-untyped-call]
            for each in optimizers:
                each.step()

        return repeated(step)


def muon_and_adamw(model: nn.Module, muon: dict[str, Any], adamw: dict[str, Any]) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of hidden layers, and AdamW for all other trained parameters of `model`.

    `muon` and `adamw` are the keyword arguments of the two optimizers. The result is a list of the two. AdamW is
    omitted if Muon has all parameters. Raises ConfigError if the model has no matrix for Muon.
    """
    hidden = hidden_matrices(model)
    muons = {id(p) for _, p in hidden}
    others = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in muons]
    return [torch.optim.Muon(hidden, **muon), *([torch.optim.AdamW(others, **adamw)] if others else [])]


def hidden_matrices(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that Muon should train, with their names: all matrices that require gradients, except
    embeddings and the weight of the last linear layer, as torch's documentation of Muon recommends. Raises
    ConfigError if there are none."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    ends = [*linear[-1:], *(module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag))]
    apart = {id(module.weight) for module in ends}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found = [(name, p) for name, p in named if p.ndim == 2 and id(p) not in apart]
    if not found:
        raise ConfigError(
            "muon is for matrices of hidden layers, and the model has none but embeddings and its last layer: use adamw"
        )
    return found
