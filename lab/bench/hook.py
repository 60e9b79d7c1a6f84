"""The cost of the hook: a backward pass of d parameters behind DistributedDataParallel, with and without it.

python -m lab.bench.hook [--d 25000000] [--layers 50] [--workers 1 2]

The network is linear in its parameters, so its backward pass only writes gradients, and the time is that of exchange
and hook. gloo processes on this machine, one thread each. The floor is the memory traffic of error feedback: 7 reads or
writes of gradient, memory and corrected vector, at the bandwidth of a copy.
"""

import argparse
import socket
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import packsaddle
from lab.bench.bandwidth import copy_bandwidth
from packsaddle.plan import side_by_side

_PASSES = 7


class Sum(nn.Module):
    """The product of parameters with fixed Gaussian numbers, which are their gradients."""

    def __init__(self, d: int, layers: int) -> None:
        super().__init__()
        side = int((d / layers) ** 0.5)
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(side, side)) for _ in range(layers)])
        self.gradients = [torch.randn(side, side) for _ in range(layers)]

    def forward(self) -> torch.Tensor:
        return torch.stack([(w * g).sum() for w, g in zip(self.weights, self.gradients, strict=True)]).sum()


def main() -> None:
    """Print a table for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=25_000_000)
    parser.add_argument("--layers", type=int, default=50)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    for workers in arguments.workers:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        mp.spawn(_worker, (workers, port, arguments.d, arguments.layers), workers)  # type: ignore[no-untyped-call]


def _worker(rank: int, workers: int, port: int, d: int, layers: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=workers)
    ways: dict[str, Callable[[DistributedDataParallel], object]] = {"DDP": lambda model: None}
    for compressor in (packsaddle.RandomK(0.01), packsaddle.TopK(0.01), packsaddle.TopK(0.1)):
        for scope in ("bucket", "model"):
            ways[f"{compressor!r:.14}, {scope}"] = lambda model, c=compressor, s=scope: packsaddle.register_ddp_hook(  # type: ignore[misc]
                model, c, scope=s
            )
    works = {}
    for name, register in ways.items():
        model = DistributedDataParallel(Sum(d, layers))
        register(model)

        def step(model: DistributedDataParallel = model) -> None:
            model.zero_grad()
            model().backward()

        for _ in range(3):  # DDP rebuilds its buckets
            step()
        works[name] = step
    times = side_by_side(works)
    floor = _PASSES * 4 * d / copy_bandwidth(d)
    if rank == 0:
        print(f"{workers} workers; floor {1e3 * floor:.0f} ms")
        for name, timing in times.items():
            more = timing.median - times["DDP"].median
            print(f"  {name}: {1e3 * timing.median:.0f} ms, {1e3 * more:+.0f} over DDP, {more / floor:.1f} floors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
