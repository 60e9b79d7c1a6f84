"""nanoGPT's recipe: its size, its schedule, its text, and one worker with local updates, which is one without."""

import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch

import packsaddle
from lab.bench.nanogpt import GPT, METHODS, NETWORKS, RATE, ROWS, SIZES, Layer, Recipe, Trained, rows, train
from lab.bench.speed_ups import (
    STEP_TIME,
    Trial,
    gaps,
    limits,
    reached,
    searched,
    sizes,
    slope,
    speed_ups,
    table,
    untuned,
)
from lab.bench.texts import VOCABULARY, Text

Gloo = Callable[..., list[Any]]
SMALL = Recipe(width=32, layers=1, block=16, steps=8)


def text() -> Text:
    rng = np.random.default_rng(0)
    return Text(rng.integers(65, size=2000), rng.integers(65, size=200), 65)


def test_the_recipe() -> None:
    """0.80 million parameters without the positions, as nanoGPT prints; a tenth of the rate at the end."""
    assert GPT(65, 0).size == 795_904
    rates = [Recipe().rate_at(step) for step in (0, 100, 2000)]
    assert rates == pytest.approx([RATE / 101, RATE, RATE / 10])
    assert Recipe(rate=0.004, warm_up=1).rate_at(0) == pytest.approx(0.002)
    assert text().last(64).shape == (3, 65)


def test_one_worker_with_local_updates_is_one_without() -> None:
    dense, *_ = train(text(), METHODS["dense"], 1, 0, Recipe(steps=3))
    local, sent, _ = train(text(), METHODS["local, no mean momentum"], 1, 0, Recipe(steps=3))
    assert local == pytest.approx(dense, rel=1e-5)
    assert sent == 0


def test_the_card_has_the_tables_of_the_rows() -> None:
    card, every = (ROWS.parent / "README.md").read_text(), rows(ROWS)
    found, best = untuned(every), searched(every)
    assert table(untuned(every, 2000)) in card
    assert speed_ups(found) in card
    assert speed_ups(best) in card
    assert limits(best) in card
    assert table(best) in card
    muon = searched(rows(ROWS.with_name("muon.csv")))
    assert table(muon) in card
    assert speed_ups(muon) in card
    assert table(untuned(every, 1000)) in card
    library, by_size = searched(rows(ROWS.with_name("library.csv"))), rows(SIZES)
    for each in (table(library), speed_ups(library), limits(library), *sizes(by_size).split("\n\n")[:1]):
        assert each in card
    mean = {
        key: fmean(
            float(row["loss"]) for row in found if (row["workers"], row["method"], row["steps"]) == (*key, "2000")
        )
        for key in {(row["workers"], row["method"]) for row in found if row["steps"] == "2000"}
    }
    claims = {
        "the loss is {}, that of dense": mean["2", "local"],
        "both workers {}, and": mean["2", "dense"],
        "alone {}.": mean["1", "dense"],
        "lowers the loss to {}.": mean["2", "local, agreement"],
        "dense training has {}, local": mean["4", "dense"],
        "local updates {}, and with agreement": mean["4", "local"],
        "agreement {}.": mean["4", "local, agreement"],
    }
    behind = [float(row["loss"]) for row in found if (row["method"], row["steps"]) == ("hook, four bits", "1000")]
    dense = [
        float(row["loss"]) for row in found if (row["workers"], row["method"], row["steps"]) == ("2", "dense", "1000")
    ]
    claims["default, lose {} to dense"] = fmean(behind) - fmean(dense)
    text = " ".join(card.split())
    assert [c for c, loss in claims.items() if c.format(f"{loss:.3f}") not in text] == []


def test_a_speed_up_is_interpolated() -> None:
    """The middle of two lengths is their geometric mean; and a link that takes as long as the steps halves it."""
    row = {"method": "local", "seed": "0", "workers": "2", "rate": "0.001", "batch": "12"}
    alone = {**row, "method": "dense", "workers": "1", "steps": "2000", "loss": "1.5", "sent": "0"}
    found = [
        alone,
        {**row, "steps": "500", "loss": "2.0", "sent": "10"},
        {**row, "steps": "2000", "loss": "1.0", "sent": "40"},
    ]
    one = Trial(2, "local", 0.001, pytest.approx(1000), pytest.approx(20))
    assert reached(found) == {(2, "local"): [one]}
    # A seed counts if it has a longer and a shorter training, and each is compared with one machine of its seed.
    second = [{**each, "seed": "1"} for each in (*found, {**row, "steps": "1000", "loss": "1.5", "sent": "20"})]
    assert reached([*found, *second[:2]]) == {(2, "local"): [one]}
    assert reached([*found, *second]) == {(2, "local"): [one, one]}
    assert "| 2 | local | 0.001 | 2 | 1,000 | 2.00 |" in speed_ups([*found, *second], [1000])
    # A training that is too short has an upper limit on the speed-up.
    assert "| 2 | local | 0.001 | 1 | 500 | 2.000 | 4.00 |" in limits(found[:2], [1000])
    assert "local" not in limits(found, [1000])
    # At the better of two rates, of which neither is the recipe's.
    fast = [
        {**one, "rate": rate, "loss": loss} for one in found for rate, loss in (("0.002", one["loss"]), ("0.004", "9"))
    ]
    searching = [*found, *fast, {**found[1], "rate": "0.004", "steps": "1000", "loss": "1.5"}]
    ((best,),) = reached(searched(searching)).values()
    assert (best.rate, best.steps) == (0.004, pytest.approx(1000))
    assert Trial(2, "local", 0.001, 1000, 0).speed_up(10) == pytest.approx(2)
    as_long = 1000 * STEP_TIME * 10e6 / 8
    assert Trial(2, "local", 0.001, 1000, as_long).speed_up(10) == pytest.approx(1)
    # Two of eight steps overlap with the exchange: a quarter of the training's time is hidden.
    assert Trial(2, "local, overlap", 0.001, 1000, as_long).speed_up(10) == pytest.approx(2 / 1.75)
    assert Trial(2, "local, overlap", 0.001, 1000, as_long / 5).speed_up(10) == pytest.approx(2)


