"""How long does each optimizer stay at a saddle, and does the time grow with the dimension?

python -m lab.saddles run            # continues with the missing runs
python -m lab.saddles certify        # seed 0 at each method's rate: at the saddle, on the way, at the end
python -m lab.saddles table
python -m lab.saddles figure

The same for two networks, `plateau` (the MNIST autoencoder, which needs --data-dir) and `symmetric` (a transformer of
equal copies), as in `python -m lab.saddles run symmetric`; table and figure show both.
"""

import argparse
from pathlib import Path

import torch

from lab.saddles import network_report, network_runs
from lab.saddles.methods import NETWORK_METHODS
from lab.saddles.plateau import Plateau
from lab.saddles.report import certificates, draw, table
from lab.saddles.search import Rows, cells, measure
from lab.saddles.symmetric import Symmetric

OUT = Path("experiments/saddles/rows.csv")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "certify", "table", "figure"))
    parser.add_argument("network", nargs="?", choices=("plateau", "symmetric"), help="by default the known saddle")
    parser.add_argument("--out", type=Path, default=OUT, help="the file of rows; those of networks are in its folder")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="the folder of MNIST")
    parser.add_argument("--methods", nargs="+", choices=list(NETWORK_METHODS), default=list(NETWORK_METHODS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.network:
        _network(options)
        return
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


def _network(options: argparse.Namespace) -> None:
    """Run a command for a network."""
    folder, name = options.out.parent, options.network
    if options.command == "table":
        print(network_report.table(folder))
        return
    if options.command == "figure":
        network_report.draw(folder)
        return
    network = Plateau(options.data_dir) if name == "plateau" else Symmetric()
    rows = network_runs.Rows(network, folder / f"{name}.csv")
    if options.command == "certify":
        network_report.certificates(rows, folder / f"{name}_certificates.csv")
    else:
        network_runs.measure(rows, options.methods)


if __name__ == "__main__":
    main()
