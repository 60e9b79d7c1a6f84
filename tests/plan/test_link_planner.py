"""packsaddle plan link: rates, the link measured, the verdict, and what the command refuses."""

import csv
import json
from math import log2
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from commandline import command, refused
from hypothesis import given
from hypothesis import strategies as st

from lab import toys
from lab.toys import char_transformer
from packsaddle import QSGD, LowRank, RandomK, Rounded, TopK
from packsaddle.cli.plan_link_text import LinkPlan, methods
from packsaddle.plan import link as link_planner
from packsaddle.plan import model as workload
from packsaddle.plan.coding import Line, Pace
from packsaddle.plan.link import MEASURED, forecast
from packsaddle.plan.model import ModelSize
from packsaddle.plan.step_time import Fleet, Link
from packsaddle.plan.timing import Timing

RATES = {
    "100mbit": 1e8,
    "100 Mbit/s": 1e8,
    "100Mbps": 1e8,
    "12.5MBps": 1e8,
    "12.5Mb/s": 12.5e6,
    "2e3kbit": 2e6,
    "64 bit": 64,
    "1TB/s": 8e12,
    "20mbit/100mbit": 20e6,  # the slower direction counts
    "12.5MB/s/50mbit": 50e6,
}


@pytest.mark.parametrize(("text", "bits"), RATES.items())
def test_rates(text: str, bits: float) -> None:
    assert link_planner.slower_rate(text) == bits


@pytest.mark.parametrize("text", ["12.5MBPS", "12.5MB/S", "fast", "", "1 / mbit", "0mbit", "1mbit/2mbit/3mbit"])
def test_a_rate_that_is_none_or_may_be_of_bits_or_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="rate must be positive"):
        link_planner.slower_rate(text)


@given(st.floats(1, 9.99e14))
def test_a_shown_rate_can_be_parsed(bits: float) -> None:
    assert link_planner.parse_rate(link_planner.format_rate(bits)) == pytest.approx(bits, rel=0.006)


@given(st.text(alphabet="0123456789.kmgtbitBps/ -", max_size=8))
def test_no_text_breaks_the_parser(text: str) -> None:
    try:
        parsed = link_planner.slower_rate(text)
    except ValueError as error:
        parsed, message = 1.0, str(error)
        assert message.startswith("rate must be positive")
    assert parsed > 0


def slow(compressor: Any, d: int) -> Pace:
    """Coding at a nanosecond a coordinate and call."""
    return Pace(*(Line(0.0, 1e-9) for _ in range(3)))


def test_compress_on_a_slow_link_only() -> None:
    """1e6 coordinates, 4 workers: dense exchanges in 6 MB / rate, RandomK 1% in 60 kB / rate, and it codes for 3 ms."""
    size, fleet = ModelSize.of_size(1_000_000), Fleet(4, 0.0)

    def verdict(mbytes: float, steps: float = 1.0, update: float = 0.0) -> Any:
        return forecast(size, Link(0.0, mbytes * 1e6), fleet, {RandomK(0.01): steps}, slow, update=update)

    crossing = 0.99 * 6 / 3e-3  # MB a second
    slow_link, fast_link = verdict(0.9 * crossing), verdict(1.1 * crossing)
    assert slow_link.compress
    assert slow_link.best.compressor == "RandomK(ratio=0.01)"
    assert not fast_link.compress
    assert fast_link.best is fast_link.dense
    assert verdict(100, update=0.005).best.time.compression == pytest.approx(0.008)
    assert verdict(1).best.time.total == pytest.approx(0.003 + 0.06)
    assert verdict(1).dense.time.total == pytest.approx(6)
    # Steps count: 6 / 0.063 = 95 steps of RandomK take as long as one dense step.
    assert verdict(1, 94).best.seconds == pytest.approx(94 * 0.063)
    assert not verdict(1, 96).compress


