"""The settings of compressed averaging over workers: compressor, exchange, decay and validation."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from packsaddle.comm.select_aggregator import Exchange, check_exchange
from packsaddle.compressors import Compressor
from packsaddle.errors import check_integers
from packsaddle.options.agreement import Option

# A function of the index of a step or round, which returns the compressor of that step or round.
CompressorSchedule = Callable[[int], Compressor]
_A_COMPRESSOR = "a packsaddle Compressor such as RandomK(0.01)"
_OR_A_SCHEDULE = f"{_A_COMPRESSOR}, or a function of the step that returns one"


@dataclass(frozen=True)
class Compression(Option):
    """Settings of compressed averaging over workers: compressor, exchange, decay and validation.

    Arguments of this type also accept a `Compressor`, as short for `Compression(compressor)`.

    Args:
        compressor: C, applied to the concatenation of all compressed tensors. Hooks and local updates also accept a
            function of the step or round that returns it.
        exchange: how messages are averaged: "direct" (the exact mean: all-reduce or all-gather), "two-way" (each worker
            averages one chunk of the vector), "coordinator" (one worker averages all), or "auto" ("direct" or
            "two-way", by predicted bytes; see `select_aggregator`). Local updates also accept "senders": like "direct",
            but each coordinate is averaged over the workers that sent it, as in SparseLoCo's code; error memories are
            then not exactly the unsent part of the updates. If None, it is "auto" in local updates of a fixed set of
            workers, else "direct".
        back: the compressor of the mean, which the exchanges "two-way" and "coordinator" send back to the workers. If
            None, "two-way" compresses the mean with `compressor`, and "coordinator" sends it uncompressed.
        dense_below: tensors with fewer elements than this are sent uncompressed, and so are all tensors with fewer than
            two dimensions; 0 compresses all tensors.
        decay: factor applied to the error memory in each step or round, in [0, 1]; 0 disables error feedback. It must
            be 1 in `CompressedSGD`, and above 0 in local updates.
        max_skipped: maximum number of consecutive steps that all workers may skip because a worker's vector is invalid
            (Inf, NaN or too large numbers). One more skipped step raises NonFiniteError. If None, vectors are not
            validated, except in local updates, where they are validated and the number of skipped rounds has no limit.

        compare_every: the number of steps between two comparisons of the workers' parameters, learning rates and noise,
            which raise DriftError if they differ. A worker sends 16 bytes of fingerprints for a comparison. 0 never
            compares.
        monitor_every: the number of steps between two measurements of the contraction 1 - ||v - C(v)||^2 / ||v||^2,
            where v is the vector to send; 0 never measures.

    Raises ValueError for an invalid argument.

    >>> import torch
    >>> from packsaddle import Compression, CompressedSGD, TopK
    >>> spec = Compression(TopK(0.01), exchange="two-way", dense_below=0)
    >>> opt = CompressedSGD([torch.nn.Parameter(torch.zeros(64))], 0.1, spec)
    >>> opt.compressed_numel
    64
    """

    compressor: Compressor | CompressorSchedule
    exchange: Exchange | None = None
    back: Compressor | None = None
    dense_below: int = 256
    decay: float = 1.0
    max_skipped: int | None = 20
    compare_every: int = 100
    monitor_every: int = field(default=0, metadata={"own": True})

    def __post_init__(self) -> None:
        # A class is callable, so it would pass as a function of the step.
        if isinstance(self.compressor, type):
            name = self.compressor.__name__
            raise ValueError(f"compressor must be made, as RandomK(0.01) or Sign() is, got the class {name} itself")
        if not (isinstance(self.compressor, Compressor) or callable(self.compressor)):
            raise ValueError(f"compressor must be {_OR_A_SCHEDULE}, got {self.compressor!r}")
        if not (self.back is None or isinstance(self.back, Compressor)):
            raise ValueError(f"back must be a packsaddle Compressor or None, got {self.back!r}")
        check_exchange(self.exchange or "direct", self.back)
        check_integers(0, dense_below=self.dense_below)
        if isinstance(self.decay, bool) or not isinstance(self.decay, int | float) or not 0 <= self.decay <= 1:
            raise ValueError(f"decay must be in [0, 1], got {self.decay!r}")
        if self.max_skipped is not None:
            check_integers(0, max_skipped=self.max_skipped)
        check_integers(0, compare_every=self.compare_every, monitor_every=self.monitor_every)

    @classmethod
    def of(cls, given: "AnyCompression", exchange: Exchange = "direct") -> "Compression":
        """Return `given` as a `Compression`.

        If `given` is a compressor or a schedule, i.e. a function of the step, all other settings are the defaults. If
        its exchange is None, the exchange of the result is the argument `exchange`.
        """
        spec = given if isinstance(given, Compression) else cls(given)
        return spec if spec.exchange is not None else replace(spec, exchange=exchange)

    def exchange_of(self, compressor: Compressor) -> Exchange:
        """Return the kind of exchange, such as "two-way", by which the messages of `compressor` are averaged.

        It is "direct" for a lossless compressor, whatever `exchange` is.
        """
        return "direct" if compressor.lossless else self.exchange or "direct"

    def check_gradients(self) -> None:
        """Raise ValueError if the exchange is "senders". It averages local updates, and does not support gradients."""
        if self.exchange == "senders":
            raise ValueError('exchange "senders" is for local updates, not for gradients')

    def for_sgd(self) -> Compressor:
        """Return the compressor of `CompressedSGD`, which is the same in all steps.

        Raises ValueError if the compressor is a function of the step, and for an exchange or a decay that
        `CompressedSGD` does not support.
        """
        self.check_gradients()
        if self.decay != 1:
            raise ValueError(
                f"decay must be 1 in CompressedSGD, got {self.decay:g}, which is for hooks and local updates"
            )
        if not isinstance(self.compressor, Compressor):
            raise ValueError(
                f"compressor must be {_A_COMPRESSOR}, got {self.compressor!r}: functions of the step are for "
                f"register_ddp_hook and register_fsdp_hook"
            )
        return self.compressor

    def at(self, step: int) -> Compressor:
        """Return the compressor of a step.

        Raises ValueError if `compressor` is a function of the step, and this function returns an object that is not a
        compressor.
        """
        if isinstance(self.compressor, Compressor):
            return self.compressor
        found = self.compressor(step)
        if not isinstance(found, Compressor):
            raise ValueError(f"compressor must be {_OR_A_SCHEDULE}, got {found!r} at step {step}")
        return found


# Type of the argument `compressor` of hooks and local updates.
AnyCompression = Compressor | CompressorSchedule | Compression
