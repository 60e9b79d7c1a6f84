"""Peak memory of coding one vector, beside the vector: one process per compressor.

python -m lab.studies.scale.memory OUT.csv
"""

import csv
import multiprocessing
import resource
import sys

import torch

from packsaddle.compressors import Compressor, compressors, describe

D = 1 << 25


def peak() -> int:
    """Bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(compressor: Compressor) -> dict[str, str]:
    """Encode and decode once; what the first call costs anyway (code, pools) is paid on a short vector before."""
    torch.set_num_threads(1)
    short = torch.randn(1 << 21, generator=torch.Generator().manual_seed(0))
    compressor.restrict(0, len(short), D)(short)
    v, out = torch.randn(D, generator=torch.Generator().manual_seed(0)), torch.zeros(D)
    out.fill_(1.0)
    before = peak()
    message = compressor.encode(v, seed=0, step=0)
    encoded = peak()
    compressor.add_decoded(compressor.receive(message.parts, D, seed=0, step=0), out)
    per_coordinate = [f"{(now - before) / D:.1f}" for now in (encoded, peak())]
    columns = ("encode, bytes a coordinate", "and decode")
    return {"compressor": describe(compressor), **dict(zip(columns, per_coordinate, strict=True))}


def main() -> None:
    context = multiprocessing.get_context("spawn")
    rows = []
    for compressor in compressors(0.01):
        with context.Pool(1) as pool:
            rows.append(pool.apply(measure, (compressor,)))
    with open(sys.argv[1], "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
