"""The plan of local updates: its multiples against the rows of the race, its forecast against arithmetic by hand."""

import csv
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from stored_rows import at_best_rate, read
from torch import nn

from packsaddle import Identity, LocalUpdates, Rounded, Sign, simulate
from packsaddle.compressors import parse_compressor as parse
from packsaddle.plan.coding import Line, Pace
from packsaddle.plan.link import forecast
from packsaddle.plan.local import Setting, forecast_local, measured_with
from packsaddle.plan.model import ModelSize
from packsaddle.plan.step_time import Fleet, Link

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
RACE = EXPERIMENTS / "race"
FREE = Pace(Line(0, 0), Line(0, 0), Line(0, 0))
Losses = Mapping[int, float]  # the last loss, by seed


def best_losses(workers: int) -> dict[tuple[str, int], Losses]:
    """Return the losses of each method and number of steps, at its best rate of seed 0, by the files alone."""
    found: dict[tuple[str, int], dict[float, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    lines = [
        line
        for name in ("curves.csv", "delay-curves.csv")
        for line in csv.DictReader((RACE / name).read_text().splitlines())
    ]
    for row in lines:
        if int(row["workers"]) == workers and (last := row["losses"].split()[-1]) != "-":
            method = re.sub(r" (lr|steps)=\S+", "", row["contender"])
            found[method, int(row["steps"])][float(row["lr"])][int(row["seed"])] = float(last)
    return {key: min(rates.values(), key=lambda losses: losses.get(0, math.inf)) for key, rates in found.items()}


def multiple(losses: Mapping[tuple[str, int], Losses], method: str, seeds: set[int] | None = None) -> float:
    """Return 600 over the dense steps with a method's loss after 600, means over seeds: on the line in log2 of the
    steps through the losses of dense training of 600 and 1,200 steps."""
    runs = [losses[method, 600], losses["ddp", 600], losses["ddp", 1200]]
    loss, short, long = (mean(loss for seed, loss in run.items() if seeds is None or seed in seeds) for run in runs)
    return float(2 ** -((short - loss) / (short - long)))


def names(setting: Setting) -> tuple[str, str]:
    """Return how the race names a setting, without its delay and with it."""
    known = ("Sign(per_tensor=True)", 'TopK(1/16, values="int2")', 'TopK(1/48, values="int2")', "Identity")
    (compressor,) = (text for text in known if parse(text) == setting.compressor)
    plain = f"{compressor} every={setting.every}"
    with_delay = f"{plain} delay={setting.delay}"
    return plain.replace("Identity every=", "local-sgd-"), with_delay


def test_the_multiples_are_those_of_the_races_rows() -> None:
    """With a delay, those without it times the ratio of both at the seeds that both have."""
    for workers in (2, 4):
        losses = best_losses(workers)
        for setting, stated in measured_with(workers).items():
            plain, with_delay = names(setting)
            found = multiple(losses, plain)
            if setting.delay:
                seeds = {*losses[with_delay, 600]} & {*losses[plain, 600]}
                found *= multiple(losses, with_delay, seeds) / multiple(losses, plain, seeds)
            assert stated == pytest.approx(found, abs=0.00501), (workers, setting)


MUON = {2: "gpt-w2.csv", 4: "char-w4.csv", 8: "char-w8.csv"}
METHODS = {Sign(per_tensor=True): "local {}, Sign", Rounded(): "local {}, Rounded int2", Identity(): "local SGD {}"}


@pytest.mark.parametrize("workers", MUON)
def test_the_multiples_of_muon_are_those_of_its_rows(workers: int) -> None:
    """On lines in log2 of the steps through dense training of all the steps, of half of them, and of a quarter."""
    dense = read(EXPERIMENTS / "muon" / ("gpt-w2.csv" if workers == 2 else "char-w4.csv"))
    words = ("", ", half of the steps", ", quarter of the steps")
    known = [f"Muon, dense{w}" for w in words if any(w in row["method"] for row in dense)]
    losses = [mean(at_best_rate(dense, method)[0]) for method in known]
    for setting, stated in measured_with(workers, "muon").items():
        name = f"Muon, {METHODS[setting.compressor].format(setting.every)}"
        loss = mean(at_best_rate(read(EXPERIMENTS / "muon" / MUON[workers]), name)[0])
        halvings = max(i for i, low in enumerate(losses[:-1]) if loss >= low)
        halvings += (loss - losses[halvings]) / (losses[halvings + 1] - losses[halvings])
        assert halvings <= len(losses) - 1, name  # no loss is above those of dense training
        assert stated == pytest.approx(2**halvings, abs=0.00501), name


def test_steps_wait_for_an_exchange_that_outlasts_its_delay() -> None:
    """The forecast against arithmetic by hand: bytes, what a delay hides in fragments, the share of computing."""
    link, fleet, size = Link(1e-3, 1e6), Fleet(2, 0.1), ModelSize.of_size(1_000_000)
    for f in forecast_local(size, link, fleet, measured_with(2), lambda compressor, d: FREE):
        every, kind, delay = f.setting.every, f.setting.compressor, f.setting.delay
        # Reduced: of Identity all, 2 (W - 1) / W of 4 bytes each; else a flag. Gathered: headers of 40 bytes, a
        # message, and its sizes where they differ; they take half as long again with two workers (`RingAllGather`).
        if kind == Identity():
            reduced, gathered, hops = 4 * 1_000_001, 40.0, 2 + 1
        else:
            message, announced = kind.message_bytes(1_000_000), 0 if kind.fixed_size else 1
            reduced, gathered, hops = 4, 40 + message + 32 * announced, 2 + 1 + 1 + announced
        assert f.sent == pytest.approx((reduced + gathered) / every, rel=1e-3)
        seconds = (reduced + 1.5 * gathered) / 1e6
        total = f.fragments * hops * 1e-3 + seconds
        if not delay:
            assert f.fragments == 1
            assert f.exchange == pytest.approx(total / every, rel=1e-3)
        elif total < every * 0.1 and total / f.fragments <= delay * 0.1:
            assert f.exchange == pytest.approx(0, abs=1e-9)
        else:  # more fragments would wait for latency, fewer for their bytes
            late = max(total - every * 0.1, total - f.fragments * delay * 0.1)
            assert f.exchange == pytest.approx(late / every, rel=1e-3, abs=1e-5)
        assert f.computing == pytest.approx(0.1 / (0.1 + f.exchange))
        assert f.seconds == pytest.approx(f.steps * f.step)
    # With more workers, messages go by owners: 2 (W - 1) / W of them.
    for f in forecast_local(size, link, Fleet(16, 0.1), measured_with(16), lambda compressor, d: FREE):
        message = 2 * 15 / 16 * f.setting.compressor.message_bytes(1_000_000)
        assert f.sent == pytest.approx(message / f.setting.every, rel=0.05)


@pytest.mark.parametrize(
    ("first", "second", "nbytes"),
    [("float64", "float64", 8), ("bfloat16", "bfloat16", 2), ("bfloat16", "float32", 3)],
)
def test_bytes_depend_on_the_dtypes_of_the_parameters(first: str, second: str, nbytes: int) -> None:
    """The forecasts against the ledger of local updates, and against the bytes of the gradients, which DDP sends."""
    dtypes = (getattr(torch, first), getattr(torch, second))

    def make() -> nn.Sequential:
        return nn.Sequential(*(nn.Linear(32, 32, dtype=dtype) for dtype in dtypes))

    size, link, fleet = ModelSize.of_model("two layers", make()), Link(1e-3, 1e6), Fleet(2, 0.1)
    dense = forecast(size, link, fleet, {}, lambda c, d: FREE).dense
    assert dense.sent == sum(p.nbytes for p in make().parameters()) == nbytes * (size.d + size.dense)
    for setting in (Setting(1, Identity()), Setting(1, Rounded())):

        def sent(rank: int, setting: Setting = setting) -> int:
            model = make()
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            local = LocalUpdates(optimizer, every=1, compressor=setting.compressor, model=model)
            totals = []
            for _ in range(2):  # the first step is also compared between workers
                x: Any = torch.full((2, 32), 1.0 + rank)
                for layer, dtype in zip(model, dtypes, strict=True):
                    x = layer(x.to(dtype))
                x.sum().backward()
                optimizer.step()
                totals.append(local.ledger.total.sent)
            return totals[1] - totals[0]

        (f,) = forecast_local(size, link, fleet, {setting: 1.0}, lambda c, d: FREE)
        assert max(simulate(sent, 2)) == f.sent


def test_a_plan_takes_the_quickest_number_of_fragments_and_counts_the_delays_steps() -> None:
    """Bytes of 0.9 s in a round of 8 steps of 0.25 s: a delay of 2 hides them in two fragments, which cost 2 s of
    latency at 1 s each, and 4 steps of 10 then are lost to more steps."""
    fleet, size = Fleet(2, 0.25), ModelSize.of_size(1_000_000)
    setting, plain = Setting(8, Identity(), delay=2), Setting(8, Identity())
    measured = {setting: 1.5, plain: 1.2}
    hidden, waiting = forecast_local(size, Link(1e-6, 4e6 / 0.9), fleet, measured, lambda compressor, d: FREE)
    assert (hidden.setting, hidden.fragments, hidden.exchange) == (setting, 2, 0.0)
    assert hidden.seconds == pytest.approx(1.5 * 0.25)
    assert (waiting.setting, waiting.fragments) == (plain, 1)
    assert waiting.seconds == pytest.approx(1.2 * (0.25 + 0.9 / 8), rel=1e-4)
    first, _ = forecast_local(size, Link(1e-6, 4e7), fleet, measured, lambda compressor, d: FREE)
    assert first.setting == plain  # where the exchange takes less than the delay's steps


def test_a_slower_link_plans_no_shorter_a_step() -> None:
    """Fragments pay a latency each: there are several only if that helps."""
    for workers, d, rate, compute in (
        (4, 5_000_000, 125e6, 0.02),
        (32, 5_000_000, 12.5e6, 0.0129),
        (8, 10**8, 2.5e6, 0.2),
    ):
        before: dict[Setting, float] = {}
        for latency in (1.3**i * 1e-5 for i in range(37)):
            fleet, size = Fleet(workers, compute), ModelSize.of_size(d)
            for f in forecast_local(size, Link(latency, rate), fleet, measured_with(workers), lambda c, d: FREE):
                assert f.seconds >= before.get(f.setting, 0.0) * (1 - 1e-9)
                before[f.setting] = f.seconds


def test_more_workers_need_more_steps() -> None:
    """Dense training gains from a larger batch, which local updates have as workers that drift apart."""
    two, four = measured_with(2), measured_with(4)
    assert measured_with(3) == four
    assert measured_with(100) == four
    assert {setting for setting in two if not setting.delay} == {setting for setting in four if not setting.delay}
    assert all(multiple > two[setting] > 1 for setting, multiple in four.items())
    for measured in (two, four):  # a delay costs steps
        delayed = [setting for setting in measured if setting.delay]
        assert delayed
        assert all(measured[replace(setting, delay=0)] < measured[setting] for setting in delayed)
    few, some, many = (measured_with(workers, "muon") for workers in (2, 4, 8))
    assert measured_with(5, "muon") == measured_with(100, "muon") == many
    for less, more in ((few, some), (some, many)):
        both = less.keys() & more.keys()
        assert both
        assert all(1 < less[setting] < more[setting] for setting in both)
