"""Compression: compressor, exchange and guards, alike for the optimizer, the hooks and local updates."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import get_args

from packsaddle.comm.select_aggregator import Exchange, check_exchange
from packsaddle.compressors import Compressor
from packsaddle.errors import is_below
from packsaddle.optim.layout import check_dense_below
from packsaddle.optim.memory import Memory
from packsaddle.optim.stages.drift import OnDrift
from packsaddle.options.agreement import Option

Schedule = Callable[[int], Compressor]


@dataclass(frozen=True)
class Compression(Option):
    """Settings of an exchange: compressor, average, error memory and guards.

    A `Compressor` alone stands for `Compression(compressor)` wherever one is taken.

    Args:
        compressor: C, applied to the concatenation of all compressed tensors; where gradients or local updates are
            exchanged also a function of the step that gives it (see `RatioRamp`).
        exchange: how messages are averaged: "direct" (the exact mean: all-reduce or all-gather), "two-way",
            "coordinator", or "auto", by predicted bytes (see `select_aggregator`). In local updates also "senders":
            directly, and a coordinate over the workers that sent it, as in SparseLoCo's reference, which breaks
            y = a - mean e.
        back: what compresses the mean on its way back in "two-way" and "coordinator".
        dense_below: tensors with fewer elements, and all with fewer than two dimensions, are sent dense;
            0 compresses everything.
        decay: factor of the error memory in each step or round, in [0, 1]: below 1 errors are forgotten in time, and
            with 0 there is no error feedback. `CompressedSGD` takes 1 only.
        memory: where the error is kept: "buffer" is a vector of its own; "gradient" the parameters' gradients, which
            then must not be cleared, clipped or scaled between steps (see `GradientMemory`); "ef21" is a running
            estimate of the gradient instead (see `EstimateMemory`). Hooks and local updates take "buffer" only.
        max_skipped: a step in which a worker's vector is not finite is left out on all of them, and counted; after
            more than this many in a row NonFiniteError is raised. None takes vectors as they come.
        compare_every: every this many steps workers compare fingerprints of the parameters and of what
            they have stepped by (rates, noise), 16 bytes; 0 never does.
        on_drift: what to do where fingerprints differ: "stop" raises DriftError, "repair" has all take worker 0's.
        monitor_every: measure the contraction every this many steps; 0 never does.

    Raises ValueError for bad arguments.

    >>> import torch
    >>> from packsaddle import Compression, CompressedSGD, TopK
    >>> spec = Compression(TopK(0.01), exchange="two-way", dense_below=0)
    >>> opt = CompressedSGD([torch.nn.Parameter(torch.zeros(64))], 0.1, spec)
    >>> opt.compressed_numel
    64
    """

    compressor: Compressor | Schedule
    exchange: Exchange = "direct"
    back: Compressor | None = None
    dense_below: int = 1024
    memory: Memory = "buffer"
    decay: float = 1.0
    max_skipped: int | None = 20
    compare_every: int = 100
    on_drift: OnDrift = "stop"
    monitor_every: int = field(default=0, metadata={"own": True})

    def __post_init__(self) -> None:
        if isinstance(self.compressor, type):
            name = self.compressor.__name__
            raise ValueError(f"compressor must be made, as RandomK(0.01) or Sign() is, got the class {name} itself")
        if not (isinstance(self.compressor, Compressor) or callable(self.compressor)):
            raise ValueError(
                f"compressor must be a packsaddle Compressor such as RandomK(0.01), or a function of the step that "
                f"returns one, got {self.compressor!r}"
            )
        if not (self.back is None or isinstance(self.back, Compressor)):
            raise ValueError(f"back must be a packsaddle Compressor or None, got {self.back!r}")
        check_exchange(self.exchange, self.back)
        for name, allowed in {"memory": get_args(Memory), "on_drift": get_args(OnDrift)}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.memory != "buffer" and self.exchange != "direct":  # others hold errors back, in their messages' units
            raise ValueError(f'memory must be "buffer" with exchange {self.exchange!r}, got {self.memory!r}')
        check_dense_below(self.dense_below)
        if isinstance(self.decay, bool) or not isinstance(self.decay, int | float) or not 0 <= self.decay <= 1:
            raise ValueError(f"decay must be in [0, 1], got {self.decay!r}")
        if self.max_skipped is not None and is_below(self.max_skipped, 0):
            raise ValueError(f"max_skipped must be 0 or more steps, or None, got {self.max_skipped}")
        for name in ("compare_every", "monitor_every"):
            if is_below(getattr(self, name), 0):
                raise ValueError(f"{name} must be 0 or more steps, got {getattr(self, name)}")

    @classmethod
    def of(cls, given: "Compressor | Schedule | Compression") -> "Compression":
        """Return what was given, a compressor or schedule with everything else at its default."""
        return given if isinstance(given, Compression) else cls(given)

    def check_gradients(self) -> None:
        """Raise ValueError for an exchange that is of local updates alone."""
        if self.exchange == "senders":
            raise ValueError('exchange "senders" is for local updates, not for gradients')

    def fixed(self) -> Compressor:
        """Return the compressor where one is for all steps. Raises ValueError for a function of the step."""
        if not isinstance(self.compressor, Compressor):
            raise ValueError(
                f"compressor must be a packsaddle Compressor such as RandomK(0.01), got {self.compressor!r}: functions "
                f"of the step are for register_ddp_hook and register_fsdp_hook"
            )
        return self.compressor

    def at(self, step: int) -> Compressor:
        """Return the compressor of a step. Raises ValueError if a schedule gives something else."""
        if isinstance(self.compressor, Compressor):
            return self.compressor
        found = self.compressor(step)
        if not isinstance(found, Compressor):
            raise ValueError(
                f"compressor must be a packsaddle Compressor such as RandomK(0.01), or a function of the step that "
                f"returns one, got {found!r} at step {step}"
            )
        return found
