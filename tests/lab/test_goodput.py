"""The simulation of many workers against a closed form, and its card against its rows."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from lab.bench import goodput
from packsaddle.plan import Link

CARD = Path(goodput.__file__).parents[2] / "experiments" / "goodput"


def test_without_failures_it_is_the_time_of_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two workers one has half the speed: they make 64 or 48 steps in the time of 64 or 32 and the exchange."""
    monkeypatch.setattr(goodput, "speeds", lambda workers, rng: np.array([1.0, 0.5]))
    link = Link.nominal(50e6, 0.03)
    wire = goodput.exchange(2, link, two_way=True)
    waiting, paces = (goodput.goodput(how, 2, link, math.inf, 0) for how in goodput.STRATEGIES[:2])
    assert waiting == pytest.approx(64 / (64 + wire) / 1.5)
    assert paces == pytest.approx(48 / (32 + wire) / 1.5)


def test_the_card_has_the_rows() -> None:
    text = (CARD / "README.md").read_text()
    with (CARD / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for i in range(0, len(rows), len(goodput.STRATEGIES)):
        mine = rows[i : i + len(goodput.STRATEGIES)]
        cells = " | ".join(f"{100 * float(row['goodput']):.0f}%" for row in mine)
        assert f"| {int(mine[0]['workers']):,} | {int(mine[0]['mbit']):,} | {cells} |" in text
