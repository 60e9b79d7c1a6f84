"""The race to a target by the clock: its settings, its trainings on local processes, and its tables."""

import json
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import command, refused
from torch.nn.utils import parameters_to_vector

from lab.race import target_settings
from lab.race.entrant import enter
from lab.race.target_run import TargetRun, TargetStep, crossing, load_runs, load_steps, save
from lab.race.target_settings import Method, TargetSettings, predicted_steps, rate_of, steps_to
from lab.tasks import ModelConfig, Task, make_task
from packsaddle.comm.group import resolve

ROOT = Path(__file__).parents[3]
COMMITTED = ROOT / "experiments" / "race" / "target" / "settings.toml"
TINY = """
target = 2.0
steps = 12
warm_up = 2
evaluate_every = 4
windows = 8
batch = 2
seeds = 1
workers = [2]
rates = ["local"]
block = 4
rounds = 2
text = "FOLDER"

[model]
name = "char-transformer"
width = 16
depth = 1
heads = 2

[[methods]]
name = "ours"
kind = "local"
inner = "muon"
every = 4
overlap = 1
lr = 0.05

[[methods]]
name = "torch"
kind = "local-sgd"
inner = "adamw"
every = 3
lr = 0.05
"""


def test_the_committed_settings_have_peers_and_rates() -> None:
    settings = TargetSettings.read(COMMITTED)
    kinds = {method.kind for method in settings.methods}
    assert kinds == {"local", "local-sgd", "powersgd", "dense", "hook"}
    ours = settings.method("Muon, local 8, Sign")
    assert rate_of(ours, 2, settings.target) == 0.008  # of the committed rows: the fewest steps to the target
    assert rate_of(ours, 2, 1.0) == 0.016  # never reached: the lowest loss
    assert rate_of(replace(ours, row="no such row"), 2, settings.target) == ours.lr
    steps = predicted_steps(settings.method("Muon, DDP"), 2, settings.target)
    assert steps is not None
    assert steps[1] <= steps[0] <= steps[2]
    assert 400 < steps[0] < 600
    assert predicted_steps(settings.method("AdamW, DDP"), 2, 1.0) is None  # never reached


def test_steps_to_a_target_are_on_straight_lines() -> None:
    assert steps_to([3.0, 2.0, 1.0], 1.5) == pytest.approx(125)
    assert steps_to([3.0, 2.0], 4.0) == 50
    assert steps_to([3.0, 2.0], 1.0) is None
    assert crossing([(50, 10.0, 3.0), (100, 30.0, 2.0)], 2.5) == (75.0, 20.0)
    assert crossing([(50, 10.0, 3.0), (100, 30.0, 2.6)], 2.5) == (100.0, 30.0)
    assert crossing([(50, 10.0, 2.0)], 2.5) == (50.0, 10.0)


def tiny_network() -> Task:
    return make_task(ModelConfig("char-transformer", width=16, depth=1, heads=2), torch.Size([8]), 5, seed=0)


def trained(methods: list[Method]) -> list[torch.Tensor]:
    """The parameters after six steps and the flush, of each method."""
    group = resolve(None)
    found = []
    for method in methods:
        network = tiny_network()
        entrant = enter(method, network, 0.01, steps=6, warm_up=2)
        rng = torch.Generator().manual_seed(group.rank)
        for _ in range(6):
            window = torch.randint(5, (2, 9), generator=rng)
            entrant.step((window[:, :-1], window[:, 1:]))
        if entrant.diverges:
            with entrant.common_model(group):
                mean = parameters_to_vector(network.parameters()).detach().clone()
        entrant.flush()
        if entrant.diverges:
            rounding = 1e-4 if method.compressor == "Half" else 1e-5  # the flush sends what averages have rounded off
            torch.testing.assert_close(mean, parameters_to_vector(network.parameters()).detach(), atol=rounding, rtol=0)
        found.append(parameters_to_vector(network.parameters()).detach())
        found.append(torch.tensor([entrant.sent()]))
    return found


@pytest.mark.parametrize("inner", ["adamw", "muon"])
def test_methods_that_are_the_same_train_the_same(gloo: Callable[..., list[Any]], inner: Any) -> None:
    """Averages of local SGD by torch and by LocalUpdates, with a last one in the flush; and their bytes."""
    torchs = Method("torch", "local-sgd", inner, 0.01, every=4)
    ours = Method("ours", "local", inner, 0.01, every=4, compressor="Identity", keep_unsent=False)
    half = replace(ours, compressor="Half")
    dense = Method("dense", "dense", inner, 0.01)
    hook = replace(dense, kind="hook", compressor="Identity")
    first, second = gloo(trained, 2, [torchs, ours, half, dense, hook])
    start = parameters_to_vector(tiny_network().parameters()).detach()
    for worker in (first, second):
        x, sent, y, our_sent, z, half_sent, by_ddp, dense_sent, by_hook, hook_sent = worker
        moved = float((x - start).norm())
        assert float((x - y).norm()) < 1e-3 * moved  # AdamW divides rounding errors of tiny gradients by these
        assert float((x - z).norm()) < 1e-2 * moved
        d = len(x)
        assert int(sent) == 2 * 4 * d  # two averages
        assert int(our_sent) == pytest.approx(2 * 4 * d, abs=1500)  # and the comparison of the start
        assert int(half_sent) == pytest.approx((2 + 4) * d, abs=1500)  # half an average, a float32 flush
        assert float((by_ddp - by_hook).norm()) < 1e-3 * float((by_ddp - start).norm())
        assert int(dense_sent) == 6 * 4 * d
        assert int(hook_sent) == pytest.approx(6 * 4 * d, abs=2500)  # and the comparison of options at the start
    torch.testing.assert_close(first[0], second[0])


