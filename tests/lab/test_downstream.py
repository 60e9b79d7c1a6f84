"""The study of fine-tuning after local updates: its line, its alphabet, and one tiny run of all its parts."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lab.bench import muon
from lab.bench.rows_file import read_rows
from lab.downstream import curvature, finetune, pretrain
from lab.downstream.__main__ import make
from lab.downstream.curvature import Curvature, measure
from lab.downstream.finetune import RATES, Tuned
from lab.downstream.line import Line, Point
from lab.downstream.pretrain import Pretrained, Run
from lab.downstream.second_text import translate
from lab.runs import DataConfig, ModelConfig
from lab.runs.tasks import cut_text, encode_text


def points(seed: int, count: int) -> list[Point]:
    """Return noisy points of three seeds, `count` of each, about parallel lines of slope 0.7."""
    rng = np.random.default_rng(seed)
    xs = rng.uniform(1.4, 1.7, (3, count))
    return [Point(s, float(x), 0.7 * float(x) + 0.1 * s + rng.normal(0, 0.01)) for s in range(3) for x in xs[s]]


def test_line_is_ordinary_least_squares() -> None:
    """The interval of a new group's mean is that of its coefficient in a regression with an indicator of the group."""
    dense, others = points(0, 3), points(1, 1)
    line = Line.fit(dense)
    design = np.array([[*(float(p.seed == s) for s in range(3)), p.x] for p in dense])
    y = np.array([p.y for p in dense])
    solution, squares, _, _ = np.linalg.lstsq(design, y, rcond=None)
    assert [*line.intercepts.values(), line.slope] == pytest.approx(list(solution))
    assert line.freedom == 9 - 4
    assert line.deviation == pytest.approx(math.sqrt(squares[0] / 5))

    # The mean prediction is linear in y with the weights a^T (X^T X)^-1 X^T, a the mean row of the new group.
    mean_row = np.array([[*(float(p.seed == s) for s in range(3)), p.x] for p in others]).mean(axis=0)
    variance = mean_row @ np.linalg.inv(design.T @ design) @ mean_row + 1 / 3
    found = line.residuals(others)
    assert found.half_width == pytest.approx(2.5706 * line.deviation * math.sqrt(variance), rel=1e-4)
    by_hand = [p.y - solution[p.seed] - solution[3] * p.x for p in others]
    assert found.values == pytest.approx(tuple(by_hand))
    assert found.mean == pytest.approx(sum(by_hand) / 3)


def test_interval_contains_zero_in_95_percent_of_samples() -> None:
    inside = 0
    for seed in range(400):
        found = Line.fit(points(2 * seed, 3)).residuals(points(2 * seed + 1, 1))
        inside += abs(found.mean) <= found.half_width
    assert 0.92 <= inside / 400 <= 0.98


def test_line_rejects_too_few_models_and_other_seeds() -> None:
    with pytest.raises(ValueError, match="got 3 models"):
        Line.fit(points(0, 1))
    with pytest.raises(ValueError, match=r"must have seeds \[0, 1, 2\], got \[0, 0, 1, 1, 2, 2\]"):
        Line.fit(points(0, 3)).residuals(points(0, 2))


def test_characters_keep_their_meaning_and_others_are_removed() -> None:
    text = "die Straße, die strasse" * 20
    codes, vocabulary = encode_text(text)
    alphabet = "adeinrst "
    translated = translate(codes, vocabulary, alphabet)
    assert "".join(alphabet[code - 1] for code in translated.tolist()) == "".join(c for c in text if c in alphabet)
    rare = torch.zeros(3, dtype=torch.int16)
    assert len(translate(rare, vocabulary, alphabet)) == 0


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every part use a tiny model and one short text, the second text too."""
    encoded = encode_text("".join(f"{i} squared is {i * i}, its cube {i**3}. " for i in range(200)))
    first, held_out = (
        cut_text(DataConfig("text", context=16), *encoded, "squares", train=part) for part in (True, False)
    )
    setting = muon.Setting(ModelConfig("char-transformer", width=8, depth=1, heads=2), 2, 0, batch=2)
    monkeypatch.setattr(muon, "texts", lambda library: (first, held_out))
    monkeypatch.setattr(pretrain, "SETTING", setting)
    monkeypatch.setattr(finetune, "SETTING", setting)
    monkeypatch.setattr(finetune, "STEPS", 10)
    monkeypatch.setattr(finetune, "second_text", lambda: (first, held_out))
    for module in (finetune, curvature):
        monkeypatch.setattr(module, "load_library", lambda config, train: first if train else held_out)


@pytest.mark.usefixtures("tiny")
def test_a_model_is_pretrained_certified_and_fine_tuned_once(tmp_path: Path) -> None:
    run = Run("DiLoCo", 32, 0)
    for _ in range(2):
        make(run, tmp_path, tmp_path)
        measure(run, tmp_path / "curvature.csv", tmp_path)
    (pretrained,) = read_rows(tmp_path / "pretraining.csv", Pretrained.of_row, "pretraining")
    tuned = {t.rate: t.loss for t in read_rows(tmp_path / "finetuning.csv", Tuned.of_row, "fine-tuning")}
    (found,) = read_rows(tmp_path / "curvature.csv", Curvature.of_row, "certificate")

    # The stored weights are those of the row; fine-tuning on more of the same text improves them.
    assert tuned[0.0] == pytest.approx(pretrained.loss, abs=1e-4)
    assert sorted(tuned) == [0.0, *RATES]
    assert min(tuned, key=tuned.__getitem__) > 0
    network = finetune.network_of(run, tmp_path)
    network(*curvature.windows()[0]).backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert found.grad_norm == pytest.approx(float(torch.cat([g.flatten() for g in gradients]).norm()), rel=1e-3)
    assert found.lambda_min < found.lambda_max
