"""The race to a loss: curves, their search, steps on links, and the tables and figures that are made of them."""

import copy
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commandline import command, refused
from torch.nn.utils import parameters_to_vector

from lab.race.contenders import parse
from lab.race.curves import Curve, Job, Training, append, load, train, validate
from lab.race.library import library_text
from lab.race.peers import Racer, enter
from lab.race.recipe import CONSTANT, Recipe
from lab.race.time_to_loss import (
    StepOnLink,
    computing,
    entries,
    load_steps,
    rows,
    save_steps,
    targets_of,
    verdicts,
)
from lab.race.workload import TrainingWorkload, load_library
from lab.tasks import DataConfig
from packsaddle.comm.group import resolve

IMAGES = TrainingWorkload("mnist-autoencoder", 4)
TEXT = TrainingWorkload("gpt", 4)


def test_the_rate_warms_up_and_falls_to_a_tenth() -> None:
    recipe = Recipe("adamw", 1000)
    assert recipe.share(0) == pytest.approx(0.01)
    assert recipe.share(99) == recipe.share(100) == pytest.approx(1.0)
    assert recipe.share(550) == pytest.approx(0.55)  # half way down a cosine from 1 to 0.1
    assert recipe.share(1000) == recipe.share(2000) == pytest.approx(0.1)
    assert Recipe("momentum", 40).share(1) == pytest.approx(2 / 4)  # a tenth of the steps, where that is less
    assert CONSTANT.schedule(torch.optim.SGD([torch.zeros(1)], 0.1)) is None


