"""Do local updates end in models that fine-tune worse than densely trained ones of equal pretraining loss?

python -m lab.downstream run             # continues with the missing runs
python -m lab.downstream table
python -m lab.downstream figure
"""

import argparse
from pathlib import Path

import torch

from lab.downstream.curvature import measure
from lab.downstream.finetune import RATES, finetune
from lab.downstream.pretrain import EQUAL, Run, pretrain
from lab.downstream.report import draw, tables

SEEDS = range(3)
OTHERS = (("dense", 400), ("dense", 1000))  # for the line


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
        for run in (Run(*key, seed) for key in (*EQUAL, *OTHERS) for seed in SEEDS):
            make(run, options.out, options.weights)
        for run in (Run(*key, seed) for key in EQUAL for seed in SEEDS):
            measure(run, options.out / "curvature.csv", options.weights)


def make(run: Run, out: Path, weights: Path) -> None:
    """Pretrain a model and fine-tune it at every rate; rate 0 is the model before fine-tuning."""
    pretrain(run, out / "pretraining.csv", weights)
    for rate in (0.0, *RATES):
        finetune(run, "adamw", rate, out / "finetuning.csv", weights)


if __name__ == "__main__":
    main()
