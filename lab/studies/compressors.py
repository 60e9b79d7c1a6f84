"""Print the loss of runs at equal epochs and at equal bytes of messages, as a Markdown table and a CSV file.

python -m lab.studies.compressors RUNS_FOLDER table.csv
"""

import csv
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from lab.runs import Run, read_runs
from lab.runs.report import plateau

EPOCHS = (5, 10)
MEGABYTES = (10, 25, 100)


def value_at(run: Run, quantity: str, x: float) -> float | None:
    """Return the loss where `quantity` reaches x, interpolated between lines of metrics; None if it never does."""
    for before, after in pairwise(run.metrics):
        if before[quantity] <= x <= after[quantity]:
            share = (x - before[quantity]) / (after[quantity] - before[quantity])
            return float(before["loss"] + share * (after["loss"] - before["loss"]))
    return None


def row(run: Run) -> dict[str, Any]:
    """Summarise one run."""
    summary = run.summary or {}
    steps, epochs = run.metrics[-1]["step"], run.metrics[-1]["epoch"]
    return {
        "compressor": run.label,
        **{f"loss after {n} epochs": value_at(run, "epoch", n - 1e-6 if n >= epochs else n) for n in EPOCHS},
        **{f"loss after {n} MB": value_at(run, "payload", n * 1e6) for n in MEGABYTES},
        "epochs on the plateau": plateau(run.metrics, run.config["plateau"])[0],
        "kB a step": run.metrics[-1]["payload"] / steps / 1e3,
        "compression": summary.get("compression"),
    }


def main() -> None:
    """Read run folders, print the table and write it."""
    rows = sorted(map(row, read_runs([Path(sys.argv[1])])), key=lambda r: r["kB a step"])
    with Path(sys.argv[2]).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print("| " + " | ".join(rows[0]) + " |\n|" + " --- |" * len(rows[0]))
    for r in rows:
        print(
            "| " + " | ".join("-" if v is None else v if isinstance(v, str) else f"{v:.4g}" for v in r.values()) + " |"
        )


if __name__ == "__main__":
    main()
