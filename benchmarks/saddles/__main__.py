"""How long does each optimizer stay at a saddle, and does the time grow with the dimension?

python -m benchmarks.saddles run            # continues with the missing runs
python -m benchmarks.saddles certify        # seed 0 at each method's rate: at the saddle, on the way, at the end
python -m benchmarks.saddles table
python -m benchmarks.saddles figure
"""

import argparse
from pathlib import Path

import torch

from benchmarks.saddles.report import certificates, draw, table
from benchmarks.saddles.search import Rows, cells, measure

OUT = Path("experiments/saddles/rows.csv")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "certify", "table", "figure"))
    parser.add_argument("--out", type=Path, default=OUT, help="the file of rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows(options.out)
    if options.command == "certify":
        certificates(rows, options.out.with_name("certificates.csv"))
    elif options.command == "table":
        print(table(rows))
    elif options.command == "figure":
        draw(rows, options.out.with_name("figure.png"))
    else:
        for cell in cells():
            measure(rows, cell)


if __name__ == "__main__":
    main()