def test_steps_needed_follow_from_rows() -> None:
    """On the line through dense trainings of 200 to 800 steps, in log2 of the steps; mean losses at the best rate."""
    folder = Path(__file__).parents[2] / "experiments" / "adamw"
    losses: dict[tuple[str, int], dict[str, list[float]]] = {}
    for name in ("runs", "steps"):
        with (folder / f"{name}.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                by_rate = losses.setdefault((row["method"], int(row["steps"])), {})
                by_rate.setdefault(row["rate"], []).append(float(row["validation_loss"]))

    def best(method: str, steps: int) -> float:
        found = losses[method, steps].values()
        return min(fmean(seeds) for seeds in found if len(seeds) == max(map(len, found)))

    dense = sorted((best("dense", steps), log2(steps)) for method, steps in losses if method == "dense")
    names = {QSGD(127): "QSGD 127", TopK(0.1): "TopK 10%", LowRank(4): "LowRank 4", TopK(0.01): "TopK 1%"}
    others = {c: needed for c, needed in MEASURED["adamw"].items() if c != Rounded("int4")}
    for compressor, needed in others.items():
        loss = best(names.get(compressor, type(compressor).__name__), 800)
        assert loss <= dense[-1][0]
        assert 800 / 2 ** np.interp(loss, *zip(*dense, strict=True)) == pytest.approx(needed, rel=0.03)


def test_the_exchange_is_the_fastest_one() -> None:
    size = ModelSize.of_size(1_000_000)
    for workers, latency, expected in ((32, 0.0, "two-way"), (3, 1.0, "all-gather")):
        found = forecast(size, Link(latency, 1e6), Fleet(workers, 0.1), {TopK(0.01): 1.0}, slow)
        assert next(f.exchange for f in found.forecasts if not f.is_dense) == expected


def test_a_model_has_its_shapes() -> None:
    """LowRank of a model is that of its matrices; of a number of coordinates, of one square."""
    before = torch.get_rng_state()
    model = ModelSize.of_model("mnist-autoencoder", toys.mnist_autoencoder())
    assert torch.equal(torch.get_rng_state(), before)
    assert (model.d, model.dense) == (209_920, 449)
    bound = model.bind(LowRank())
    assert isinstance(bound, LowRank)
    assert set(bound.shapes) >= {(32, 144), (64, 1568)}
    assert ModelSize.of_size(10_000).bind(LowRank()).message_bytes(10_000) == 4 * 200


def test_an_update_is_what_it_takes_beyond_plain_sgd(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a part of a long vector, in proportion; and the steps that are timed do step."""

    def timed(works: Any, *, repeats: int) -> dict[str, Timing]:
        for work in works.values():
            work()
        return {"compressed": Timing.of([3.0]), "plain": Timing.of([1.0])}

    monkeypatch.setattr(workload, "side_by_side", timed)
    monkeypatch.setattr(workload, "LONGEST", 2000)
    assert workload.update_seconds(1000) == 2.0
    assert workload.update_seconds(5000) == 5.0


def test_plan_link_says_which(capsys: pytest.CaptureFixture[str]) -> None:
    """The verdict first; all forecasts in tables and in a document."""
    asked = ("--d", 50_000, "--compute", "10ms", "--workers", 3)
    assert command("plan", "link", "1mbit", *asked) == 0
    out = capsys.readouterr().out
    assert out.startswith("Use: ")
    assert "one machine alone " in out
    assert "x steps" not in out
    assert command("plan", "link", "100tbit", *asked, "--table") == 0
    out = capsys.readouterr().out
    assert out.startswith("Use: DistributedDataParallel.\n")
    assert "TopK(0.01)" in out.partition("x steps")[2]
    assert command("plan", "link", "1mbit", *asked, "--optimizer", "sgd", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["fleet"]["compute"] == 0.01
    assert document["compress"]
    assert document["link"]["nominal_bits"] == pytest.approx(1e6)
    forecasts = {f["compressor"]: f for f in document["forecasts"]}
    assert document["best"] == next(iter(forecasts))
    best, dense = forecasts[document["best"]], forecasts["none"]
    assert best["seconds"] == pytest.approx(sum(best["time"].values()))
    assert dense["time"]["bandwidth"] == pytest.approx(4 / 3 * 200_000 / (1e6 / 8 * 1448 / 1514))


def test_plan_link_for_text(capsys: pytest.CaptureFixture[str]) -> None:
    own = ("--model", "lab.toys:char_transformer", "--input", "int64:64", "--batch", 2)
    assert command("plan", "link", "1gbit", *own, "--optimizer", "sgd", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["compressed"] + document["dense"] == sum(p.numel() for p in char_transformer().parameters())
    assert document["fleet"]["compute"] > 0


SIZED = ("1gbit", "--d", "5", "--compute", "1")
REFUSALS = {
    ("1gbit",): "either --model MODULE:FUNCTION or --d NUMBER must be given, the model to plan for",
    ("1gbit", "--d", "5", "--model", "a:b"): "either --model MODULE:FUNCTION or --d NUMBER must be given",
    ("100mbits", *SIZED[1:]): "such as 100mbit, 1gbit or 12.5MB/s, got '100mbits'",
    ("1gbit", "--d", "5"): "--d needs --compute SECONDS (a --model is measured)",
    ("1gbit", "--d", "0", "--compute", "1"): "d must be at least 1, got 0",
    ("1gbit", "--d", "5", "--compute", "0s"): "--compute must be positive and finite, got 0.0",
    ("1gbit", "--d", "5", "--compute", "1e300"): "--compute must be from 0 to 1e+09, got 1e+300",
    (*SIZED, "--workers", "1"): "--workers must be an integer of at least 2, got 1",
    (*SIZED, "--latency", "-1"): "latency of a link must be from 0 to 1e+09 seconds",
    (*SIZED, "--optimizer", "adam"): "got 'adam' (did you mean adamw?)",
}


@pytest.mark.parametrize(("arguments", "message"), REFUSALS.items(), ids=map(" ".join, REFUSALS))
def test_bad_input_is_one_line_and_code_2(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is measured."""
    monkeypatch.setattr("packsaddle.cli.plan_link.update_seconds", None)
    assert not refused(capsys, message, "plan", "link", *arguments)


def test_the_line_to_use_names_an_exchange_that_must_be_asked_for() -> None:
    free = Pace(Line(0, 0), Line(0, 0), Line(0, 0))
    size, fleet, link = workload.ModelSize.of_size(10_000_000), Fleet(32, 0.5), Link(1e-5, 30e6)
    verdict = forecast(size, link, fleet, {QSGD(127): 1.04}, lambda c, d: free)
    assert verdict.best.exchange == "two-way"
    found = methods(LinkPlan(verdict, (), size, link, fleet, 0.0, "adamw", None))[-1]
    assert 'packsaddle.Compression(packsaddle.QSGD(levels=127), exchange="two-way")' in found.lines[-1]


def test_plan_for_an_asymmetric_link(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--d", 200_000, "--compute", 0.05, "--workers", 2, "--json")
    assert command("plan", "link", "20mbit/100mbit", *asked) == 0
    asymmetric = json.loads(capsys.readouterr().out)
    assert asymmetric["link"]["nominal_bits"] == pytest.approx(20e6)
    assert {f["every"] for f in asymmetric["local"]} == {2, 8, 32}
    assert command("plan", "link", "20mbit", *asked, "--optimizer", "sgd") == 0
    assert json.loads(capsys.readouterr().out)["local"] == []
    assert command("plan", "link", "1mbit", "--optimizer", "muon", *asked) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["use"].startswith("LocalUpdates, ")
    assert document["lines"][1].startswith("local = packsaddle.LocalUpdates([muon, adamw], every=")


def test_one_line_says_which_to_use(capsys: pytest.CaptureFixture[str]) -> None:
    """Slow links are for local updates, fast ones for DDP, the slowest for one machine; the fastest comes first."""
    asked = ("--d", 200_000, "--workers", 2, "--json")
    verdicts = {
        ("1mbit", 0.5): "LocalUpdates, ",
        ("100gbit", 10.0): "Distributed",
        ("1kbit", 0.05): "one machine alone",
    }
    for (link, compute), verdict in verdicts.items():
        assert command("plan", "link", link, *asked, "--compute", compute) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["use"].startswith(verdict)
        assert document["compared"]["one machine alone"] == 2 * compute
        assert list(document["compared"].values()) == sorted(document["compared"].values())
        assert not document["too_small"]


def test_more_workers_than_steps_were_measured_with_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for workers, expected in ((2, False), (16, True)):
        assert command("plan", "link", "1mbit", "--compute", 1, "--workers", workers, "--d", 100_000) == 0
        assert ("at most 4 workers: with 16, gains are smaller" in capsys.readouterr().out) is expected
