"""Can any message make a compressor read outside it, hang, or decode to anything but a vector? Prints counts.

    python -m lab.bench.fuzz_messages counts.json [--messages 10000000] [--seed 0]
    NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=/tmp/checked python -m lab.bench.fuzz_messages checked.json

Each message of each compressor is mutated in one of ten ways, and either decodes to a vector that is finite if the
numbers in the message are, or raises MessageError. Anything else is printed and ends the run with code 1. The file
counts the outcomes; with it an interrupted run continues. A batch that takes over ten minutes ends the process with
a traceback.
"""

import argparse
import csv
import faulthandler
import json
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))
from corruption import SETTINGS
from mutations import KINDS, Parts, as_bytes, mutate, outcome

from packsaddle import Compressor
from packsaddle.compressors import SharedTopK, SketchTopK, describe

LENGTHS = (10, 17, 33, 64, 100, 100, 257, 257, 300, 1300, 3000)
_BATCH, _BATCH_OF_SLOW = 2000, 200  # messages; sketches take ten times as long to decode
_EVERY = 16  # messages per thorough check
_LONGEST = 600.0  # seconds of a batch
_WITHOUT_K = [c for c in SETTINGS if not getattr(c, "k", None)]  # of any length


def vectors(d: int, rng: torch.Generator) -> list[torch.Tensor]:
    """Return vectors of different supports: Gaussian, a few coordinates, one bucket, large ratios, zeros."""
    gaussian = torch.randn(d, generator=rng)
    sparse = gaussian * (torch.rand(d, generator=rng) < 0.03)
    bucket = gaussian * (torch.arange(d) < min(64, d // 2))
    return [gaussian, sparse, bucket, gaussian * gaussian.abs().exp2() ** 8, torch.zeros(d)]


def messages(compressor: Compressor, d: int, rng: torch.Generator) -> list[Parts]:
    return [as_bytes(compressor.encode(v, seed=1, step=2)) for v in vectors(d, rng)]


def batch(number: int, seed: int) -> tuple[str, Counter[str]]:
    """Return the compressor of a batch, and its number of messages by "kind, outcome". Raises the first failure."""
    compressor, rng = SETTINGS[number % len(SETTINGS)], random.Random(f"{seed} {number}")
    torch_rng = torch.Generator().manual_seed(rng.getrandbits(60))
    d = rng.choice([n for n in LENGTHS if n >= (getattr(compressor, "k", None) or 1)])
    made = messages(compressor, d, torch_rng)
    others = {
        "another vector": made,
        "another d": messages(compressor, rng.choice([n for n in LENGTHS if n > 64 and n != d]), torch_rng),
        "another compressor": [m for c in rng.sample(_WITHOUT_K, 3) for m in messages(c, d, torch_rng)],
    }
    counts: Counter[str] = Counter()
    out = torch.zeros(d)
    slow = isinstance(compressor, SharedTopK | SketchTopK)
    for i in range(_BATCH_OF_SLOW if slow else _BATCH):
        kind = KINDS[i % len(KINDS)]
        base = rng.choice(made)
        # One in four is mutated twice.
        if rng.randrange(4) == 0:
            base = mutate(base, rng.choice(KINDS[:7]), others, rng)
        parts = mutate(base, kind, others, rng)
        try:
            counts[f"{kind}, {outcome(compressor, parts, out, thorough=i % _EVERY == 0)}"] += 1
        except Exception as error:
            error.add_note(f"batch {number}, message {i}: {kind} of {compressor!r}, d = {d}: {parts}")
            raise
    return describe(compressor), counts


def load(path: Path, seed: int) -> dict[str, Any]:
    """Return the state of a run, new if there is no file. Raises ValueError if it is of another seed."""
    if not path.exists():
        return {"seed": seed, "batches": 0, "messages": 0, "seconds": 0.0, "failures": 0, "counts": {}}
    state: dict[str, Any] = json.loads(path.read_text())
    if state["seed"] != seed:
        raise ValueError(f"seed must be {state['seed']}, as in {path}, got {seed}")
    return state


def save(path: Path, state: dict[str, Any]) -> None:
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(state, indent=1))
    scratch.replace(path)


def write_table(state: dict[str, Any], path: Path) -> None:
    """Write the counts as rows of the compressor's class, kind, and one column for each outcome."""
    columns = ("refused", "finite", "not finite")
    classes: dict[str, Counter[str]] = {}
    for compressor, counts in state["counts"].items():
        classes.setdefault(compressor.partition("(")[0], Counter()).update(counts)
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("compressor", "mutation", *columns))
        for name, counts in sorted(classes.items()):
            for kind in KINDS:
                table.writerow((name, kind, *(counts[f"{kind}, {column}"] for column in columns)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("state", type=Path, help="file of the counts, JSON")
    parser.add_argument("--messages", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="also write the counts here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    state, saved = load(given.state, given.seed), time.monotonic()
    while state["messages"] < given.messages:
        begin = time.monotonic()
        faulthandler.dump_traceback_later(_LONGEST, exit=True)
        try:
            name, counts = batch(state["batches"], given.seed)
        except Exception as error:
            traceback.print_exception(error, limit=-4)
            state["failures"] += 1
            name, counts = "failed", Counter()
        state["batches"] += 1
        state["messages"] += counts.total()
        state["counts"][name] = dict(Counter(state["counts"].get(name, {})) + counts)
        state["seconds"] += time.monotonic() - begin
        if time.monotonic() - saved > 20 or state["messages"] >= given.messages:
            save(given.state, state)
            saved = time.monotonic()
    if given.csv:
        write_table(state, given.csv)
    print({name: value for name, value in state.items() if name != "counts"})
    sys.exit(state["failures"] > 0)


if __name__ == "__main__":
    main()
