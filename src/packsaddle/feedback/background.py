"""The thread or CUDA stream in which exchanges run during training."""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.futures import Future

_PATIENCE = 1.0  # seconds to wait at interpreter exit for a thread that is about to end


@dataclass(frozen=True)
class Promise:
    """A tensor computed in the background: its producer completes `source`, its consumers wait for `future`."""

    source: Future[Tensor]
    future: Future[Tensor]


Results = Sequence[tuple[Promise, Tensor]]


class Background:
    """Runs functions one at a time in the background, since all workers must start their collectives in the same order.
    On a CPU they run in a thread, on a GPU in a stream, whose collectives do not block the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = None if device.type == "cpu" else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._waiting: deque[tuple[Callable[[], object], Results]] = deque()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []  # the last thread started; empty on a GPU
        self._busy = False
        weakref.finalize(self, _join, self._threads)  # also at interpreter exit

    def promise(self) -> Promise:
        """Return a new promise. Any CUDA stream may wait for its `future`."""
        source: Future[Tensor] = Future(devices=None if self._stream is None else [self._device])
        # DDP reads a future's value without checking for an error, so the future that it gets raises the error itself.
        return Promise(source, source.then(lambda done: done.value()))

    def submit(self, work: Callable[[], object], results: Results) -> None:
        """Run `work` in the background, then complete each promise with its tensor, or with the exception of `work`.
        Raises ValueError for a tensor on another device, since a Future records no event of it to wait for."""
        for _, result in results:
            if result.device.type != self._device.type:
                raise ValueError(f"results must be on {self._device}, and one is on {result.device}")
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                _run(work, results)
            return
        with self._lock:
            self._waiting.append((work, results))
            if self._busy:
                return
            self._busy = True
        # The thread ends when the queue is empty. It is a daemon: if another worker is gone, a collective may never
        # return, and must not keep this process from exiting with its error.
        self._threads[:] = [threading.Thread(target=self._work, name="packsaddle", daemon=True)]
        self._threads[0].start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._busy = False
                    return
                work, results = self._waiting.popleft()
            _run(work, results)


def _join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(_PATIENCE)


@torch.no_grad()
def _run(work: Callable[[], object], results: Results) -> None:
    try:
        work()
    except Exception as error:
        for promise, _ in results:
            promise.source.set_exception(error)  # type: ignore[arg-type]
    else:
        for promise, result in results:
            promise.source.set_result(result)
