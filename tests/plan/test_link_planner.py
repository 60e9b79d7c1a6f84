"""packsaddle plan link: rates, the link measured, the verdict, and what the command refuses."""

import csv
import json
import subprocess
from math import log2
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from commandline import command, refused
from forked_python import environment, torchrun
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lab import toys
from lab.runs.tasks.images import load_data
from lab.runs.tasks.models import make_task
from lab.runs.templates import TASKS
from packsaddle import QSGD, AdaptiveTopK, Identity, LowRank, RandomK, Rounded, Sign, TopK
from packsaddle.cli.plan_link_text import LinkPlan, methods
from packsaddle.comm.group import Solo
from packsaddle.plan import link as link_planner
from packsaddle.plan import model as workload
from packsaddle.plan import timing
from packsaddle.plan.coding import Line, Pace
from packsaddle.plan.link import MEASURED, StepsNeeded, forecast, steps_needed
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


class Modelled(Solo):
    """A group whose all-reduces take no time but move a clock as a link would."""

    def __init__(self, size: int, link: Link) -> None:
        self.size, self.link, self.now = size, link, 0.0

    def all_reduce(self, tensor: Tensor) -> None:
        hops, nbytes = 2 * (self.size - 1), tensor.numel() * tensor.element_size()
        self.now += hops * (self.link.latency + nbytes / self.size / self.link.rate)
        tensor.mul_(self.size)


@pytest.mark.parametrize("workers", [2, 5])
@pytest.mark.parametrize("true", [Link(1e-4, 1.25e6), Link(0.05, 1e9), Link(1e-6, 1e11)], ids=str)
def test_a_probe_finds_the_link(workers: int, true: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    group = Modelled(workers, true)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: group.now)
    found = link_planner.probe(group)
    assert found.latency == pytest.approx(true.latency, rel=0.01, abs=1e-8)
    assert found.rate == pytest.approx(true.rate, rel=0.01)
    assert group.now < 60 * (0.5 + 2 * workers * true.latency)  # it does not send more than it must


def slow(compressor: Any, d: int) -> Pace:
    """Coding at a nanosecond a coordinate and call."""
    return Pace(*(Line(0.0, 1e-9) for _ in range(3)))


def test_compress_on_a_slow_link_only() -> None:
    """1e6 coordinates, 4 workers: dense exchanges in 6 MB / rate, RandomK 1% in 60 kB / rate, and it codes for 3 ms."""
    size, fleet = ModelSize.of_size(1_000_000), Fleet(4, 0.1)

    def verdict(mbytes: float) -> Any:
        return forecast(size, Link(0.0, mbytes * 1e6), fleet, [RandomK(0.01)], slow, overlap=False)

    crossing = 0.99 * 6e6 / 3e-3  # bytes a second
    assert verdict(100).best.break_even == pytest.approx(crossing)
    slow_link, fast_link = verdict(0.9 * crossing / 1e6), verdict(1.1 * crossing / 1e6)
    assert slow_link.compress
    assert slow_link.best.compressor == "RandomK(ratio=0.01)"
    assert not fast_link.compress
    assert fast_link.best is fast_link.dense
    later = forecast(size, Link(0.0, 1e8), fleet, [RandomK(0.01)], slow, update=0.005)
    assert later.best.time.compression == pytest.approx(0.008)
    assert verdict(1).best.time.total == pytest.approx(0.1 + 0.003 + 0.06)
    assert verdict(1).dense.time.total == pytest.approx(6.1)