def test_a_gap_is_between_best_rates_of_one_seed_and_its_slope_is_that_of_a_line() -> None:
    def row(method: str, seed: int, layers: int, loss: float, rate: float = 0.004) -> dict[str, str]:
        values = {"method": method, "seed": seed, "layers": layers, "loss": loss, "rate": rate, "width": 32, "steps": 9}
        return {key: str(value) for key, value in values.items()}

    dense = [row("dense", seed, layers, 2.0 + seed) for seed in (0, 1) for layers in (1, 4)]
    worse = row("dense", 0, 1, 5.0, rate=0.1), row("local", 0, 1, 4.0, rate=0.1)
    ours = [row("local", 0, 1, 2.1), row("local", 1, 1, 3.3), row("local", 0, 4, 2.5), row("local", 2, 4, 0.0)]
    small, large = gaps([*worse, *dense, *ours], "local")
    assert (small.gaps, large.gaps) == (pytest.approx([0.1, 0.3]), pytest.approx([0.5]))
    assert small.parameters == 32 * 65 + 12 * 32**2 + 3 * 32
    # The line goes through the mean of the smaller size and the only point of the larger one.
    growth, half = slope([small, large])
    decades = math.log10(large.parameters / small.parameters)
    assert growth == pytest.approx(0.3 / decades)
    # One degree of freedom: the residuals are -0.1, 0.1 and 0, and Student's quantile is 12.706.
    assert half == pytest.approx(12.706 * math.sqrt(0.02 / (decades**2 * 2 / 3)), rel=1e-4)
    assert f"local: {growth:+.3f}" in sizes([*dense, *ours])


def in_two_processes(name: str) -> Trained:
    return train(text(), METHODS[name], 2, 0, SMALL)


@pytest.mark.parametrize("name", ["dense", "local, agreement"])
def test_processes_train_as_one(gloo: Gloo, name: str) -> None:
    """Dense training by DistributedDataParallel is that of one process; local updates are those of the simulation."""
    processes = 1 if name == "dense" else 2
    alone = packsaddle.simulate(lambda _: in_two_processes(name), processes)[0]
    for trained in gloo(in_two_processes, 2, name):
        assert trained.loss == pytest.approx(alone.loss, rel=1e-5)
        assert trained.sent == alone.sent


def test_tokens_are_those_of_the_file(tmp_path: Path) -> None:
    codes = np.arange(40_000, dtype=np.uint16)  # some do not fit into int16
    codes.tofile(tmp_path / "train.bin")
    found = Text.read_tokens(tmp_path / "train.bin")
    assert (len(found.train), len(found.held_out), found.vocabulary) == (36_000, 4_000, VOCABULARY)
    assert found.last(1024)[:, [0, -1]].tolist() == [[36_000 + 1024 * i, 37_024 + 1024 * i] for i in range(3)]
    drawn = found.draw(5, 16, torch.Generator().manual_seed(0))
    assert (drawn.diff() == 1).all()
    assert 0 <= drawn.min() < drawn.max() < 36_000
    # Longer texts have as many held-out windows as nanoGPT's, up to rounding.
    assert len(Text(codes[:0], np.resize(codes, 64 * 4_000), 65).last(64)) == 2000
    codes[:19_999].tofile(tmp_path / "train.bin")
    with pytest.raises(ValueError, match=r"at least 20,000 tokens of 2 bytes, got 39,998 bytes"):
        Text.read_tokens(tmp_path / "train.bin")


def test_the_larger_network_has_124_million_parameters() -> None:
    """GPT-2's 124.4 million have biases and positions besides, and fewer tokens."""
    size = NETWORKS["124M"]
    layer = sum(p.numel() for p in Layer(size.width, size.head).parameters())
    assert (VOCABULARY * size.width + size.layers * layer + size.width) / 1e6 == pytest.approx(123.6, abs=0.05)
