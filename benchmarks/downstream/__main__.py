"""Do local updates end in models that fine-tune worse than densely trained ones of equal pretraining loss?

python -m benchmarks.downstream run             # continues with the missing runs
python -m benchmarks.downstream table
python -m benchmarks.downstream figure
"""

import argparse
from pathlib import Path

import torch

from benchmarks.downstream.curvature import measure
from benchmarks.downstream.finetune import COMMON, RATES, Tuned, best_rate, finetune
from benchmarks.downstream.pretrain import Run, pretrain
from benchmarks.downstream.report import draw, tables
from benchmarks.rows_file import read_rows

SEEDS = range(3)
EQUAL = (("dense", 512), ("Sign", 592), ("DiLoCo", 1024))  # method and steps, for about the same loss
OTHERS = (Run("dense", 1000, 0), *(Run("dense", 400, seed) for seed in SEEDS))  # for the line


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table", "figure"))
    parser.add_argument("--out", type=Path, default=Path("experiments/downstream"), help="folder of the rows")
    parser.add_argument("--weights", type=Path, default=Path("/tmp/downstream"), help="folder of pretrained weights")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.command == "table":
        print(tables(options.out))
    elif options.command == "figure":
        draw(options.out, options.out / "figure.png")
    else:
        runs = [Run(method, steps, seed) for seed in SEEDS for method, steps in EQUAL]
        for run in (*runs, *OTHERS):
            make(run, options.out, options.weights)
        for run in runs:
            measure(run, options.out / "curvature.csv", options.weights)


def make(run: Run, out: Path, weights: Path) -> None:
    """Pretrain a model and fine-tune it: seed 0 at every rate, others at its best. Rate 0: before fine-tuning."""
    rows = out / "finetuning.csv"
    pretrain(run, out / "pretraining.csv", weights)
    rates = RATES
    if run.seed:
        best = best_rate(read_rows(rows, Tuned.of_row, "fine-tuning"), run.method, run.steps)
        rates = tuple({COMMON, best})
    for rate in (0.0, *rates):
        finetune(run, "adamw", rate, rows, weights)


if __name__ == "__main__":
    main()
