"""The thread or stream in which exchanges are carried out during training."""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.futures import Future

_PATIENCE = 1.0  # seconds that the interpreter's end waits for a thread that is about to end


@dataclass(frozen=True)
class Promise:
    """A tensor to come; `future` is for whoever waits for it."""

    source: Future[Tensor]
    future: Future[Tensor]


Results = Sequence[tuple[Promise, Tensor]]


class Background:
    """Runs functions one after the other: on a CPU in a thread of its own, on a GPU in a stream of its own.

    One after the other, since workers must start their collectives in one order. On a GPU the host does not wait for
    collectives, so a stream is enough to let them overlap with what computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = None if device.type == "cpu" else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._waiting: deque[tuple[Callable[[], object], Results]] = deque()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []  # the last one
        self._busy = False
        weakref.finalize(self, _join, self._threads)  # also at the interpreter's end

    def promise(self) -> Promise:
        """Return a tensor to come, which may be waited for in any stream."""
        source: Future[Tensor] = Future(devices=None if self._stream is None else [self._device])
        # DDP reads a future's value without looking for an error; what `then` returns has it as its own.
        return Promise(source, source.then(lambda done: done.value()))

    def submit(self, work: Callable[[], object], results: Results) -> None:
        """Run `work`, after which the promises have their results; an error in it becomes theirs."""
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
        # It ends when nothing waits, so none is there when the interpreter ends; and if another worker is gone and a
        # collective does not return, it does not keep this process, which has an error to report, from ending.
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
