"""The race: nanoGPT's recipe and text, the methods in one process and in several, times by the clock, and tables."""

import copy
import csv
import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from commandline import command, refused
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.utils import parameters_to_vector

import packsaddle
from lab.race.clock import Job, rates_of, timed_steps, timed_training
from lab.race.gpt import GPT, NETWORKS, RATE, Layer, Recipe
from lab.race.methods import METHODS, Half, Method, local, torchft_diloco
from lab.race.tables import (
    ROWS,
    SIZES,
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
from lab.race.text import LIBRARY, VOCABULARY, Text
from lab.race.train import Trained, rows, train
from packsaddle.comm.group import resolve
from packsaddle.compressors import Identity
from packsaddle.errors import ConfigError

Gloo = Callable[..., list[Any]]
SMALL = Recipe(width=32, layers=1, block=16, steps=8, warm_up=2)
LONG = Recipe(width=32, layers=1, block=16, steps=20, warm_up=2)


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
    dense = train(text(), METHODS["dense"], 1, 0, Recipe(steps=3))
    alone = train(text(), METHODS["local, no mean momentum"], 1, 0, Recipe(steps=3))
    assert alone.loss == pytest.approx(dense.loss, rel=1e-5)
    assert alone.sent == dense.sent == 0


def test_a_worker_follows_the_recipe() -> None:
    """Three steps of AdamW by hand: the rate of each, gradients clipped to norm 1, decay of matrices alone."""
    recipe = Recipe(width=32, layers=1, block=16, steps=8, warm_up=2, rate=0.1)
    network = GPT(65, 0, recipe)
    twin, worker = copy.deepcopy(network), METHODS["alone"].enter(network, recipe, 1)
    state = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in twin.named_parameters()}
    for step in range(3):
        windows = text().draw(4, 16, torch.Generator().manual_seed(step))
        worker.step(windows[:, :-1], windows[:, 1:])
        gradients = torch.autograd.grad(twin(windows[:, :-1], windows[:, 1:]), list(twin.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        for (name, p), g in zip(twin.named_parameters(), gradients, strict=True):
            m, v = state[name]
            clipped = g * min(1.0, 1.0 / float(norm))
            m.lerp_(clipped, 0.1)
            v.lerp_(clipped.square(), 0.01)
            rate = recipe.rate_at(step)
            with torch.no_grad():
                p *= 1 - rate * (0.1 if p.dim() == 2 else 0.0)
                p -= rate * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8)
    start, found, expected = (parameters_to_vector(m.parameters()) for m in (GPT(65, 0, recipe), network, twin))
    assert (found - expected).norm() < 1e-3 * (expected - start).norm()


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


@pytest.mark.parametrize("name", ["dense", "local, agreement", "local SGD 8, 16 bits", "Algorithm 1, TopK 1%"])
def test_processes_train_as_one(gloo: Gloo, name: str) -> None:
    """Dense training by DistributedDataParallel is that of one process; other methods are those of the simulation."""
    processes = 1 if name == "dense" else 2
    alone = packsaddle.simulate(lambda _: in_two_processes(name), processes)[0]
    for trained in gloo(in_two_processes, 2, name):
        assert trained.loss == pytest.approx(alone.loss, rel=1e-5)
        assert trained.sent == alone.sent


def by_hand(every: int) -> tuple[float, int]:
    """Local SGD by torch's averager: the loss after eight steps, the last of which averages, and the bytes sent."""
    worker = METHODS["alone"].enter(GPT(65, 0, SMALL), SMALL, 2)
    averager = PeriodicModelAverager(every, warmup_steps=0)
    averager.step = 1  # starting at 0, torch's averager would average after the first step of each period
    generator = torch.Generator().manual_seed(resolve(None).rank)
    for _ in range(SMALL.steps):
        windows = text().draw(SMALL.batch, SMALL.block, generator)
        worker.step(windows[:, :-1], windows[:, 1:])
        averager.average_parameters(worker.network.parameters())
    held_out = text().last(SMALL.block)
    with torch.no_grad():
        return float(worker.network(held_out[:, :-1], held_out[:, 1:])), SMALL.steps // every * worker.ring(4)


def methods_and_peers() -> dict[str, tuple[float, int]]:
    plain = local(4, compressor=Identity(), mean_momentum=0.0, keep_unsent=False)
    half = local(4, compressor=packsaddle.Compression(Half(), dense_below=0), mean_momentum=0.0, keep_unsent=False)
    found = {"torch": by_hand(4)}
    for name, method in ({"ours": plain, "16 bits": half} | {name: METHODS[name] for name in BY_DDP}).items():
        trained = train(text(), method, 2, 0, SMALL)
        found[name] = trained.loss, trained.sent
    return found


BY_DDP = ("dense", "dense, 16 bits", "hook, four bits", "hook, TopK 10%", "PowerSGD 4")


def test_methods_that_are_the_same_train_the_same(gloo: Gloo) -> None:
    """Local SGD by torch and by LocalUpdates, dense training with and without rounding; and the bytes of each."""
    first, second = gloo(methods_and_peers, 2)
    assert first == second
    d = sum(p.numel() for p in GPT(65, 0, SMALL).parameters())
    torchs, ours, half = (first[name] for name in ("torch", "ours", "16 bits"))
    assert ours[0] == pytest.approx(torchs[0], rel=1e-4)
    assert half[0] == pytest.approx(torchs[0], rel=1e-3)
    assert torchs[1] == 2 * 4 * d
    assert ours[1] == pytest.approx(3 * 4 * d, abs=1500)  # with the flush, and models are compared
    assert half[1] == pytest.approx((2 + 2 + 4) * d, abs=1500)  # the flush is in float32
    # Gradients in 16 bits have eleven digits; with an error memory four bits lose little in eight steps.
    dense, sixteen, four, top, low_rank = (first[name] for name in BY_DDP)
    assert (dense[1], sixteen[1]) == (8 * 4 * d, 8 * 2 * d)
    assert sixteen[0] == pytest.approx(dense[0], rel=1e-3)
    assert four[0] == pytest.approx(dense[0], rel=1e-2)
    assert d < four[1] / 4 < 1.5 * d  # half a byte per coordinate and step, and scales
    assert top[1] < 8 * 4 * d / 4
    assert 2 * 4 * d < low_rank[1] < 6 * 4 * d  # dense twice, then little


def test_a_simulated_hook_is_that_of_ddp(gloo: Gloo) -> None:
    """But for the buckets, which are compressed one by one in DistributedDataParallel."""
    simulated = packsaddle.simulate(lambda _: in_two_processes("hook, four bits"), 2)[0]
    for trained in gloo(in_two_processes, 2, "hook, four bits"):
        assert trained.loss == pytest.approx(simulated.loss, rel=1e-3)
        assert trained.sent == pytest.approx(simulated.sent, rel=0.05)


def torchft_and_ours() -> list[float]:
    outer = packsaddle.OuterSGD(0.7, 0.9)
    ours = local(4, compressor=Identity(), outer=outer, mean_momentum=0.0, keep_unsent=False)
    return [train(text(), method, 2, 0, SMALL).loss for method in (torchft_diloco(4), ours)]


def test_torchft_diloco_is_diloco(gloo: Gloo) -> None:
    """torchft's implementation and LocalUpdates' with the same outer optimizer give the same loss."""
    pytest.importorskip("torchft")
    theirs, ours = gloo(torchft_and_ours, 2)[0]
    assert theirs == pytest.approx(ours, rel=1e-5)


def test_evaluations_are_made_when_an_exchange_has_just_ended() -> None:
    """Every H steps, an exchange of n overlapping steps ends n steps after its begin."""
    method = Method(lambda worker: None, every=8, overlap=3)
    assert [method.next_quiet(step) for step in (0, 3, 4, 50)] == [3, 3, 11, 51]
    assert METHODS["dense"].next_quiet(50) == 50
    trained = packsaddle.simulate(lambda _: train(text(), METHODS["local"], 2, 0, LONG, every=6), 2)[0]
    points = [point.split(":") for point in trained.curve.split()]
    assert [int(step) for step, _, _ in points] == [8, 16]
    assert [float(loss) for _, _, loss in points] == sorted((float(loss) for _, _, loss in points), reverse=True)
    seconds = [float(second) for _, second, _ in points]
    assert trained.start_s <= seconds[0] <= seconds[1] <= trained.seconds - trained.flush_s + 0.01


def clocked() -> tuple[dict[str, Any], dict[str, Any]]:
    job = Job("", ("local, overlap",), 2, 0, SMALL, every=4)
    training = timed_training(job, text())
    return training, timed_steps(Job("", ("alone", "dense", "local"), 2, 0, SMALL, rounds=2, turn=2), text())


def test_times_by_the_clock(gloo: Gloo) -> None:
    """A training's row, and the rows of steps in turns, whose turns are whole periods."""
    for training, steps in gloo(clocked, 2):
        alone = packsaddle.simulate(lambda _: in_two_processes("local, overlap"), 2)[0]
        assert training["loss"] == pytest.approx(alone.loss, abs=1e-4)
        assert training["alone_ms"] > 0
        assert training["counted"] == 0  # without an interface
        assert {name: row["turn"] for name, row in steps.items()} == {"alone": 2, "dense": 2, "local": 8}
        assert all(0 < row["low"] <= row["ms"] <= row["high"] for row in steps.values())


def test_links_are_read() -> None:
    assert (rates_of("50"), rates_of("10/100")) == ((50, 50), (10, 100))
    for link in ("fast", "0", "10/", "1/2/3", "-5", "nan"):
        with pytest.raises(ConfigError, match="links must be Mbit/s"):
            rates_of(link)


SMALLEST = ("--size", "0.05M", "--batch", 2, "--steps", 4, "--warm-up", 1)


@pytest.mark.slow
def test_a_race_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows are added, and made once; tables are printed of them."""
    asked = ("train", "--text", LIBRARY, *SMALLEST, "--workers", 1, 2, "--out", tmp_path / "rows.csv")
    for _ in range(2):
        assert command("lab.race", *asked) == 0
        found = rows(tmp_path / "rows.csv")
        assert [(row["workers"], row["method"]) for row in found] == [
            ("1", "dense"),
            ("2", "dense"),
            ("2", "local, agreement"),
        ]
    assert {(row["text"], row["threads"]) for row in found} == {("bdefb6a7856b", "1")}
    capsys.readouterr()
    assert command("lab.race", "tables", tmp_path / "rows.csv") == 0
    assert command("lab.race", "tables", tmp_path / "rows.csv", "--sizes") == 0
    assert "| million parameters |" in capsys.readouterr().out

    # Bad input is refused in one line.
    more = ("--out", tmp_path / "x.csv")
    refused(capsys, "(did you mean local?)", "lab.race", *asked, "--methods", "lokal")
    refused(capsys, "text nothing cannot be read", "lab.race", "train", "--text", "nothing", *more)
    (tmp_path / "other.txt").write_text("All work and no play makes Jack a dull boy.\n")
    refused(capsys, "text must be nanoGPT's input.txt", "lab.race", "clock", "--text", tmp_path / "other.txt", *more)
    refused(capsys, "needs a process for each worker", "lab.race", *asked, "--methods", "PowerSGD 4")
    refused(capsys, "warm_up must be below steps = 4", "lab.race", *asked, "--warm-up", 4)
    refused(capsys, "every must be an integer of at least 1", "lab.race", "clock", *asked[1:], "--every", 0)
    refused(capsys, "links must be Mbit/s", "lab.race", "steps", *asked[1:], "--links", "fast")


@pytest.mark.nightly
@pytest.mark.process
@pytest.mark.usefixtures("hosts_here")
def test_a_race_on_hosts(tmp_path: Path) -> None:
    """Bytes that the interface counts are those of the ledger, with headers; steps are slower than the link allows."""
    asked = ("--text", LIBRARY, *SMALLEST, "--methods", "dense", "local", "--links", "100/1000")
    assert command("lab.race", "clock", *asked, "--workers", 1, 2, "--every", 2, "--out", tmp_path / "clock.csv") == 0
    with (tmp_path / "clock.csv").open(newline="") as file:
        found = {(row["workers"], row["method"]): row for row in csv.DictReader(file)}
    assert found.keys() == {(workers, method) for workers in "12" for method in ("dense", "local")}
    d = sum(p.numel() for p in GPT(len(set(Text.read(LIBRARY).train.tolist())), 0, NETWORKS["0.05M"]).parameters())
    dense, ours = found["2", "dense"], found["2", "local"]
    for row in (dense, ours):
        assert float(row["sent"]) <= float(row["counted"]) <= 1.1 * float(row["sent"]) + 40_000
        assert row["mbit"] == "100/1000"
    assert float(dense["sent"]) == pytest.approx(4 * 4 * d, rel=1e-2)
    assert float(dense["seconds"]) > float(dense["sent"]) * 8 / 100e6
    assert float(found["1", "dense"]["counted"]) < 10_000
    assert command("lab.race", "steps", *asked, "--rounds", 1, "--turn", 1, "--out", tmp_path / "steps.csv") == 0
    timed = {row["method"]: row for row in rows(tmp_path / "steps.csv")}
    assert list(timed) == ["alone", "dense", "local"]
    assert float(timed["dense"]["ms"]) > 1000 * 4 * d * 8 / 100e6


@pytest.mark.slow
def test_the_library_is_the_same_everywhere_and_does_not_repeat() -> None:
    found = Text.read(LIBRARY)
    assert found.digest == "bdefb6a7856b"
    assert len(found.train) > 64 * 50_000
    assert len(found.held_out) == pytest.approx(len(found.train) / 9, rel=1e-3)


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
