"""Golden trajectories: hashes of the parameters, error memories and bytes of many runs, on every front.

A change that should not change any number is tried with it, on one machine:

    python tests/support/golden.py --out before.json      # before
    python tests/support/golden.py --compare before.json  # after; prints the runs that differ and exits with 1
    python tests/support/golden.py --compare before.json --only "local"  # those of a name alone

The runs are those of tests/feedback/engine: each way of each front on two workers, every compressor on each front, and
local updates with options at random. Hashes are not committed: they depend on the machine.
"""

import argparse
import hashlib
import io
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from fronts import FRONTS, made
from gloo import run_in_processes
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

import packsaddle
from packsaddle import simulate
from packsaddle.comm import resolve
from packsaddle.compressors import compressors, describe

sys.path.insert(0, str(Path(__file__).parents[1] / "feedback" / "engine"))
import test_random_local_updates as at_random  # type: ignore[import-not-found]
from test_resumed_runs import END, WAYS  # type: ignore[import-not-found]


def ways(front: str) -> dict[str, dict[str, Any]]:
    """Return the options of a front's runs, by name."""
    own = {describe(c): {"compressor": c, "noise": 0.01, "seed": 3} for c in compressors(0.05)}
    formats = {str(dtype): {"dtype": dtype} for dtype in (torch.float32, torch.bfloat16)}
    return {**WAYS.get(front, {}), **own, **formats, "two-way": {"exchange": "two-way"}}


def digest(value: Any) -> str:
    file = io.BytesIO()
    torch.save(tree_map_only(DTensor, DTensor.to_local, value), file)
    return hashlib.sha256(file.getvalue()).hexdigest()[:16]


def trained(front: str, only: str) -> dict[str, str]:
    """Run a front on this worker, in each of its ways that match."""
    found = {}
    for way, options in ways(front).items():
        if re.search(only, f"{front}, {way}"):
            try:
                training = made(front, **options)
            except ValueError as error:  # the front refuses the compressor
                found[f"{front}, {way}"] = str(error)
                continue
            for t in range(END):
                # One invalid step, by the numbers of worker 0.
                training.step(t, float("nan") if t == 5 and resolve(None).rank == 0 else None)
            found[f"{front}, {way}"] = digest(training.outcome())
    return found


def golden(only: str = "") -> dict[str, str]:
    """Return the hash of each worker's run, by name; only those that the expression matches."""
    found: dict[str, str] = {}
    for front, made_by in FRONTS.items():
        if made_by.processes:
            with tempfile.TemporaryDirectory() as folder:
                workers = run_in_processes(trained, 2, Path(folder), front, only, timeout=3600)
        else:
            workers = simulate(lambda _: trained(front, only), 2)  # noqa: B023
        found |= {f"{name}, worker {i}": value for i, runs in enumerate(workers) for name, value in runs.items()}
    packsaddle.local.schedule.time = at_random.CLOCK  # type: ignore[attr-defined]
    for number in range(at_random.SETTINGS):
        if re.search(only, f"local, setting {number}"):
            case = at_random.drawn(number)
            traces = simulate(lambda rank: at_random.train(case, rank), case.workers)  # noqa: B023
            found[f"local, setting {number}"] = digest([[*trace.rows, trace.error, trace.resets] for trace in traces])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--only", default="", metavar="REGEX", help="do the runs that it matches")
    options = parser.parse_args()
    found = golden(options.only)
    print(f"{len(found)} trajectories")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    if options.compare:
        before = json.loads(options.compare.read_text())
        unlike = [
            name
            for name, value in before.items()
            if value != found.get(name) and (name in found or re.search(options.only, name))
        ]
        print("\n".join(unlike) or "all equal")
        sys.exit(bool(unlike))


if __name__ == "__main__":
    main()
