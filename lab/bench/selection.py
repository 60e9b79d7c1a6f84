"""The time to select the k largest magnitudes, compared with torch.topk and numpy.partition.

    python -m lab.bench.selection [--d 25000000]

One thread, float32, Gaussian; medians of five, in one run. The floor is one read of the vector at the machine's copy
bandwidth (a copy reads and writes).
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch

from packsaddle.compressors.selection import largest


def milliseconds(work: Callable[[], object]) -> float:
    """Return the median of five calls."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - begin))
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=25_000_000)
    d = parser.parse_args().d
    torch.set_num_threads(1)
    v = torch.randn(d, generator=torch.Generator().manual_seed(0))
    m = v.abs()
    target = torch.empty_like(m)
    floor = milliseconds(lambda: target.copy_(m)) / 2
    print(f"d = {d:,}; floor {floor:.1f} ms")
    print(f"{'k / d':>8}{'largest':>10}{'torch.topk':>12}{'partition':>11}{'x topk':>8}{'x floor':>9}")
    for ratio in (0.001, 0.01, 0.1):
        k = round(ratio * d)
        ours = milliseconds(lambda k=k: largest(v, k))
        topk = milliseconds(lambda k=k: torch.topk(m, k, sorted=False))
        partition = milliseconds(lambda k=k: np.argpartition(m.numpy(), d - k))
        print(f"{ratio:8.1%}{ours:10.0f}{topk:12.0f}{partition:11.0f}{topk / ours:8.1f}{ours / floor:9.1f}")


if __name__ == "__main__":
    main()