def test_steps_that_an_optimizer_needs_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step of RandomK is the shortest, and useless behind AdamW, where it needs more than four times as many."""
    size, fleet = ModelSize.of_size(1_000_000), Fleet(4, 0.1)
    needed = {RandomK(0.1): StepsNeeded(4.0, at_least=True), TopK(0.1): StepsNeeded(1.5)}
    monkeypatch.setitem(MEASURED, "adamw", needed)  # type: ignore[misc, arg-type]
    options = {"overlap": False, "optimizer": "adamw"}
    compressors = [RandomK(0.1), TopK(0.1), TopK(0.2)]
    found = forecast(size, Link(0.0, 1e6), fleet, compressors, slow, **options)
    assert [f.compressor.split("(")[0] for f in found.forecasts] == ["TopK", "none", "TopK", "RandomK"]
    assert min(found.forecasts, key=lambda f: f.time.total).compressor == "RandomK(ratio=0.1)"
    assert found.best.seconds == pytest.approx(1.5 * found.best.time.total)
    assert found.forecasts[-2].steps is None
    assert found.dense.seconds == found.dense.time.total
    # Where it pays: 1.5 steps of TopK take as long as one dense step, no sooner.
    at = found.best.break_even
    assert at is not None
    there = forecast(size, Link(0.0, at), fleet, compressors, slow, **options)
    top = next(f for f in there.forecasts if f.compressor == found.best.compressor)
    assert 1.5 * top.time.total == pytest.approx(there.dense.time.total, rel=1e-6)


def test_the_steps_were_measured_for_compressors_that_the_command_knows() -> None:
    for optimizer, measured in MEASURED.items():
        assert steps_needed(Identity(), optimizer) == StepsNeeded(1.0)
        assert steps_needed(AdaptiveTopK(0.123), optimizer) is None
        assert all(steps_needed(c, optimizer) is found for c, found in measured.items())
    assert steps_needed(Sign(), None) == StepsNeeded(1.0)


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
        loss = best(names.get(compressor, type(compressor).__name__ + " 10%" * needed.at_least), 800)
        steps = 2 ** np.interp(loss, *zip(*dense, strict=True))
        assert needed.at_least == (loss > dense[-1][0])
        assert 800 / steps == pytest.approx(needed.factor, rel=0.03)


def test_the_exchange_is_the_fastest_one() -> None:
    size = ModelSize.of_size(1_000_000)
    for workers, latency, expected in ((32, 0.0, "two-way"), (3, 1.0, "all-gather")):
        found = forecast(size, Link(latency, 1e6), Fleet(workers, 0.1), [TopK(0.01)], slow)
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
    assert workload.update_seconds(1000, noise=True) == 2.0
    assert workload.update_seconds(5000) == 5.0


def test_plan_link_says_which(capsys: pytest.CaptureFixture[str]) -> None:
    """The verdict first; the rates below which a compressor pays stand in the table."""
    asked = ("--d", 50_000, "--compute", "10ms", "--workers", 3)
    assert command("plan", "link", "1mbit", *asked) == 0
    out = capsys.readouterr().out
    assert out.startswith("Use: ")
    assert "one machine alone " in out
    assert "pays" not in out
    assert command("plan", "link", "100tbit", *asked, "--compressor", "TopK(1.23%)", "--table") == 0
    out = capsys.readouterr().out
    assert out.startswith("Use: DistributedDataParallel.\n")
    assert "TopK(0.0123)" in out.partition("Mbit/s")[2]
    assert "Left out, as the number of steps is unknown: TopK(ratio=0.0123)." in out
    spread = ("--compressor", "topk", "--ratio", 0.02, "--spread", 0.5, "--json")
    assert command("plan", "link", "1mbit", *asked, *spread) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["fleet"]["compute"] == 0.01
    assert document["compress"] is False  # its number of steps is unknown
    assert document["link"]["nominal_bits"] == pytest.approx(1e6)
    dense, best = document["forecasts"]
    assert best["compressor"] == "TopK(ratio=0.02)"
    assert best["seconds"] == pytest.approx(sum(best["time"].values()))
    assert dense["time"]["waiting"] == pytest.approx(0.01 * 0.5 * 0.8, rel=0.2)
    assert dense["time"]["bandwidth"] == pytest.approx(4 / 3 * 200_000 / (1e6 / 8 * 1448 / 1514))


def test_plan_link_for_text(capsys: pytest.CaptureFixture[str]) -> None:
    """The model that a run of `python -m lab init`'s configuration trains."""
    own = ("--model", "lab.toys:char_transformer", "--input", "int64:64", "--batch", 2)
    assert command("plan", "link", "1gbit", *own, "--compressor", "randomk", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    config = TASKS["char-transformer"].config
    text = load_data(config.data, None, train=True)
    task = make_task(config.model, text.shape, text.classes, 0)
    assert document["compressed"] + document["dense"] == sum(p.numel() for p in task.parameters())
    assert document["fleet"]["compute"] > 0


@pytest.mark.process
def test_plan_link_auto(capsys: pytest.CaptureFixture[str]) -> None:
    """Between two processes of this machine."""
    asked = ("plan", "link", "auto", "--d", 5000, "--compute", 0.01, "--workers", 2, "--compressor", "randomk")
    assert command(*asked, "--json") == 0
    link = json.loads(capsys.readouterr().out)["link"]
    assert link["rate"] > 0
    assert link["latency"] > 0
    assert "loopback interface, NOT on a network" in link["source"]


@pytest.mark.nightly
def test_plan_link_auto_under_torchrun() -> None:
    """The link between torchrun's workers, said by the first of them only."""
    asked = ("plan", "link", "auto", "--d", "5000", "--compute", "0.01", "--compressor", "randomk", "--json")
    words = torchrun("-m", "packsaddle.cli", "--", *asked)
    done = subprocess.run(words, capture_output=True, text=True, timeout=180, env=environment())
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["fleet"]["workers"] == 2
    assert document["link"]["source"] == "measured between torchrun's workers"


SIZED = ("1gbit", "--d", "5", "--compute", "1")
REFUSALS = {
    ("1gbit",): "--model MODULE:FUNCTION or --d NUMBER must be given, the model to plan for",
    ("100mbits", *SIZED[1:]): "such as 100mbit, 1gbit or 12.5MB/s, got '100mbits'",
    ("1gbit", "--d", "5", "--model", "a:b"): "--model a:b and --d 5 exclude each other: give one of them",
    ("1gbit", "--d", "5"): "--d needs --compute SECONDS (a --model is measured)",
    ("1gbit", "--d", "0", "--compute", "1"): "d must be at least 1, got 0",
    ("1gbit", "--d", "5", "--compute", "-1"): "compute must be from 0 to 1e+09, got -1.0",
    ("1gbit", "--d", "5", "--compute", "0s"): "--compute must be above 0 (steps without computing cannot be compared)",
    (*SIZED, "--batch", "3"): "--batch is for measuring the compute time",
    (*SIZED, "--workers", "1"): "workers must be at least 2 (one worker sends nothing)",
    (*SIZED, "--workers", "0"): "workers must be at least 2 (one worker sends nothing), got 0",
    (*SIZED, "--latency", "-1"): "latency of a link must be from 0 to 1e+09 seconds",
    (*SIZED, "--compressor", "topq"): "compressor must be one of best, randomk",
    (*SIZED, "--compressor", "sign", "--ratio", "1"): "ratio is for one of best, randomk",
    (*SIZED, "--optimizer", "adam"): "got 'adam' (did you mean adamw?)",
    (*SIZED, "--most-steps", "2", "--optimizer", "sgd"): "--most-steps is for local updates, which were not",
    (*SIZED, "--most-steps", "0.5"): "--most-steps must be at least",
    (*SIZED, "--speeds", "1,fast"): "--speeds must be numbers above 0, such as 1,0.33, got '1,fast'",
    (*SIZED, "--workers", "2", "--speeds", "1,1,0.5"): "--speeds must have a number for each of the 2 workers, got 3",
    ("1gbit", "--model", "resnet18"): "--model must be MODULE:FUNCTION, got 'resnet18'",
    ("auto", *SIZED[1:], "--latency", "1"): "--latency is measured if RATE is auto",
}


@pytest.mark.parametrize(("arguments", "message"), REFUSALS.items(), ids=map(" ".join, REFUSALS))
def test_bad_input_is_one_line_and_code_2(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not refused(capsys, message, "plan", "link", *arguments)


def test_a_compressor_pays_below_the_rate_at_which_no_exchange_of_it_does() -> None:
    """Sign by two-way at the slow end, by all-gather at the fast end: each plan says the same."""
    pace = Pace(Line(0, 1e-9), Line(0, 1e-9), Line(0, 1e-9))
    size, fleet = workload.ModelSize.of_size(1_000_000), Fleet(3, 0.004)
    rates = [10.0**exponent for exponent in range(4, 12)]
    for compressor in (Sign(), TopK(0.01)):
        verdicts = [forecast(size, Link(0.028, rate), fleet, [compressor], lambda c, d: pace) for rate in rates]
        found = [next(f for f in v.forecasts if not f.is_dense) for v in verdicts]
        assert len({f.exchange for f in found}) == 2
        assert len({f.break_even for f in found}) == 1
        for f, v, rate in zip(found, verdicts, rates, strict=True):
            if f.break_even is not None:
                assert (f.seconds < v.dense.seconds) == (rate < f.break_even)


def test_the_line_to_use_names_an_exchange_that_must_be_asked_for() -> None:
    free = Pace(Line(0, 0), Line(0, 0), Line(0, 0))
    size, fleet, link = workload.ModelSize.of_size(10_000_000), Fleet(32, 0.5), Link(1e-5, 30e6)
    verdict = forecast(size, link, fleet, [QSGD(127)], lambda c, d: free, optimizer="adamw")
    assert verdict.best.exchange == "two-way"
    found = methods(LinkPlan(verdict, (), size, link, "as given", fleet, 0.0, "adamw"))[-1]
    assert 'packsaddle.Compression(packsaddle.QSGD(levels=127), exchange="two-way")' in found.lines[-1]


def test_plan_for_an_asymmetric_link(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--d", 200_000, "--compute", 0.05, "--workers", 2, "--compressor", "randomk", "--json")
    assert command("plan", "link", "20mbit/100mbit", *asked) == 0
    asymmetric = json.loads(capsys.readouterr().out)
    assert asymmetric["link"]["nominal_bits"] == pytest.approx(20e6)
    assert {f["every"] for f in asymmetric["local"]} == {2, 8, 32}
    assert command("plan", "link", "20mbit", *asked, "--optimizer", "sgd") == 0
    assert json.loads(capsys.readouterr().out)["local"] == []
    assert command("plan", "link", "1gbit", "--optimizer", "muon", "--most-steps", 1.1, *asked) == 0
    document = json.loads(capsys.readouterr().out)
    assert {f["steps"] for f in document["local"]} == {1.06}
    assert (document["use"], document["lines"]) == ("DistributedDataParallel", [])
    assert command("plan", "link", "1mbit", "--optimizer", "muon", *asked) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["use"].startswith("LocalUpdates, ")
    assert document["lines"][1].startswith("local = packsaddle.LocalUpdates([muon, adamw], every=")


def test_workers_of_unequal_speeds(capsys: pytest.CaptureFixture[str]) -> None:
    """On a link without a cost: a step of 60 ms at speed 1; rounds of 2 steps by one bit are the fastest."""
    asked = ("plan", "link", "100gbit", "--d", 2000, "--compute", 60, "--speeds", "1, 0.25,1", "--latency", 0)
    assert command(*asked, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    every, found = document["local"][0]["every"], document["unequal"]
    assert (sum(found["steps"]), document["fleet"]["workers"]) == (3 * every, 3)
    expected = {"equal": 3 / 240, "paced": 3 * every / (60 * max(found["steps"][0], 4)), "alone": 1 / 60}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert command(*asked) == 0
    steps = ", ".join(map(str, found["steps"]))
    assert "Inner steps a second of all workers with these speeds: 0.0125 with equal steps, " in (
        out := capsys.readouterr().out
    )
    assert f"0.01667 by the fastest alone. Steps in a round: {steps}." in out


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


def test_a_long_flush_and_more_workers_than_steps_were_measured_with_are_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A ring all-reduce of 4 d bytes by two workers sends 4 d bytes; the link carries 95.6% of its nominal rate."""
    asked = ("plan", "link", "1mbit", "--compute", 1)
    assert command(*asked, "--workers", 2, "--d", 4_000_000) == 0
    said = capsys.readouterr().out
    assert "more steps are needed" not in said
    (line,) = (line for line in said.splitlines() if line.startswith("flush()"))
    (seconds,) = (float(word) for word in line.split() if word.replace(".", "").isdigit())
    assert seconds == pytest.approx(4e6 / 2 * 8 / 1e6 / 0.957, rel=0.01)
    assert command(*asked, "--workers", 16, "--d", 100_000) == 0
    said = capsys.readouterr().out
    assert "flush()" not in said.replace("local.flush()", "")
    assert "With 16 workers, more steps are needed than with 4, whose numbers these are: gains are smaller" in said
