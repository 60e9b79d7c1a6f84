"""The cost of local updates on one thread: a round relative to a copy of the vector, and the overhead of other steps.

    python -m lab.bench.local_round [--d 25000000] [--pairs 5] [--threads 1]

A round (compressor TopK 1/32 with values of 2 bits, one worker, so no network) and a copy of float32[d] are timed
alternately, and so are steps of AdamW with and without local updates. Prints medians and ranges of the ratios.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import packsaddle


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratios(ours: Callable[[], object], theirs: Callable[[], object], pairs: int) -> list[float]:
    """Return ratios of times, ours over theirs, measured alternately; a first pair is discarded."""
    found = [seconds(ours) / seconds(theirs) for _ in range(pairs + 1)]
    return found[1:]


def parameters(d: int) -> list[torch.nn.Parameter]:
    """Return matrices and vectors as in a transformer, d coordinates in total."""
    width = 1024
    made = [torch.nn.Parameter(torch.randn(width, width)) for _ in range(d // width**2)]
    return [*made, torch.nn.Parameter(torch.randn(width))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=25_000_000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    compressor = packsaddle.TopK(1 / 32, values="int2")

    def show(name: str, found: list[float]) -> None:
        print(f"{name}: {statistics.median(found):.2f} [{min(found):.2f}, {max(found):.2f}], {len(found)} pairs")

    for name, options in {
        "a round": {},
        "a round, from the anchor": {"keep_unsent": False},
        "a round, outer Nesterov": {"outer": packsaddle.OuterSGD()},
    }.items():
        ps = parameters(args.d)
        optimizer = torch.optim.SGD(ps, lr=1e-3)
        local = packsaddle.LocalUpdates(optimizer, every=1, compressor=compressor, **options)  # type: ignore[arg-type]
        here, there = torch.randn(args.d), torch.empty(args.d)
        for p in ps:
            p.grad = torch.randn_like(p)

        def move(ps: list[torch.nn.Parameter] = ps) -> None:
            with torch.no_grad():
                for p in ps:
                    p.sub_(p.grad, alpha=1e-3)  # type: ignore[arg-type]

        found = []
        for _ in range(args.pairs + 1):
            move()
            found.append(
                seconds(local._attempted) / statistics.median(seconds(lambda: there.copy_(here)) for _ in range(3))  # noqa: B023
            )
        show(f"{name}, in copies of the vector", found[1:])
    ps, others = parameters(args.d), parameters(args.d)
    ours, plain = torch.optim.AdamW(ps), torch.optim.AdamW(others)
    packsaddle.LocalUpdates(ours, every=10**6, compressor=compressor)
    for p in (*ps, *others):
        p.grad = torch.randn_like(p)
    show("a step of AdamW between rounds, over one without", ratios(ours.step, plain.step, 3 * args.pairs))


if __name__ == "__main__":
    main()
