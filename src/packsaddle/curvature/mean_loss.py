"""The mean loss of a network over all batches of all workers, and its gradient at and near the current parameters.

The loss is the mean over all N examples, f = sum_b n_b loss_b / N, where every batch b of every worker has n_b examples
and mean loss loss_b. A gradient takes one backward pass for each batch of this worker, and one all-reduce of d numbers,
where d is the number of trainable coordinates. The network must not be wrapped in DistributedDataParallel, which would
average gradients a second time.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from packsaddle.comm.communicator import Communicator
from packsaddle.comm.group import resolve
from packsaddle.comm.ledger import Ledger
from packsaddle.comm.sharding import local_part
from packsaddle.curvature.narrow_convolutions import safe_derivatives
from packsaddle.numerics.devices import device_of_doubles, to_device
from packsaddle.numerics.finite import is_finite
from packsaddle.numerics.seeds import Stream, generator

LossFn = Callable[[nn.Module, Any], Tensor]
_SHORT = (torch.float32, torch.float16, torch.bfloat16)
_FEW_BATCHES = 8  # a sample takes a part of each batch if there are fewer batches than this


class NotFiniteError(ValueError):
    """Raised if the loss, its gradient or a Hessian-vector product is infinite or NaN."""


def fresh_generator() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the list of a model's trainable parameters.

    Raises TypeError if `model` is not a torch.nn.Module. Raises ValueError if it has no trainable parameters, if one of
    them is not floating-point, such as a complex parameter.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError("model has no trainable parameters")
    for name, p in found.items():
        if not p.is_floating_point():
            raise ValueError(f"model must have real parameters, but {name} is {p.dtype}")
    return list(found.values())


class MeanLoss:
    """The mean loss over all examples, and its gradient, at a network's current parameters. Gradients are flat float64
    vectors.

    A vector has one element for each of the d coordinates, i.e. elements of the trainable parameters.

    `loss_fn(model, batch)` returns the mean loss of a batch. `batches` is an iterable of this worker's batches that can
    be iterated repeatedly. A worker may have no batches if another worker has some. `on_batch` is called after each
    batch, with the part of this worker's batches that it is.

    Construction is collective and evaluates the loss. Raises ValueError if parameters differ between workers, or if
    there are no examples or no trainable parameters. Raises NotFiniteError if the loss is not finite.
    """

    _alike = 1  # number of workers that have the same batches
    is_cut = False  # True for a sample of parts of batches, whose sums round less than those over whole batches
    _few = _FEW_BATCHES

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        batches: Iterable[Any],
        channel: Communicator,
        *,
        on_batch: Callable[[float], None] = lambda part: None,
        tensor_parallel: Any = None,
    ) -> None:
        self._model, self._loss_fn, self._batches, self._channel = model, loss_fn, batches, channel
        self.on_batch, self._tensor_parallel = on_batch, tensor_parallel
        self.parameters = trainable(model)
        self._tensors = [local_part(p) for p in self.parameters]  # this process's part of each parameter
        self.d = sum(p.numel() for p in self.parameters)
        # Device of all flat float64 vectors, such as gradients.
        self.device = device_of_doubles(self._tensors[0].device)
        self.products = 0  # number of Hessian-vector products so far
        self.passes = 0.0  # number of backward passes over all examples so far; those over a sample are a fraction
        self._displaced = 0  # number of gradients computed at displaced parameters; it seeds the stochastic rounding
        self._sizes: list[int] = []  # number of examples in each batch of this worker
        self._prepare()

        # Evaluate this worker's sum of losses, sum_b n_b loss_b, and sum it over workers.
        watch = _Precision()
        self._first = self._totals(watch if self.parameters[0].dtype is torch.float64 else None)
        found = [*self._first, self._differs_from_rank_0(), *(dtype in watch.dtypes for dtype in _SHORT)]
        total = torch.tensor(found, dtype=torch.float64, device=self.device)
        loss, examples, apart, *short = self._sum(total).tolist()
        if apart:
            raise ValueError("model has other parameters on some workers than on rank 0; broadcast them first")
        if not math.isfinite(loss):
            raise NotFiniteError(f"the loss is {loss} at the present parameters; there is nothing to certify")
        if not examples:
            raise ValueError("batches is empty on every worker")

        # Find the coarsest precision in which the loss is computed, and the mean loss f = sum_b n_b loss_b / N.
        used = [p.dtype for p in self.parameters] + [dtype for dtype, n in zip(_SHORT, short, strict=True) if n]
        self.precision = max(torch.finfo(dtype).eps for dtype in used)  # unit roundoff of the loss
        self.examples = int(examples) // self._alike
        self.loss = loss / examples

    def sample(self, examples: int, *, cut: bool = True) -> Self | None:
        """Return the mean loss over a part of the examples of all workers, of about this number; collective.

        It has evenly spaced batches of each worker, or the first part of every batch if there are fewer than eight.
        Returns None if a batch cannot be cut, or must not (`cut`), or if the part would have more than half of the
        examples.
        """
        share = examples / self.examples
        few = self.total(sum(n > 0 for n in self._sizes)) < self._few
        if few and not cut:
            return None
        batches = self._cut(share) if few else self._spaced(share)
        if self.on_any_worker(batches is None):
            return None
        part = self.over(batches or [])
        part.is_cut, part._few = few, 0  # a sample is itself sampled by whole batches
        return part if 2 * part.examples <= self.examples else None

    def over(self, batches: list[Any]) -> Self:
        """Return the mean loss over some of this worker's batches, and over those of the others; collective."""
        shared = {"on_batch": self.on_batch, "tensor_parallel": self._tensor_parallel}
        return type(self)(self._model, self._loss_fn, batches, self._channel, **shared)

    @property
    def workers(self) -> int:
        """The number of processes."""
        return self._channel.group.size

    def longest(self, length: int) -> int:
        """Return the largest number of elements that any worker stores of a vector. This worker stores `length`."""
        return length

    def count(self, part: "MeanLoss") -> None:
        """Add the passes of a sample, as the fraction of all examples that it has."""
        self.passes += part.passes * part.examples / self.examples

    def _cut(self, share: float) -> list[Any] | None:
        """Return the first part of each batch, or None if the loss cannot be computed for such a part."""
        found = []
        for batch in self._batches:
            if n := batch_size(batch):
                if any(len(t) != n for t in tree_leaves(batch) if isinstance(t, Tensor) and t.ndim):
                    return None
                most = max(1, round(share * n))
                found.append(tree_map_only(Tensor, partial(_first, most), batch))
        try:
            with differentiating(self._model):
                for batch in found[:1]:
                    self._loss_of(batch)
        except Exception:  # a loss may raise any error for a number of examples that it was not written for
            return None
        return found

    def _spaced(self, share: float) -> list[Any]:
        """Return evenly spaced batches, at least one if this worker has any."""
        batches = (batch for batch in self._batches if batch_size(batch))
        stride, count = max(1, round(1 / share)), sum(n > 0 for n in self._sizes)
        return list(islice(batches, min(stride // 2, max(0, count - 1)), None, stride))

    def _differs_from_rank_0(self) -> bool:
        """Return True if this worker's parameters differ from rank 0's, by two checksums; collective."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for p in self._model.parameters():
            values = self._doubles(p.detach())
            sums += torch.stack([values.sum(), values.square().sum()])
        theirs = sums.clone()
        self._channel.broadcast(theirs, "certificate")
        return not torch.equal(sums.nan_to_num(), theirs.nan_to_num())

    def _read(self) -> Iterator[tuple[Any, int]]:
        """Yield this worker's batches and their numbers of examples, without empty batches, whose mean loss is NaN."""
        for batch in self._batches:
            if n := batch_size(batch):
                yield batch, n
                self.on_batch(1 / len(self._sizes) if self._sizes else 0.0)

    def _totals(self, watch: AbstractContextManager[Any] | None = None) -> tuple[float, int]:
        """Return the sum of the losses of this worker's examples, and the number of examples. All losses are computed
        inside the context manager `watch`, if it is given."""
        losses = list[tuple[Tensor, int]]()
        with differentiating(self._model):  # since the loss itself may compute gradients, as a gradient penalty does
            for batch, n in self._read():
                with watch or nullcontext():
                    losses.append((self._loss_of(batch).detach(), n))
        self._sizes = [n for _, n in losses]
        return self._summed(losses)

    def _summed(self, losses: list[tuple[Tensor, int]]) -> tuple[float, int]:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for loss, n in losses:
            total += self._doubles(loss.reshape(())) * n
        return float(total), sum(n for _, n in losses)

    def _check_repeated(self, losses: list[tuple[Tensor, int]]) -> None:
        """Raise ValueError on all workers if these mean losses of batches are not those of the construction on any
        worker; collective."""
        if self.on_any_worker(repr(self._summed(losses)) != repr(self._first)):
            raise ValueError(
                "loss_fn gave two values for the same parameters and batches: pass batches that can be read twice (a "
                "list or a DataLoader, not an iterator), and switch off shuffling, augmentation and anything else that "
                "is random (dropout and batch normalization are put in eval mode here)"
            )

    def _loss_of(self, batch: Any) -> Tensor:
        """Return a batch's mean loss, float[], with a graph.

        Raises ValueError if `loss_fn` does not return a tensor of one number, or if the tensor has no graph.
        """
        loss: Any = self._loss_fn(self._model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"{tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must return a tensor of one number, the batch's mean loss, got {found}")
        if not loss.requires_grad:
            raise ValueError("loss_fn must return a loss that torch can differentiate, got a tensor without a graph")
        return loss

    def _sum(self, values: Tensor) -> Tensor:
        """Return the sum over workers of the vectors `values`, float64[n] on `self.device`; collective."""
        return self._channel.mean(values, "certificate").mul_(self._channel.group.size)

    def total(self, number: float) -> float:
        """Return the sum of a number over workers with different batches; collective."""
        return float(self._sum(to_device(torch.tensor([number], dtype=torch.float64), self.device))) / self._alike

    def _prepare(self) -> None:
        """Check the parameters and the batches, before the loss is computed."""

    def on_any_worker(self, found: bool) -> bool:
        return self.total(float(found)) > 0

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the inner product <a, b> of two vectors, float64[] on their device."""
        return a @ b

    def norm(self, v: Tensor) -> float:
        return math.sqrt(float(self.dot(v, v)))

    def gradient(self) -> tuple[Tensor, float]:
        """Return the gradient of the mean loss f, float64[d], and its standard error; collective.

        Batch b of the B batches has n_b examples and gradient g_b. The variance of one example's gradient is estimated
        as sum_b n_b ||g_b - grad f||^2 / (B - 1). The variance of the mean over N examples is 1 / N of this estimate,
        and its square root is the standard error. If there is only one batch, the standard error is inf.

        Raises ValueError if the losses differ from those of the construction, as they do with data augmentation,
        shuffling or an exhausted iterator.
        """
        losses = list[tuple[Tensor, int]]()
        spread = torch.zeros(2, dtype=torch.float64, device=self.device)  # sum_b n_b ||g_b||^2 and B

        def derivative(loss: Tensor, n: int) -> tuple[Tensor, ...]:
            losses.append((loss.detach(), n))
            grads = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
            spread[0] += n * sum(self._doubles(g).square().sum() for g in grads)
            spread[1] += 1
            return grads

        self.passes += 1
        mean = self._mean(derivative)
        self._check_repeated(losses)
        squares, batches = self._sum(spread).tolist()
        return mean, self._standard_error(squares, float(mean.square().sum()), batches)

    def _standard_error(self, squares: float, square: float, batches: float) -> float:
        """Return the standard error of the mean gradient, from sum_b n_b ||g_b||^2, from the mean gradient's squared
        norm, and from the number of batches."""
        if batches == 1:
            return math.inf
        return math.sqrt(max(0.0, squares - self.examples * square) / (batches - 1) / self.examples)

    def _doubles(self, tensor: Tensor) -> Tensor:
        """Convert a tensor to float64 on `self.device`, the device of all flat vectors."""
        # Move and convert it in two steps, since MPS cannot convert to float64.
        return tensor.to(self.device).to(torch.float64)

    def gradient_at(self, direction: Tensor, distance: float) -> Tensor:
        """Return the gradient of the mean loss at x + distance * direction, float64[d], where x are the current
        parameters; collective. 16-bit parameters are rounded stochastically."""
        self.passes += 1
        self._displaced += 1
        with self.moved(direction, distance, dither=self._displaced):
            return self._gradient_here()

    def _gradient_here(self) -> Tensor:
        return self._mean(lambda loss, _: torch.autograd.grad(loss, self.parameters, materialize_grads=True))

    def random_vector(self, generator: torch.Generator | None) -> Tensor:
        """Return a Gaussian vector, float64[d], which is identical on all workers; collective.

        It is drawn from `generator` on rank 0. If that is None, a new generator is seeded by the operating system.
        """
        shared = self._shared_generator(generator)
        return torch.randn(self.d, generator=shared, dtype=torch.float64).to(self.device)

    def _shared_generator(self, generator: torch.Generator | None) -> torch.Generator:
        """Return a CPU generator, seeded on all workers by one draw from rank 0's generator; collective."""
        generator = fresh_generator() if generator is None else generator
        # Broadcast a seed instead of the vector, and draw the vector from it on the CPU of every worker.
        seed = torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device).to(self.device)
        self._channel.broadcast(seed, "certificate")
        return torch.Generator().manual_seed(int(seed))

    def size_of_parameters(self) -> float:
        """Return ||x||, the norm of the trainable parameters."""
        return math.sqrt(sum(float(self._doubles(t).square().sum()) for t in self._tensors))

    def _mean(self, derivative: Callable[[Tensor, int], tuple[Tensor, ...]]) -> Tensor:
        """Return the mean over all examples of all workers of a derivative of the loss, float64[d]; collective.

        `derivative(loss, n)` returns the derivative of a batch's mean loss over its n examples, with one tensor per
        parameter.
        """
        total = torch.zeros(self.d, dtype=torch.float64, device=self.device)
        pieces = torch.split(total, [p.numel() for p in self.parameters])
        with differentiating(self._model):
            for batch, n in self._read():
                for piece, part in zip(pieces, derivative(self._loss_of(batch), n), strict=True):
                    piece.add_(self._doubles(part.detach().reshape(-1)), alpha=n)
        return self._finite(self._channel.mean(total, "certificate").mul_(self._channel.group.size / self.examples))

    def _finite(self, mean: Tensor) -> Tensor:
        if not is_finite(mean):  # the mean is identical on all workers, so all raise
            raise NotFiniteError("a derivative of the loss is not finite at the present parameters")
        return mean

    @contextmanager
    def moved(self, direction: Tensor, distance: float, dither: int | None = None) -> Iterator[None]:
        """Context manager that moves the parameters x to x + distance * direction, for a `direction` float64[d]. On
        exit x is restored bitwise.

        If a seed `dither` is given, 16-bit parameters are rounded stochastically, so that the expected value of the
        result is exact. Without stochastic rounding, a displacement smaller than their resolution would be lost.
        """
        pieces = torch.split(direction, [t.numel() for t in self._tensors])
        with _restored(self._tensors):
            for i, (p, piece) in enumerate(zip(self._tensors, pieces, strict=True)):
                shift = (piece * distance).view(p.shape)
                if dither is None or p.element_size() > 2:
                    p.add_(shift.to(p.dtype).to(p.device))
                else:
                    rng = generator(dither, i, Stream.ROUNDING)
                    p.copy_(_dithered(self._doubles(p) + shift, p.dtype, rng))
            yield

    def loss_at(self, direction: Tensor, distance: float) -> float:
        with self.moved(direction, distance):
            total, _ = self._totals()
        return self.total(total) / self.examples


class _Precision(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records in `dtypes` the dtypes shorter than float64 to which a loss casts its float64 tensors.

    If there are any such dtypes, the loss is computed in less precision than its float64 parameters have.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(a, Tensor) and a.dtype is torch.float64 for a in args):
            results = result if isinstance(result, list | tuple) else [result]
            self.dtypes |= {t.dtype for t in results if isinstance(t, Tensor) and t.dtype in _SHORT}
        return result


def _dithered(x: Tensor, dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    """Round float64 numbers x stochastically to a shorter dtype, so that the expected value of the result is x, except
    if the result is subnormal."""
    # `place` is the distance between neighboring numbers of the shorter dtype at x (unit in the last place).
    place = torch.ldexp(torch.full_like(x, torch.finfo(dtype).eps / 2), torch.frexp(x).exponent)
    # Draw on the CPU, so that the rounding is identical on workers with different devices.
    drawn = torch.rand(x.shape, generator=rng, dtype=x.dtype).to(x.device)
    return (x + place * (drawn - 0.5)).to(dtype)


@contextmanager
def certifying(model: nn.Module, process_group: Any) -> Iterator[Communicator]:
    """Context manager in which a certificate is computed; collective.

    On entry it broadcasts rank 0's buffers, such as batch normalization statistics, and it yields a communicator of the
    process group. On exit it restores each worker's own buffers, and the state of torch's generator, from which a
    DataLoader draws its seeds.
    """
    channel = Communicator(resolve(process_group), Ledger())
    buffers = [b.data for b in model.buffers() if b.is_floating_point()] if channel.group.size > 1 else []
    with torch.random.fork_rng(devices=()), _restored(buffers):
        for b in buffers:
            channel.broadcast(b, "certificate")
        yield channel


@contextmanager
def _restored(tensors: list[Tensor]) -> Iterator[None]:
    before = [t.clone() for t in tensors]
    try:
        yield
    finally:
        for t, old in zip(tensors, before, strict=True):
            t.copy_(old)


@contextmanager
def differentiating(model: nn.Module) -> Iterator[None]:
    """Context manager in which derivatives of a loss are computed.

    It sets every module of the model to eval mode and enables gradients. It also disables oneDNN if oneDNN's gradients
    for this model could be wrong (see `safe_derivatives`). On exit each module's training flag is restored.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.enable_grad(), safe_derivatives(model):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _first(most: int, tensor: Tensor) -> Tensor:
    return tensor[:most] if tensor.ndim else tensor


def batch_size(batch: Any) -> int:
    if isinstance(batch, Tensor) and batch.ndim:
        return len(batch)
    parts = list(batch.values()) if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else []
    if not parts:
        raise ValueError(f"a batch must be a tensor, or a list, tuple or dict that starts with one, got {type(batch)}")
    return batch_size(parts[0])
