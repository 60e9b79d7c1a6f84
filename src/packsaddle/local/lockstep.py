"""Collectives of local updates. They run in the same order on all workers, each after a check that all workers make the
same call at the same step.

If the compressor is a function of the round, the check also compares the compressors that the function returns. Without
the check, if workers made different calls, collectives of different sizes would be paired: gloo would abort the
process, and NCCL would hang.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, fields
from typing import Literal, get_args

import torch
from torch import Tensor

from packsaddle.comm.communicator import Communicator, as_text, hash_of
from packsaddle.comm.failures import PeerLostError
from packsaddle.compressors import Compressor, describe, identify
from packsaddle.feedback.background import Background
from packsaddle.numerics.devices import to_device
from packsaddle.numerics.transfers import Readback

_log = logging.getLogger("packsaddle")
Call = Literal[
    "exchanges a round",
    "calls flush()",
    "calls error()",
    "compares anchors",
    "checks its first step",
    "calls average()",
    "calls flush(compressor)",
    "saves a checkpoint",
    "loads a checkpoint",
]
_CALLS = get_args(Call)
_ADVICE = "make the data equally long (drop_last=True, DistributedSampler)"
_LOST = (
    "If worker {rank} alone made this call (`if rank == 0:`), or alone made LocalUpdates, do it on every worker; "
    "if the others ended after fewer steps, {advice}"
)


@dataclass(frozen=True)
class Header:
    """The integers that each worker sends before a collective, to check that all workers make the same call."""

    call: int  # index of the call in `Call`
    steps: int  # number of inner steps; with `Workers(weight="steps")` of ticks (see `Schedule`)
    compressor: int  # hash of the compressor; 0: the compressors are not compared
    frozen: int  # hash of the names of the frozen parameters
    nanoseconds: int = 0  # time of an inner step, sent only with `Workers(weight="steps")`; 0: unknown

    def packed(self, device: torch.device, size: int) -> Tensor:
        return to_device(torch.tensor(astuple(self)[:size]), device)


_SIZE = len(fields(Header)) - 1  # number of integers in a header, not counting the time
HEADER = 8 * _SIZE  # bytes of a header, not counting the time


@dataclass
class PendingCall:
    """A collective that was started, and the check, to be made after it, that all workers made the same call."""

    wait: Callable[[], object] = lambda: None  # waits for the collective, and raises its errors
    # Compares the calls, and returns True if the frozen parameters are identical on all workers. Call after `wait`.
    check: Callable[[], bool] = lambda: True
    # Nanoseconds per inner step of each worker, by rank; 0: unknown. Read the list after `check`, which completes it.
    times: list[int] = field(default_factory=list)


class Lockstep:
    """Runs collectives in the order of their calls, after a check that all workers make the same call; the ledger
    records the bytes of the check as "guard".

    `behind` runs collectives in a background thread, so that they overlap with inner steps; if it is None, collectives
    run in the calling thread. With `norms`, every check also sends the norm of the worker's update (0 in calls without
    an update), so that the checks of all calls have the same size. With `paced`, every check also sends the time of an
    inner step, and no warning is logged if calls other than exchanges follow different numbers of steps on different
    workers.
    """

    def __init__(
        self, channel: Communicator, device: torch.device, behind: Background | None, *, norms: bool, paced: bool
    ) -> None:
        self._channel, self._device, self._background, self._norms = channel, device, behind, norms
        self._size, self._has_warned = _SIZE + paced, paced
        # True if the host waits within collectives on this device anyway, so that a check before the work adds no wait.
        self._waits = device.type == "cpu" or channel.group.stages(device)

    def run(self, call: Call, steps: int, work: Callable[[], object]) -> None:
        """Run the collective `work` after all collectives that were started before, and raise the errors of `work`.
        `call` is the name of this worker's call, and `steps` its number of steps.

        Raises RuntimeError if `call` differs between workers, or if the call is the exchange of a round and `steps`
        differs.
        """
        started = self.start(call, steps, work)
        started.wait()
        started.check()

    def start(
        self,
        call: Call,
        steps: int,
        work: Callable[..., object],
        result: Tensor | None = None,
        norm: Tensor | None = None,
        compressor: Compressor | None = None,
        frozen: Sequence[str] = (),
        *,
        may_be_late: bool = False,
        nanoseconds: int = 0,
    ) -> PendingCall:
        """Start the collective `work`, in the background if there is a background thread. Returns the pending call,
        which the caller waits for and then checks. `result` is the tensor that `work` computes, or None.

        The methods `wait` and `check` of the returned call raise the errors that `run` would raise. `check` returns
        True if all workers have the same `frozen` parameters. With `may_be_late`, on a GPU over NCCL, the workers'
        calls are compared only in `check`, so that the host does not wait for the GPU in `start`. If a `compressor` is
        given, the calls are always compared before `work`.

        `norm`, float32[1], the norm of this worker's update, is gathered together with the workers' calls. Then `work`
        is called with all workers' norms, float32[W].
        """
        is_late = may_be_late and compressor is None and not self._waits
        unchecked: list[Readback] = []
        agreed, times = [True], list[int]()

        def checked() -> None:
            if self._channel.group.size == 1:
                work(*([] if norm is None else [norm]))
                return
            hashed = 0 if compressor is None else hash_of(as_text(identify(compressor)))
            same = hash_of(as_text({"frozen": frozen}))
            mine = Header(_CALLS.index(call), steps, hashed, same, nanoseconds)
            headers, norms = self._gather(mine, norm)
            # If the headers are compared after `work`, start to copy them to the host before it, so that the copy
            # completes even if the workers' calls do not match and `work` hangs.
            if is_late:
                unchecked.append(Readback(headers))
            else:
                agreed.append(self._check(headers.tolist(), compressor, times))
            work(*norms)  # called without arguments if `norm` is None

        promise = None if self._background is None else self._background.promise()
        if self._background is None or promise is None:
            checked()
        else:
            # The result of the Future must be on the device, since a Future of a CPU tensor has no CUDA event on which
            # the current stream could wait.
            done = torch.zeros(0, device=self._device) if result is None else result
            self._background.submit(checked, [(promise, done)])

        def check() -> bool:
            while unchecked:
                agreed.append(self._check(unchecked.pop().tolist(), compressor, times))
            return all(agreed)

        return (
            PendingCall(check=check, times=times) if promise is None else PendingCall(promise.future.wait, check, times)
        )

    def _gather(self, header: Header, norm: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Gather the workers' headers, i.e. their calls and numbers of steps (see `Header`); collective. Returns the
        headers, int64[W, 4], or int64[W, 5] if they include the time of a step, and a list. The list has the workers'
        norms, float32[W], or is empty if `norm` is None."""
        call, steps = _CALLS[header.call], header.steps
        mine = {"header": header.packed(self._device, self._size)}
        if self._norms:
            mine["norm"] = torch.zeros(1, device=self._device) if norm is None else norm
        self._channel.step = max(self._channel.step, steps - 1)
        try:
            gathered = self._channel.gather(mine, fixed_size=True, purpose="guard")
        except PeerLostError as error:
            rank = self._channel.group.rank
            advice = _LOST.format(rank=rank, advice=_ADVICE)
            raise PeerLostError(f"{error}. It was when worker {rank} {call} after step {steps}. {advice}") from error
        headers = torch.stack([parts["header"] for parts in gathered])
        return headers, [] if norm is None else [torch.cat([parts["norm"] for parts in gathered])]

    def _check(self, headers: list[list[int]], compressor: Compressor | None, times: list[int]) -> bool:
        """Compare the workers' `headers`, i.e. their calls and numbers of steps (see `Header`), and append each
        worker's time of an inner step to `times`. `compressor` is this worker's compressor, for the error message.
        Returns True if all workers have the same frozen parameters. Raises RuntimeError as `run` does.

        In a call other than an exchange, such as `flush`, workers may have made different numbers of steps; rank 0 then
        logs a warning.
        """
        # Find the first worker whose call differs from worker 0's. If there is none, find the first whose number of
        # steps differs, and otherwise the first whose compressor differs.
        first, *_ = rows = [Header(*row) for row in headers]
        times += [row.nanoseconds for row in rows]
        agreed = len({row.frozen for row in rows}) == 1
        compared = ("call", "steps", "compressor")
        unlike = [i for key in compared for i, row in enumerate(rows) if getattr(row, key) != getattr(first, key)]
        if not unlike:
            return agreed
        other = rows[unlike[0]]
        call, their_call = _CALLS[first.call], _CALLS[other.call]
        found = (
            f"worker 0 {call} after step {first.steps}, and worker {unlike[0]} {their_call} after step {other.steps}"
        )
        if call != their_call or (call == "exchanges a round" and first.steps != other.steps):
            raise RuntimeError(
                f"{found}: all workers must make the same calls after the same number of optimizer steps. If their "
                f"data have different lengths, {_ADVICE}; pass scaler= if a GradScaler skips steps"
            )
        if first.compressor != other.compressor:
            assert compressor is not None
            raise RuntimeError(
                f"workers 0 and {unlike[0]} have different compressors in the exchange after step {first.steps}, on "
                f"worker {self._channel.group.rank} {describe(compressor)}: a schedule must depend on the round alone"
            )
        # If only the steps differ, the collectives still match, so no worker hangs.
        if self._channel.group.rank == 0 and not self._has_warned:
            self._has_warned = True
            _log.warning("%s: their numbers of rounds are equal, but not those of optimizer steps", found)
        return agreed
