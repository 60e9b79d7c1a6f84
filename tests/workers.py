"""Start gloo worker processes for a test and bring their results, or their errors, back."""

import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_TIMEOUT = 120.0
# Clean children that do not import torch again, whatever threads the test process has by now.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "packsaddle"])


def run_in_processes(
    fn: Callable[..., Any], workers: int, folder: Path, *args: Any, timeout: float = _TIMEOUT
) -> list[Any]:
    """Run fn(*args) in `workers` gloo processes; fn must be importable. Returns the results by rank."""
    queue = _CONTEXT.Queue()
    processes = [
        _CONTEXT.Process(target=_worker, args=(fn, rank, workers, str(folder / "store"), queue, args))
        for rank in range(workers)
    ]
    for process in processes:
        process.start()
    try:
        outcomes = [queue.get(timeout=timeout) for _ in processes]
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    for _, _, error in outcomes:
        if error:
            raise AssertionError(f"a worker failed:\n{error}")
    return [pickle.loads(result) for _, result, _ in sorted(outcomes, key=lambda outcome: outcome[0])]


def _worker(fn: Callable[..., Any], rank: int, workers: int, store: str, queue: Any, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers)
        result = fn(*args)
        dist.barrier()
        dist.destroy_process_group()
        # As bytes: torch would share tensors through a worker that is about to exit.
        queue.put((rank, pickle.dumps(result), ""))
    except BaseException:
        queue.put((rank, b"", traceback.format_exc()))
