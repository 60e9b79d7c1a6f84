"""Can any input make packsaddle raise anything except its one-line error? Prints the number of inputs per outcome.

python -m lab.bench.fuzz [--examples 10000] [--seed 0] [--only "run folders"]
"""

import argparse
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))
from fuzzing import TARGETS, outcome


def main() -> None:
    """Test the inputs of each kind; the first failure is minimized and printed, and the exit code is 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000, help="in all, shared between the kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS)
    given_ = parser.parse_args()
    chosen = [given_.only] if given_.only else list(TARGETS)
    warnings.simplefilter("ignore")
    failed = False
    print(f"seed {given_.seed}")
    for name in chosen:
        begin = time.perf_counter()
        counts, problem = fuzz(name, -(-given_.examples // len(chosen)), given_.seed)
        print(f"{name}: {dict(counts)}, {time.perf_counter() - begin:.0f} s", flush=True)
        if problem is not None:
            failed = True
            traceback.print_exception(problem, limit=-3)
    sys.exit(failed)


def fuzz(name: str, examples: int, number: int) -> tuple[Counter[str], Exception | None]:
    """Return the number of inputs per outcome, and the exception of the smallest failing input, if any."""
    inputs, read = TARGETS[name]
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:

        @seed(number)
        @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(inputs)
        def one(value: Any) -> None:
            counts[outcome(read, value, Path(folder))] += 1

        try:
            one()
        except Exception as error:  # any exception is a finding
            return counts, error
    return counts, None


if __name__ == "__main__":
    main()