def test_a_racer_clips_and_follows_the_schedule() -> None:
    """One step of SGD with the recipe's rate and clipped gradient, by hand."""
    recipe = Recipe("adamw", 10)
    task = IMAGES.task()
    racer = enter(parse("alone", 0.01), task, recipe)
    batch = IMAGES.batches(IMAGES.examples(), 0, 1)(0)
    twin = copy.deepcopy(task)
    optimizer = torch.optim.AdamW(twin.parameters(), 0.01, betas=(0.9, 0.99), weight_decay=0.1)
    for group_of in (racer.optimizer.param_groups, optimizer.param_groups):
        for group in group_of:
            group["weight_decay"] = 0.0
    for step in range(3):
        racer.step(batch)
        twin(*batch).backward()
        norm = parameters_to_vector([p.grad for p in twin.parameters() if p.grad is not None]).norm()
        for p in twin.parameters():
            assert p.grad is not None
            p.grad *= min(1.0, 1.0 / (float(norm) + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * recipe.share(step)
        optimizer.step()
        optimizer.zero_grad()
    found, expected = (parameters_to_vector(m.parameters()) for m in (task, twin))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_text_of_the_library_is_the_same_everywhere_and_does_not_repeat() -> None:
    whole = load_library(DataConfig("text"), train=True)
    assert len(whole) > 50_000  # windows of 64
    assert whole.vocabulary.isascii()
    text = "".join(whole.vocabulary[i - 1] for i in whole.codes[:200_000].tolist())
    assert "def " in text
    assert hashlib.sha256(library_text().encode()).hexdigest()[:12] == TEXT.text_hash() == "bdefb6a7856b"
    held_out = load_library(DataConfig("text"), train=False)
    assert held_out.vocabulary == whole.vocabulary
    assert len(held_out) == pytest.approx(len(whole) / 9, rel=0.01)


def validated() -> tuple[float, float, bool]:
    """The loss of the mean model, the same by averaging state dicts, and if the worker keeps its own."""
    group = resolve(None)
    task = IMAGES.task()
    with torch.no_grad():
        for p in task.parameters():
            p.add_(0.01 * group.rank)
    before = copy.deepcopy(task.state_dict())
    held_out = IMAGES.examples(train=False)
    found = validate(Racer(task, task, torch.optim.SGD(task.parameters(), 0.1), lambda _: None), held_out, group)  # type: ignore[arg-type, return-value]
    unchanged = all(torch.equal(before[name], t) for name, t in task.state_dict().items())
    mean = IMAGES.task()
    with torch.no_grad():
        for p in mean.parameters():
            p.add_(0.01 * (group.size - 1) / 2)
    mean.eval()
    indices = torch.arange(0, len(held_out), len(held_out) // 512)[:512]
    with torch.no_grad():
        expected = float(mean(*held_out.batch(indices, torch.device("cpu"))))
    return found, expected, unchanged


def test_validation_is_of_the_mean_of_the_models(gloo: Callable[..., list[Any]]) -> None:
    for found, expected, unchanged in gloo(validated, 3):
        assert found == pytest.approx(expected, rel=1e-5)
        assert unchanged


def curves_of(jobs: list[Job]) -> list[Curve]:
    training = Training(IMAGES, "momentum", 6, 3)
    return [train(training, job, resolve(None)) for job in jobs]


def test_curves_of_methods_that_are_the_same_are_the_same(gloo: Callable[..., list[Any]]) -> None:
    """Local updates of one step, uncompressed, and torch's averaging after each, train as DDP does."""
    names = ("ddp", "Identity every=1", "local-sgd-1")
    dense, ours, torchs = gloo(curves_of, 2, [Job(2, name, 0.01, 1) for name in names])[0]
    assert dense.losses == pytest.approx(ours.losses, rel=1e-3)
    assert dense.losses == pytest.approx(torchs.losses, rel=1e-3)
    assert (dense.steps, dense.every, len(dense.losses), dense.seed) == (6, 3, 2, 1)
    assert dense.sent == pytest.approx(4 * 210_369)
    assert dense.peak_mb > 50


def torchft_and_ours() -> list[float]:
    return [
        curve.final
        for curve in curves_of([Job(2, name, 0.01, 0) for name in ("diloco-3", "Identity every=3 outer=nesterov")])
    ]


def test_torchft_diloco_is_diloco(gloo: Callable[..., list[Any]]) -> None:
    """torchft's implementation and LocalUpdates' with the same outer optimizer give the same loss."""
    pytest.importorskip("torchft")
    theirs, ours = gloo(torchft_and_ours, 2)[0]
    assert theirs == pytest.approx(ours, rel=1e-5)


def curve(contender: str, losses: tuple[float | None, ...], lr: float = 0.1, seed: int = 0, steps: int = 100) -> Curve:
    return Curve(2, contender, lr, seed, steps, steps // len(losses), losses, 1000.0, 5.0, 100.0)


def test_steps_to_a_loss_are_on_straight_lines() -> None:
    found = curve("ddp", (4.0, 3.0, 2.0, 2.5, 1.0), steps=500)
    assert found.steps_to(4.5) == 100  # before the first evaluation nothing is known
    assert found.steps_to(3.25) == pytest.approx(175)
    assert found.steps_to(2.0) == 300
    assert found.steps_to(1.75) == pytest.approx(450)
    assert found.steps_to(0.5) is None
    assert curve("ddp", (4.0, None)).final == math.inf
    assert [found.loss_at(step) for step in (0, 100, 150, 420, 500)] == pytest.approx([4.0, 4.0, 3.5, 2.2, 1.0])


def test_each_seed_has_its_own_target() -> None:
    """A seed whose network starts better is compared with dense training from the same start."""
    losses = (4.0, 3.0, 2.0, 1.0, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
    worse = tuple(loss + 1 for loss in losses)
    (dense,) = entries([curve("ddp", losses), curve("ddp", worse, seed=1)])
    targets = targets_of(dense)
    assert targets == {0: pytest.approx(0.1), 1: pytest.approx(1.1)}
    assert dense.steps_to(targets) == pytest.approx([90, 90])
    (other,) = entries([curve("diloco-8", losses, seed=2)])
    assert other.steps_to(targets) is None  # dense training did not have that seed


def test_files_are_read_as_they_were_written(tmp_path: Path) -> None:
    both = [curve('TopK(1/16, values="int2") every=8', (4.0, 3.5)), curve("ddp", (4.0, None), seed=2)]
    for one in both:
        append(tmp_path / "curves.csv", one)
    assert load(tmp_path / "curves.csv") == both
    assert load(tmp_path / "none.csv") == []
    steps = [StepOnLink(2, 10.0, 100.0, "ddp", 5.5, 5.0, 6.0, 3.0, 3.25)]
    save_steps(tmp_path / "steps.csv", steps)
    save_steps(tmp_path / "steps.csv", steps)
    assert load_steps(tmp_path / "steps.csv") == 2 * steps
    (tmp_path / "curves.csv").write_text("workers,contender\n2,ddp\n")
    with pytest.raises(ValueError, match=r"curves.csv has a row that is no curve"):
        load(tmp_path / "curves.csv")


def a_race() -> tuple[list[Curve], list[StepOnLink]]:
    """Ten evaluations, a target of 2 at nine tenths of dense training."""
    dense = tuple(float(x) for x in np.linspace(2.8, 1.9, 10))
    curves = [
        curve("ddp", dense),
        curve("ddp", dense, lr=0.2, seed=1),  # another rate with fewer seeds than the best has
        curve("diloco-8", tuple(x + 0.05 for x in dense)),
        curve("TopK(0.1) every=8", tuple(x + 0.5 for x in dense)),
        curve("TopK(0.1) every=8 steps=200", tuple(x - 0.2 for x in dense), steps=200),
    ]
    steps = [
        StepOnLink(2, rate, rate, name, ms, ms, ms, 1.0, 1.0)
        for rate, times in ((10.0, (5, 100, 20, 6)), (1000.0, (5, 6, 5.5, 6)))
        for name, ms in zip(("alone", "ddp", "diloco-8", "TopK(0.1) every=8"), times, strict=True)
    ]
    return curves, steps


def test_times_to_the_target_are_steps_by_seconds() -> None:
    curves, steps = a_race()
    assert targets_of(entries(curves)[0]) == {0: pytest.approx(2.0)}
    table = rows(curves, steps)
    named = {(row["method"], row["tokens"]): row for row in table}
    assert list(named) == [("ddp", 1.0), ("diloco-8", 1.0), ("TopK(0.1) every=8", 1.0), ("TopK(0.1) every=8", 2.0)]
    assert [row["steps"] for row in table] == pytest.approx([90, 95, None, 140])
    assert [row["10 Mbit/s"] for row in table] == pytest.approx([9.0, 1.9, math.inf, 0.84])
    assert [row["1000 Mbit/s"] for row in table] == pytest.approx([0.54, 0.5225, math.inf, 0.84])
    slow, fast = verdicts(table, steps)
    assert (slow["packsaddle"], slow["best peer"], slow["ratio"]) == (
        "TopK(0.1) every=8",
        "diloco-8",
        pytest.approx(0.84 / 1.9),
    )
    assert fast["ratio"] == pytest.approx(0.84 / 0.5225)
    shares = {row["contender"]: row["10 Mbit/s"] for row in computing(steps)}
    assert shares == pytest.approx({"ddp": 0.05, "diloco-8": 0.25, "TopK(0.1) every=8": 5 / 6})
    with pytest.raises(ValueError, match="curves must include ddp"):
        rows(curves[2:], steps)


@pytest.mark.nightly
@pytest.mark.process
@pytest.mark.usefixtures("hosts_here")
def test_a_race_from_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Two contenders, two steps each, on a link that is slow upwards; a second call makes nothing again."""
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy.\n" * 50)
    folders: tuple[Any, ...] = ("--out", tmp_path, "--data-dir", tmp_path)
    work = ("--steps", 2, "--every", 1, "--batch", 1, "--lrs", 0.01, "--seeds", 1, "--rounds", 1, "--block", 1)
    arguments = ("loss", *folders, *work, "--rates", "100/1000", "--contenders", "ddp", "TopK(0.01) every=1")
    for _ in range(2):
        assert command("lab.race", *arguments, "--json") == 0
        document = capsys.readouterr().out
        losses, _, _ = json.loads(document[document.index("[\n") :])
        assert [row["method"] for row in losses["rows"]] == ["ddp", "TopK(0.01) every=1"]
    assert losses["setting"]["torch"] == torch.__version__
    recorded = [row.origin for row in (*load(tmp_path / "curves.csv"), *load_steps(tmp_path / "steps.csv"))]
    assert len(set(recorded)) == 1  # all by one machine, on one text
    assert len(recorded[0].text) == 12
    asked = [4 if word == 2 else word for word in arguments]  # the losses after two steps are none after four
    said = f"out must be the folder of a race of steps 4, got {tmp_path}, which is of 2"
    refused(capsys, said, "lab.race", *asked, "--only", "tables")
    d = losses["setting"]["d"]
    assert losses["rows"][0]["kB"] == pytest.approx(4e-3 * d, rel=1e-3)
    assert len(load(tmp_path / "curves.csv")) == 2
    alone, dense, ours = load_steps(tmp_path / "steps.csv")
    assert (dense.up, dense.down) == (100, 1000)
    assert dense.ms > 4e-3 * d * 8 / 100  # at the rate of the slower way
    assert alone.kb == 0 < ours.kb < dense.kb / 20