def a_run(method: str, seed: int, seconds: float, *, reached: bool = True) -> TargetRun:
    return TargetRun(
        2, "10", method, seed, 0.05, 2.0, reached, 10.0, 1.0, seconds, 2.0, 5.0, 1.0, 2.0, None, "4:1.00:2.1000"
    )


def test_tables_of_stored_rows(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Means and ranges over seeds, the prediction by simulated steps, and the limit by dense training's."""
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy.\n" * 50)
    dense = '\n[[methods]]\nname = "DDP"\nkind = "dense"\ninner = "muon"\nrow = "Muon, dense"\nlr = 0.05\n'
    settings = tmp_path / "settings.toml"
    tiny = TINY.replace("FOLDER", str(tmp_path)).replace('name = "ours"', 'name = "ours"\nrow = "A"')
    tiny = tiny.replace("overlap = 1\n", "")  # with which steps are not the simulated ones
    settings.write_text(tiny + dense)
    monkeypatch.setattr(target_settings, "SIMULATED", tmp_path)
    header = "method,rate,seed,validation_loss,curve\n"
    rows = 'A,0.1,0,1.5,3.0 1.0\nA,0.1,1,1.6,2.5 1.5\nA,0.2,0,1.9,3.0 2.9\n"Muon, dense",0.1,0,1.4,3.0 1.0\n'
    (tmp_path / "gpt-w2.csv").write_text(header + rows)
    save(tmp_path / "runs.csv", [a_run("ours", 0, 7.0), a_run("ours", 1, 9.0), a_run("torch", 0, 9.0, reached=False)])
    save(tmp_path / "steps.csv", [TargetStep(2, "10", "ours", 100.0, 90.0, 120.0, 4)])
    save(tmp_path / "steps.csv", [TargetStep(2, "10", "muon, alone", 50.0, 50.0, 50.0, 4)])
    assert load_steps(tmp_path / "steps.csv")[0].low == 90.0

    asked = ("target", "--settings", settings, "--rates", 10, "--only")
    assert command("lab.race", *asked, "tables", "--json") == 0
    (table,) = json.loads(capsys.readouterr().out)
    ours, torchs = table["rows"]
    assert (ours["method"], ours["seconds"], ours["low"], ours["high"]) == ("ours", 11.0, 10.0, 12.0)
    # The target 2 is in the middle of (50, 3), (100, 1), and of (50, 2.5), (100, 1.5).
    assert (ours["predicted"], ours["from"], ours["to"]) == pytest.approx((7.5, 6.75, 9.0))
    assert ours["/ limit"] == pytest.approx(11.0 / (75 * 0.05))
    assert (torchs["seconds"], torchs["seeds"]) == (None, 1)


@pytest.mark.nightly
@pytest.mark.process
def test_a_race_on_local_processes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Steps in turns and trainings of two methods."""
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy.\n" * 100)
    settings = tmp_path / "settings.toml"
    settings.write_text(TINY.replace("FOLDER", str(tmp_path)))
    assert tomllib.loads(settings.read_text())["rates"] == ["local"]
    asked = ("target", "--settings", settings, "--out", tmp_path / "out")
    assert command("lab.race", *asked, "--only", "all", "--json") == 0
    output = capsys.readouterr().out
    (table,) = json.loads(output[output.index("[\n") :])
    assert len(table["rows"]) == 2
    runs, steps = load_runs(tmp_path / "out" / "runs.csv"), load_steps(tmp_path / "out" / "steps.csv")
    assert [run.method for run in runs] == ["ours", "torch"]
    assert [step.method for step in steps] == ["adamw, alone", "muon, alone", "ours", "torch"]
    for run in runs:
        assert run.alone_ms is not None
        assert run.alone_ms > 0
        points = [tuple(map(float, point.split(":"))) for point in run.curve.split()]
        assert run.train_s <= points[-1][1] + 0.01
        assert run.steps <= points[-1][0]
        assert run.reached == (points[-1][2] <= 2.0)
        assert 0 < run.rounds_mb < run.with_ends_mb
        assert run.origin.text
        assert run.origin.threads == 1
    assert all(0 < step.low <= step.ms <= step.high for step in steps)
    refused(capsys, "methods must be one of ours, torch", "lab.race", *asked, "--methods", "theirs")
    refused(capsys, "rate must be Mbit/s", "lab.race", *asked, "--rates", "fast")
