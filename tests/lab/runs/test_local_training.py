"""Runs with [local]: what is refused, against loops written by hand, certificates at the anchor, real processes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import command
from runs import CONFIG
from torch import Tensor, nn

from lab.runs.config import Config, load
from lab.runs.run_folder import RunFolder
from lab.runs.trainer import Trainer
from lab.runs.training import LocalTraining, make_inner
from lab.tasks.images import load_data
from lab.tasks.models import make_task
from lab.tasks.sharding import Calendar, deal
from packsaddle import LocalUpdates, Overlap, simulate
from packsaddle.cli.folders import make_new
from packsaddle.errors import ConfigError
from packsaddle.numerics.seeds import Stream, mix

LOCAL = """
[local]
optimizer = "adamw"
every = 6
overlap = { delay = 2, fragments = 2 }
outer = { momentum = 0.5 }
clip = 0.05
"""
KEYS = ("lr=0.003", "weight_decay=0.1", "noise.std=0.0005", "decay=0.95")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "local.toml"
    file.write_text(CONFIG + LOCAL)
    return file


def by_hand(config: Config, rank: int) -> tuple[dict[str, Tensor], int]:
    """Train one worker's network with AdamW and LocalUpdates; return its weights and the rounds."""
    data = load_data(config.data, None, train=True, download=False)
    task = make_task(config.model, data.shape, data.classes, mix(config.seed, int(Stream.INIT)) >> 33)
    optimizer = torch.optim.AdamW(task.parameters(), lr=0.003, weight_decay=0.1)
    local = LocalUpdates(
        optimizer,
        config.compression(),
        every=6,
        outer=lambda anchors: torch.optim.SGD(anchors, lr=0.7, momentum=0.5, nesterov=True),
        overlap=Overlap(2, fragments=2),
        noise=0.0005,
        seed=config.seed,
    )
    (batches,) = deal(data, "iid", config.batch_size, seed=config.seed, history=[(0, 2)], workers=[rank])
    for step in range(20):
        optimizer.zero_grad()
        task(*data.batch(batches[step], torch.device("cpu"), torch.float32)).backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 0.05)
        optimizer.step()
    assert local.flush()
    return {name: value.clone() for name, value in task.network.state_dict().items()}, local.rounds


def test_a_run_is_the_loop_that_one_would_write(path: Path, tmp_path: Path) -> None:
    """Bit for bit; with checkpoints, whose votes are averaged beside, and what its folder says."""
    out = tmp_path / "run"
    assert command("lab", "run", path, "--workers", 2, "--serial", "--out", out, "--set", *KEYS) == 0
    found = simulate(lambda rank: by_hand(load(path, KEYS), rank), 2)
    trained = torch.load(out / "checkpoint" / "model.pt", weights_only=True)
    for weights, _ in found:
        assert weights.keys() == trained.keys()
        assert all(torch.equal(weights[name], trained[name]) for name in trained)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    # Fragments start after steps 3, 6, 9, ..., 18, and the last lands at 20; then each has a round more.
    assert [line["rounds"] for line in lines] == [2, 8]
    assert summary["rounds"] == found[0][1] == 8
    assert (summary["local"]["every"], summary["local"]["optimizer"]) == (6, "adamw")
    assert all(0 < line["mu"] < 1 for line in lines)
    assert summary["bytes_by_purpose"]["metrics"]["payload"] > 0
    worker = torch.load(out / "checkpoint" / "worker-1.pt", weights_only=True)
    assert worker.keys() == {"optimizer", "local"}


def test_certificates_and_iterates_are_of_the_anchor(path: Path, tmp_path: Path) -> None:
    """In the midst of a round workers are apart, and yet have the certificate of one point: that of a fused sample."""
    keys = (*KEYS, "certify={epsilon=1.0, at=[0.4], iterates=3, max_hvps=2}", "log_every=1")
    config = load(path, keys)
    folder = RunFolder(tmp_path / "run")
    make_new(folder.path)

    def train(rank: int) -> list[list[Tensor]]:
        trainer, seen = Trainer(config, None, False), []
        look = trainer.inspector.inspect

        def looked(step: int, into: RunFolder) -> None:
            seen.append([p.detach().clone() for p in trainer.task.parameters()])
            look(step, into)

        trainer.inspector.inspect = looked  # type: ignore[method-assign]
        assert trainer.run(folder, quiet=True)
        return seen

    ours, theirs = simulate(train, 2)
    assert len(ours) >= 3
    for mine, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    certificates = [json.loads(line) for line in (folder.path / "certificates.jsonl").read_text().splitlines()]
    assert [c["step"] for c in certificates] == [8, 20]
    assert "lr" not in certificates[0] or certificates[0]["lr"] is None  # it is no SGD's


def test_the_learning_rate_rises_and_falls(path: Path) -> None:
    """lr / 8 at the first of 8 steps, lr from the eighth on, a tenth of it at the end, half in between."""
    config = load(path, ["lr=0.1", "epochs=2", "local.warm_up=0.4", "local.schedule=cosine"])
    calendar = Calendar.of([(0, 2)], 640, 16, 2.0)
    training = LocalTraining(config, nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40)), calendar, None)
    found = [training.rate(step) for step in range(41)]
    assert found[:8] == pytest.approx([0.1 * n / 8 for n in range(1, 9)])
    assert found[8:] == pytest.approx([0.01 + 0.09 * (1 + math.cos(math.pi * (n - 8) / 32)) / 2 for n in range(8, 41)])
    assert found == sorted(found[:8]) + sorted(found[8:], reverse=True)
    training.replan(Calendar.of([(0, 2), (10, 1)], 640, 16, 2.0))  # 60 steps more, twice as many an epoch
    assert training.rate(10) == pytest.approx(training.rate(11), rel=0.05)
    assert training.rate(70) == pytest.approx(0.01)


def test_muon_is_for_matrices(path: Path) -> None:
    """As two optimizers side by side; also after its state was saved and loaded."""
    config = load(path, ["local.optimizer=muon", "momentum=0.9", "nesterov=true", "lr=0.01", "local.betas=[0.8, 0.9]"])
    assert config.local is not None
    nets = [nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    ours = make_inner(config, config.local, nets[0])
    matrices = [nets[1][1].weight]  # not the embedding, nor the output layer
    others = [p for p in nets[1].parameters() if p is not matrices[0]]
    apart: list[Any] = [
        torch.optim.Muon(matrices, 0.01, 0.0, 0.9, True, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, 0.01, (0.8, 0.9), weight_decay=0.0),
    ]
    for step in range(6):
        if step == 3:
            state = ours.state_dict()
            ours = make_inner(config, config.local, nets[0])
            ours.load_state_dict(state)
        codes = torch.randint(7, (8,), generator=torch.Generator().manual_seed(step))
        for net in nets:
            net.zero_grad()
            net(codes).square().sum().backward()
        for optimizer in (ours, *apart):
            optimizer.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ConfigError, match="muon is for matrices of hidden layers"):
        make_inner(config, config.local, nn.Linear(4, 4))
    (muon, _) = make_inner(load(path, ["local.optimizer=muon"]), config.local, nets[0]).param_groups
    assert (muon["momentum"], muon["nesterov"]) == (0.95, True)  # Muon's own, where the configuration has none
    (muon, _) = make_inner(load(path, ["local.optimizer=muon", "momentum=0.0"]), config.local, nets[0]).param_groups
    assert (muon["momentum"], muon["nesterov"]) == (0.0, False)
