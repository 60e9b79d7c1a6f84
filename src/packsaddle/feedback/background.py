"""Execution of exchanges in the background of training: in a thread, in a separate stream of the device, or both."""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.futures import Future

from packsaddle.numerics.devices import new_stream

_PATIENCE = 1.0  # seconds for which the interpreter, when it exits, waits for a running background thread to end


@dataclass(frozen=True)
class Promise:
    """A tensor that is computed in the background.

    The code that computes the tensor completes `source`, and the code that uses it waits for `future`.
    """

    source: Future[Tensor]
    future: Future[Tensor]


Results = Sequence[tuple[Promise, Tensor]]


class Background:
    """Runs functions one at a time in the background. All workers must submit their functions in the same order, since
    the functions start collectives.

    On a device with streams, the functions run in a separate stream, after the work that the current stream has queued
    when `submit` is called. They run in a separate thread if they make the host wait. That is the case on a CPU, on MPS
    (which has only one queue), and if `blocks` is True. Set `blocks` for a process group whose collectives copy tensors
    to the host (see `Group.stages`).
    """

    def __init__(self, device: torch.device, *, blocks: bool = False) -> None:
        self._device = device
        self._stream = new_stream(device)
        self._has_thread = blocks or self._stream is None
        self._waiting: deque[tuple[Callable[[], object], Results, torch.Event | None]] = deque()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []  # the thread that was started last; empty: none was started yet
        self._busy = False
        # `_join` runs when this object is garbage-collected, and at interpreter exit.
        weakref.finalize(self, _join, self._threads)

    def promise(self) -> Promise:
        """Return a new promise of a tensor that is computed in the background.

        Every stream of the device may wait for the promise's `future`.
        """
        source: Future[Tensor] = Future(devices=None if self._stream is None else [self._device])
        # DDP reads the value of a future without a check for an error, so the future that DDP gets raises the error
        # itself.
        return Promise(source, source.then(lambda done: done.value()))

    def submit(self, work: Callable[[], object], results: Results) -> None:
        """Run `work` in the background.

        `results` has pairs (promise, tensor). When `work` has returned, each promise is completed with its tensor. If
        `work` raises an exception, each promise is completed with the exception.

        Raises ValueError for a tensor whose device type differs from that of this object, since a Future could not make
        its consumers wait for that tensor.
        """
        for _, result in results:
            if result.device.type != self._device.type:
                raise ValueError(f"results must be on {self._device}, and one is on {result.device}")
        # A Future does not accept tensors on MPS. Consumers need not wait there, since one queue runs all work in
        # order, so the promise is completed with an empty tensor.
        if self._stream is None:
            results = [(p, r if r.device.type == "cpu" else torch.empty(0)) for p, r in results]
        ready = None if self._stream is None else torch.accelerator.current_stream(self._device).record_event()
        if not self._has_thread:
            self._run(work, results, ready)
            return
        with self._lock:
            self._waiting.append((work, results, ready))
            if self._busy:
                return
            self._busy = True
        # The thread ends when no function is waiting. It is a daemon thread: if another worker has died, a collective
        # may never return, and must not keep this process from exiting with its error.
        self._threads[:] = [threading.Thread(target=self._work, name="packsaddle", daemon=True)]
        self._threads[0].start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._busy = False
                    return
                submitted = self._waiting.popleft()
            self._run(*submitted)

    @torch.no_grad()
    def _run(self, work: Callable[[], object], results: Results, ready: torch.Event | None) -> None:
        """Run `work` after the event `ready`, and then complete the promises in `results`, in the stream in which
        `work` ran.

        If `work` raises an exception, the promises are completed with the exception.
        """
        with nullcontext() if self._stream is None else self._stream:
            if self._stream is not None and ready is not None:
                self._stream.wait_event(ready)
            try:
                work()
            except Exception as error:
                for promise, _ in results:
                    promise.source.set_exception(error)  # type: ignore[arg-type]
            else:
                for promise, result in results:
                    promise.source.set_result(result)


def _join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(_PATIENCE)
