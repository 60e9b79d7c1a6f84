"""nanoGPT's recipe: its size, its schedule, its text, and one worker with local updates, which is one without."""

from statistics import fmean

import pytest
import torch

from lab.bench.nanogpt import (
    GPT,
    METHODS,
    RATE,
    ROWS,
    STEP_TIME,
    Recipe,
    Text,
    Trial,
    at,
    limits,
    reached,
    rows,
    searched,
    speed_ups,
    table,
    train,
)


def text() -> Text:
    rng = torch.Generator().manual_seed(0)
    return Text(torch.randint(65, (2000,), generator=rng), torch.randint(65, (200,), generator=rng), 65)


def test_the_recipe() -> None:
    """0.80 million parameters without the positions, as nanoGPT prints; a tenth of the rate at the end."""
    net = GPT(65, 0)
    assert sum(p.numel() for p in net.parameters()) - net.places.weight.numel() == 795_904
    rates = [Recipe().rate_at(step) for step in (0, 100, 2000)]
    assert rates == pytest.approx([RATE / 101, RATE, RATE / 10])
    assert Recipe(rate=0.004, warm_up=1).rate_at(0) == pytest.approx(0.002)
    assert len(text().last) == 3


def test_one_worker_with_local_updates_is_one_without() -> None:
    dense, *_ = train(text(), METHODS["dense"], 1, 0, Recipe(3))
    local, sent, _ = train(text(), METHODS["local, no mean momentum"], 1, 0, Recipe(3))
    assert local == pytest.approx(dense, rel=1e-5)
    assert sent == 0


def test_the_card_has_the_tables_of_the_rows() -> None:
    card, every = (ROWS.parent / "README.md").read_text(), rows(ROWS)
    found, best = at(every), searched(every)
    assert table(found) in card
    assert speed_ups(found) in card
    assert speed_ups(best) in card
    assert limits(best) in card
    assert table(found, 1000) in card
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
    assert "| 2 | local | 0.001 | 500 | 2.000 | 4.00 |" in limits(found[:2], [1000])
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
