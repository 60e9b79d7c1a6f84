"""The command line of a study whose finished runs are rows of a file: `run` makes the missing ones, `tables` reads."""

import argparse
from collections.abc import Callable
from pathlib import Path


def main(description: str | None, run: Callable[[Path], object], tables: Callable[[Path], object]) -> None:
    """Parse the command line, and call `run` or `tables` with the path of rows.csv in the folder --out."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("command", choices=("run", "tables"))
    parser.add_argument("--out", type=Path, required=True, help="folder of rows.csv")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    (run if options.command == "run" else tables)(options.out / "rows.csv")
