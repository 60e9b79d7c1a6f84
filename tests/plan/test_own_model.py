"""packsaddle plan link --model MODULE:FUNCTION: a user's own model, its measured step, and the lines to paste."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from commandline import command, refused
from torch import Tensor, nn

from packsaddle import QSGD, Identity, LocalUpdates, OuterSGD, Rounded, Sign
from packsaddle.cli.plan_link import _optimizers
from packsaddle.cli.plan_link_text import advice, coding_spread, flush_seconds, spread
from packsaddle.errors import ConfigError
from packsaddle.hooks import DDPHook
from packsaddle.plan import Fleet, Line, Link, ModelSize, Pace, Setting, TrainingStep, forecast, forecast_local, timing
from packsaddle.plan.model import muon_and_adamw
from packsaddle.plan.timing import Timing, repeated

SCRIPT = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.hidden, self.head = nn.Embedding(50, 40), nn.Linear(40, 40), nn.Linear(40, 50)
        self.frozen = nn.Linear(40, 40).requires_grad_(False)

    def forward(self, x):
        return self.head(self.frozen(self.hidden(self.tokens(x))).relu())

def make_model():
    return Model()

def make_batch(batch):
    assert batch == 3
    return torch.zeros(batch, 7, dtype=torch.int64)

def broken(*arguments):
    raise KeyError("no data")

def number(*arguments):
    return 5
"""
TRAINED = 50 * 40 + 40 * 40 + 40 + 50 * 40 + 50
ASKED = ("plan", "link", "1mbit", "--workers", 2, "--compressor", "randomk")


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "script_to_plan", raising=False)
    (tmp_path / "script_to_plan.py").write_text(SCRIPT)


@pytest.mark.usefixtures("script")
@pytest.mark.parametrize("example", [("--data", "script_to_plan:make_batch"), ("--input", "int64:7")])
def test_a_model_of_ones_own(example: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Trained parameters are counted, and the forecast is for the fastest measured step."""
    before = torch.get_rng_state()
    assert command(*ASKED, "--model", "script_to_plan:make_model", *example, "--batch", 3, "--json") == 0
    assert torch.equal(torch.get_rng_state(), before)
    found = json.loads(capsys.readouterr().out)
    assert found["compressed"] + found["dense"] == TRAINED
    assert found["optimizer"] == "adamw"
    step = found["measured_step"]
    assert 0 < step["low"] <= step["median"] <= step["high"]
    assert step["repeats"] >= 5
    assert found["fleet"]["compute"] == step["low"]
    assert found["local"]  # implied


@pytest.mark.usefixtures("script")
def test_a_model_of_ones_own_is_advised(capsys: pytest.CaptureFixture[str]) -> None:
    """The tables end with the spread, the lines to paste and the advice, for the slowest step too."""
    assert command(*ASKED, "--model", "script_to_plan:make_model", "--input", "int64:7", "--batch", 2) == 0
    out = capsys.readouterr().out
    assert "steps with adamw, which took" in out
    assert "    import packsaddle\n" in out
    assert "as long as the slowest measured one, use: " in out
    assert out.splitlines()[-1].startswith("Use: ")


@pytest.mark.usefixtures("script")
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    own, tokens = ("--model", "script_to_plan:make_model"), ("--input", "int64:7")
    refusals: dict[tuple[Any, ...], str] = {
        own: "--model MODULE:FUNCTION needs one of --data MODULE:FUNCTION, --input SHAPE and --compute",
        (*own, *tokens, "--compute", 1): "--model MODULE:FUNCTION needs one of --data",
        (*own, "--input", "3x"): "--input must be a shape such as 3x224x224, or int64:1024 for tokens, got '3x'",
        (*own, "--input", "7"): "script_to_plan:make_model failed on its batch: ",
        (*own, *tokens, "--batch", 0): "batch must be at least 1, got 0",
        (*own, "--data", "script_to_plan:broken"): "script_to_plan:broken failed: KeyError: 'no data'",
        (*own, "--data", "make_batch"): "the function must be given as module:function, got 'make_batch'",
        ("--model", "script_to_plan:number", *tokens): "script_to_plan:number must return a torch.nn.Module, got int",
        ("--model", "script_to_plan:none", *tokens): "script_to_plan has no function 'none'",
        ("--model", "no_such_module:f", *tokens): "No module named 'no_such_module'; is it in the current folder?",
        ("--d", 5, "--compute", 1, *tokens): "--input is for --model MODULE:FUNCTION",
        ("--d", 5, "--compute", 1, "--data", "script_to_plan:make_batch"): "--data is for --model MODULE:FUNCTION",
    }
    for words, message in refusals.items():
        refused(capsys, message, *ASKED, *words)


class Returning(nn.Module):
    """A model whose output is made of w, 2.0, by a function."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.w, self.output = nn.Parameter(torch.tensor([2.0])), output

    def forward(self, *arguments: Tensor, **named: Tensor) -> Any:
        return self.output(self.w, *arguments, **named)


def test_the_loss_is_what_the_model_returns() -> None:
    """A scalar comes before logits, as in nanoGPT and transformers; without one, the mean square of each tensor."""
    x = torch.tensor([3.0, 5.0])
    outputs = {
        lambda w, x: (w * x, (w * x).sum()): 16.0,
        lambda w, x: {"loss": w.sum() + x[0], "logits": w * x}: 5.0,
        lambda w, x: w * x: (36 + 100) / 2,
        lambda w, x: [w * x, {"more": (w + x, torch.ones(2))}]: (36 + 100) / 2 + (25 + 49) / 2,
    }
    for output, expected in outputs.items():
        assert TrainingStep(Returning(output), x).loss().item() == expected
        assert TrainingStep(Returning(output), (x,)).loss().item() == expected
        assert TrainingStep(Returning(output), {"x": x}).loss().item() == expected
    with pytest.raises(ConfigError, match="must return a loss, or tensors with gradients, got Tensor"):
        TrainingStep(Returning(lambda w, x: x), x).loss()


def test_random_tokens_are_of_every_embedding() -> None:
    model = nn.Sequential(nn.Embedding(1000, 4), nn.Embedding(3, 4))
    found = TrainingStep.of_model(model, (50,), 8, tokens=True).batch
    assert (found.shape, set(found.unique().tolist())) == ((8, 50), {0, 1, 2})
    with pytest.raises(ConfigError, match="this one has none"):
        TrainingStep.of_model(nn.Linear(2, 2), (50,), 8, tokens=True)


def test_muon_is_for_hidden_matrices() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9))
    muon, adamw = _optimizers(model, "muon")
    (hidden,) = muon.param_groups[0]["params"]
    assert hidden is model[1].weight
    others = {id(p) for p in adamw.param_groups[0]["params"]}
    assert others == {id(p) for p in model.parameters()} - {id(hidden)}


