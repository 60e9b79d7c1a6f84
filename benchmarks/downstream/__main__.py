"""Do local updates end in models that fine-tune worse than densely trained ones of equal pretraining loss?

python -m benchmarks.downstream run             # continues with the missing runs
python -m benchmarks.downstream table
python -m benchmarks.downstream figure
"""

import argparse
from pathlib import Path

import torch

from benchmarks.downstream.curvature import measure
from benchmarks.downstream.finetune import RATES, finetune
from benchmarks.downstream.pretrain import Run, pretrain

SEEDS = range(3)
PLAN = (("dense", 512), ("Sign", 592), ("DiLoCo", 1024), ("dense", 704), ("dense", 400))  # method, steps


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table", "figure"))
    parser.add_argument("--out", type=Path, default=Path("experiments/downstream"), help="folder of the rows")
    parser.add_argument("--weights", type=Path, default=Path("/tmp/downstream"), help="folder of pretrained weights")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.command == "run":
        for seed in SEEDS:
            for method, steps in PLAN:
                run_all(Run(method, steps, seed), options.out, options.weights)


def run_all(run: Run, out: Path, weights: Path) -> None:
    """Pretrain a model, measure its curvature and fine-tune it at every rate; rate 0 is the model before."""
    pretrain(run, out / "pretraining.csv", weights)
    for rate in (0.0, *RATES):
        finetune(run, "adamw", rate, out / "finetuning.csv", weights)
    measure(run, out / "curvature.csv", weights)


if __name__ == "__main__":
    main()
