"""Work that goes on beside the backward pass, in the order in which it was submitted."""

import threading
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.futures import Future

Results = Sequence[tuple[Future[Tensor], Tensor]]


class Background:
    """Runs functions one after the other: on a CPU in a thread of its own, on a GPU in a stream of its own.

    One after the other, since workers must start their collectives in one order. On a GPU the host does not wait for
    collectives, so a stream is enough to let them overlap with what computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = None if device.type == "cpu" else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._waiting: deque[tuple[Callable[[], None], Results]] = deque()
        self._lock = threading.Lock()
        self._busy = False

    def future(self) -> Future[Tensor]:
        """Return a future that may be waited for in any stream."""
        return Future(devices=None if self._stream is None else [self._device])

    def submit(self, work: Callable[[], None], results: Results) -> None:
        """Run `work`, after which the futures have their results; an error in it becomes theirs."""
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
        threading.Thread(target=self._work, name="packsaddle", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._busy = False
                    return
                work, results = self._waiting.popleft()
            _run(work, results)


@torch.no_grad()
def _run(work: Callable[[], None], results: Results) -> None:
    try:
        work()
    except Exception as error:
        for future, _ in results:
            future.set_exception(error)  # type: ignore[arg-type]
    else:
        for future, result in results:
            future.set_result(result)
