"""One host of a race: `python -m lab.race.host RACE OUTCOME` (JSON files), run by torchrun."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from lab.race.race import Race, in_process_group
from packsaddle.options import build


def main(race: str, outcome: str) -> None:
    """Read the race, run it, and, as rank 0, write its outcome."""
    found = in_process_group(build(Race, json.loads(Path(race).read_text())))
    if os.environ["RANK"] == "0":
        Path(outcome).write_text(json.dumps(asdict(found)))


if __name__ == "__main__":
    main(*sys.argv[1:])