def test_matrices_outside_linear_layers_are_hidden_too() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16)
    model = nn.Sequential(nn.EmbeddingBag(9, 8), layer, nn.Linear(8, 9))
    muon, _ = muon_and_adamw(model, {"lr": 0.1}, {"lr": 0.2})
    projections = [layer.self_attn.in_proj_weight, layer.self_attn.out_proj.weight]
    expected = [*projections, layer.linear1.weight, layer.linear2.weight]
    assert list(map(id, muon.param_groups[0]["params"])) == list(map(id, expected))
    with pytest.raises(ConfigError, match="muon is for matrices of hidden layers, and the model has none"):
        muon_and_adamw(nn.Linear(2, 2), {}, {})


@pytest.mark.parametrize(
    ("seconds", "repeats"),
    [
        ([1.0, 1.0, 1.0, 5.0, 5.0, 5.0], 5),
        ([9.0, 8.0, 7.0, 6.0, 1.0, 1.0, 2.0, 1.01, 1.0], 8),
        ([9.0, 8.0, 7.0, 6.0, 5.0, 4.0], 3 + 1),
    ],
    ids=["reproduced", "reproduced later", "at the limit"],
)
def test_a_step_is_repeated_until_its_minimum_is_reproduced(
    seconds: list[float], repeats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    times, least = iter(seconds), 5 if repeats > 4 else 3
    monkeypatch.setattr(timing, "clocked", lambda work: next(times))
    found = repeated(lambda: None, least=least, limit=50.0 if repeats > 4 else 25.0)
    assert found == Timing.of(seconds[:repeats])


def test_a_busy_machine_is_named() -> None:
    busy = spread(Timing.of([1.0, 1.5, 2.0]), "muon")
    assert busy == (
        "That is the minimum of 3 steps with muon, which took 1,000 to 2,000 ms. The machine is busy: the median is "
        "50% longer. Repeat this on an idle one."
    )
    assert "busy" not in spread(Timing.of([1.0, 1.05, 2.0]), "adamw")
    assert coding_spread(0.15) == "Coding times are minima of repeated calls, whose medians are up to 15% longer."
    assert coding_spread(0.6).endswith("up to 60% longer. The machine is busy: repeat this on an idle one.")


def test_functions_are_repeated_until_their_minima_are_reproduced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both in turns, as long as one of them is not; or until the limit."""
    times = iter([9.0, 9.0, 1.0, 5.0, 1.0, 4.0, 1.0, 4.0, 1.0, 4.1])
    monkeypatch.setattr(timing, "clocked", lambda work: next(times))
    works: dict[str, Callable[[], object]] = {"a": int, "b": int}
    found = timing.side_by_side(works, repeats=2, within=0.1)  # after a warm-up
    assert found == {"a": Timing.of([1.0] * 4), "b": Timing.of([5.0, 4.0, 4.0, 4.1])}
    times = iter([9.0, 9.0, 1.0, 5.0, 1.0, 4.0, 1.0, 3.0, 1.0, 2.0])
    assert timing.side_by_side(works, repeats=2, within=0.1, limit=15.0)["b"] == Timing.of([5.0, 4.0, 3.0])


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("rate", "workers", "steps", "expected"),
    [(1e5, 2, 1.0, "local"), (1e6, 2, 100.0, "hook"), (30e6, 32, 100.0, "hook"), (1e15, 2, 100.0, None)],
)
def test_the_lines_to_paste_run(rate: float, workers: int, steps: float, expected: str | None) -> None:
    free = Pace(Line(0, 0), Line(0, 0), Line(0, 0))
    size, fleet, link = ModelSize.of_size(10_000_000), Fleet(workers, 0.5), Link(1e-5, rate)
    verdict = forecast(size, link, fleet, [QSGD(127)], lambda c, d: free, optimizer="adamw")
    settings = {Setting(8, Sign(per_tensor=True), keep_unsent=True, delay=4): steps, Setting(1, Identity()): 2 * steps}
    local = forecast_local(size, link, fleet, lambda c, d: free, measured=settings)[0]
    lines = advice(verdict, local, "adamw").lines
    model = nn.Linear(64, 64)
    names: dict[str, Any] = {"torch": torch, "model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    exec("\n".join(line.strip() for line in lines), names)
    if expected == "local":
        assert isinstance(names["local"], LocalUpdates)
        assert "every=8, compressor=packsaddle.Sign(per_tensor=True), overlap=" in lines[1]
    elif expected == "hook":
        assert isinstance(names["hook"], DDPHook)
    else:
        assert lines == []


@pytest.mark.parametrize(
    ("setting", "optimizer", "expected"),
    [
        (Setting(2, Sign(per_tensor=True), keep_unsent=True), "adamw", None),
        (Setting(8, Sign(per_tensor=True), keep_unsent=True), "muon", None),
        (Setting(32, Sign(per_tensor=True), keep_unsent=True), "muon", "outer=packsaddle.OuterSGD(momentum=0.5)"),
        (Setting(32, Rounded(), keep_unsent=True), "muon", "outer=packsaddle.OuterSGD(momentum=0.5)"),
        (Setting(8, Sign(per_tensor=True), keep_unsent=True, delay=2), "adamw", None),
        (Setting(8, Identity()), "adamw", None),
    ],
    ids=["AdamW", "Muon", "Muon, every 32", "Muon, two bits every 32", "delay", "uncompressed"],
)
def test_the_lines_have_a_momentum_where_it_helped(setting: Setting, optimizer: Any, expected: str | None) -> None:
    free = Pace(Line(0, 0), Line(0, 0), Line(0, 0))
    size, fleet, link = ModelSize.of_size(10_000_000), Fleet(2, 0.5), Link(1e-5, 1e5)
    verdict = forecast(size, link, fleet, [QSGD(127)], lambda c, d: free, optimizer="adamw")
    local = forecast_local(size, link, fleet, lambda c, d: free, measured={setting: 1.0})[0]
    lines = advice(verdict, local, optimizer).lines
    outer = "outer=packsaddle.OuterSGD(momentum=0.5)"
    assert [outer] * (outer in lines[1]) == ([expected] if expected else [])
    model = nn.Linear(64, 64)
    adamw = torch.optim.AdamW([model.bias] if optimizer == "muon" else model.parameters())
    muon = torch.optim.Muon([model.weight])
    names: dict[str, Any] = {"model": model, "optimizer": adamw, "adamw": adamw, "muon": muon}
    if expected:
        exec("\n".join(line.strip() for line in lines), names)
        options = names["local"].options
        assert (options.mean_momentum, options.outer) == (0.0, OuterSGD(momentum=0.5))


@pytest.mark.parametrize(
    ("setting", "bits"), [(Setting(8, Sign(per_tensor=True), keep_unsent=True), 4), (Setting(8, Identity()), 32)]
)
def test_the_flush_of_uncompressed_rounds_takes_longer(setting: Setting, bits: int) -> None:
    """A ring all-reduce by two workers sends each value once."""
    free, size, rate = Pace(Line(0, 0), Line(0, 0), Line(0, 0)), ModelSize.of_size(10_000_000), 1e5
    fleet, link = Fleet(2, 0.5), Link(1e-5, rate)
    verdict = forecast(size, link, fleet, [QSGD(127)], lambda c, d: free, optimizer="adamw")
    local = forecast_local(size, link, fleet, lambda c, d: free, measured={setting: 1.0})[0]
    assert flush_seconds(verdict, local, rate) == pytest.approx(10_000_000 * bits / 8 / rate, rel=0.01)
