"""The cost of packing and unpacking on a machine that is not idle, and the number of bits sent.

    OMP_NUM_THREADS=1 python -m lab.bench.coding [--d 25000000]

CPU time of one thread, float32, Gaussian; medians of 11 in one run, relative to a copy of the vector.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from packsaddle import QSGD, Compressor, Rounded, Sign, Stages, TopK
from packsaddle.compressors import describe

TENSORS = 54  # of nearly equal length, for compressors of each tensor
COMPRESSORS: list[Compressor] = [
    Rounded(),
    TopK(1 / 2, values="int2"),
    TopK(1 / 64, values="int2"),
    TopK(1 / 64, values="int2", chunk=4096),
    TopK(1 / 32, values="int2", chunk=4096),
    QSGD(),
    QSGD(127),
    QSGD(127, coded=False),
    QSGD(coded=False),
    Sign(),
    Sign(per_tensor=True),
    Stages(Sign()),
]


def milliseconds(work: Callable[[], object]) -> float:
    """Return the median of eleven calls, after one that compiles."""
    times = []
    for _ in range(12):
        begin = time.thread_time()
        work()
        times.append(1000 * (time.thread_time() - begin))
    return median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=25_000_000)
    d = parser.parse_args().d
    torch.set_num_threads(1)
    v = torch.randn(d, generator=torch.Generator().manual_seed(0))
    out = torch.zeros_like(v)
    copy = milliseconds(lambda: out.copy_(v))
    print(f"d = {d:,}; a copy takes {copy:.1f} ms")
    print(f"{'compressor':60}{'pack ms':>9}{'unpack ms':>11}{'/ copy':>8}{'bits':>8}  of each kept coordinate")
    for compressor in COMPRESSORS:
        c = compressor.for_tensors([tensor.shape for tensor in v.tensor_split(TENSORS)])
        message = c.encode(v, seed=0, step=0)
        received = c.receive(message.parts, d, seed=0, step=0)
        pack = milliseconds(lambda c=c: c.encode(v, seed=0, step=0))
        unpack = milliseconds(lambda c=c, m=received: c.add_decoded(m, out, 1e-6))
        kept = c.count(d) if isinstance(c, TopK) else d
        row = f"{describe(compressor):60}{pack:9.1f}{unpack:11.1f}{(pack + unpack) / copy:8.2f}"
        print(f"{row}{8 * message.nbytes / kept:8.3f}")


if __name__ == "__main__":
    main()
