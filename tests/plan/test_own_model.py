"""packsaddle plan link --model MODULE:FUNCTION: a user's own model, its measured step, and the lines to paste."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from commandline import command, refused
from torch import Tensor, nn

from packsaddle import QSGD, Identity, LocalUpdates, OuterSGD, Rounded, Sign
from packsaddle.cli.plan_link import _optimizers
from packsaddle.cli.plan_link_text import LinkPlan, Method, advised, compared, methods, print_verdict
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

def sizes():
    with torch.device("meta"):
        return Model()
"""
TRAINED = 50 * 40 + 40 * 40 + 40 + 50 * 40 + 50
ASKED = ("plan", "link", "1mbit", "--workers", 2)


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
    assert found["local"]


@pytest.mark.usefixtures("script")
def test_a_model_on_the_meta_device_has_only_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    own = (*ASKED, "--model", "script_to_plan:sizes")
    assert command(*own, "--compute", 1, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["compressed"] + found["dense"] == TRAINED
    refused(capsys, "script_to_plan:sizes failed on its batch", *own, "--input", "int64:7")


@pytest.mark.usefixtures("script")
def test_a_model_of_ones_own_is_advised(capsys: pytest.CaptureFixture[str]) -> None:
    """The advice and the lines to paste come first; tables are printed on demand only."""
    assert command(*ASKED, "--model", "script_to_plan:make_model", "--input", "int64:7", "--batch", 2) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith("Use: ")
    assert "x steps" not in out
    assert command(*ASKED, "--model", "script_to_plan:make_model", "--input", "int64:7", "--batch", 2, "--table") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith("Use: ")
    assert "ms of computing a step" in out


@pytest.mark.usefixtures("script")
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    own, tokens = ("--model", "script_to_plan:make_model"), ("--input", "int64:7")
    refusals: dict[tuple[Any, ...], str] = {
        own: "--model needs one of --data MODULE:FUNCTION, --input SHAPE and --compute SECONDS",
        (*own, *tokens, "--compute", 1): "--model needs one of --data",
        (*own, "--input", "3x"): "--input must be a shape such as 3x224x224, or int64:1024 for tokens, got '3x'",
        (*own, "--input", "7"): "script_to_plan:make_model failed on its batch, float32 of shape (32, 7): ",
        (*own, *tokens, "--batch", 0): "batch must be at least 1, got 0",
        (*own, "--data", "script_to_plan:broken"): "script_to_plan:broken failed: KeyError: 'no data'",
        (*own, "--data", "make_batch"): "the function must be given as module:function, got 'make_batch'",
        ("--model", "script_to_plan:number", *tokens): "script_to_plan:number must return a torch.nn.Module, got int",
        ("--model", "script_to_plan:none", *tokens): "script_to_plan has no function 'none'",
        ("--model", "no_such_module:f", *tokens): "No module named 'no_such_module'; is it in the current folder?",
        ("--d", 5, "--compute", 1, *tokens): "--data and --input are for --model MODULE:FUNCTION",
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
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16)
    model = nn.Sequential(nn.EmbeddingBag(9, 8), layer, nn.Linear(8, 9))
    muon, adamw = _optimizers(model, "muon")
    projections = [layer.self_attn.in_proj_weight, layer.self_attn.out_proj.weight]
    expected = [*projections, layer.linear1.weight, layer.linear2.weight]
    assert list(map(id, muon.param_groups[0]["params"])) == list(map(id, expected))
    others = {id(p) for p in model.parameters()} - {*map(id, expected)}
    assert {id(p) for p in adamw.param_groups[0]["params"]} == others
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


def planned(size: int, rate: float, workers: int, compute: float, measured: Any, optimizer: Any = "adamw") -> LinkPlan:
    """Return the plan for a link of `rate` bytes a second, with settings of local updates and free coding."""
    free = Pace(Line(0, 0), Line(0, 0), Line(0, 0))
    model, fleet, link = ModelSize.of_size(size), Fleet(workers, compute), Link(1e-5, rate)
    verdict = forecast(model, link, fleet, {QSGD(127): 1.04}, lambda c, d: free)
    local = forecast_local(model, link, fleet, measured, lambda c, d: free)
    return LinkPlan(verdict, local, model, link, fleet, 0.0, optimizer, None)


def test_a_busy_machine_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """By a median far above the minimum."""
    plan = planned(10_000_000, 30e6, 2, 0.5, {Setting(8, Identity()): 1.3})
    for seconds, busy in (([0.5, 0.5, 5.0], False), ([0.5, 0.6, 5.0], True)):
        print_verdict(replace(plan, timing=Timing.of(seconds)))
        assert ("The machine is busy: repeat this on an idle one." in capsys.readouterr().out) is busy


def test_the_simplest_method_within_the_error_is_advised() -> None:
    """10 million parameters, 40 MB: by W machines in turn, by DDP, behind the hook, and by local updates."""
    every = {Setting(8, Sign(per_tensor=True), keep_unsent=True): 1.2, Setting(8, Identity()): 1.1}
    expected = {(1e3, 1.0): "one machine", (1e6, 1.0): "LocalUpdates", (1e12, 1.0): "Distributed", (1e5, 1e-3): "one"}
    for (rate, compute), name in expected.items():
        plan = planned(10_000_000, rate, 2, compute, every)
        found = methods(plan)
        assert found[0] == Method("one machine alone", 2 * compute)
        assert advised(plan).name.startswith(name), (rate, compute)
        least = min(method.seconds for method in found)
        assert all(m.seconds >= 1.1 * least for m in found[: found.index(advised(plan))])


def test_uncompressed_local_sgd_is_compared() -> None:
    """The fastest without compression and delay, at its own number of steps; not twice if it is the fastest of all."""
    sign, sgd = Setting(8, Sign(per_tensor=True), keep_unsent=True), Setting(8, Identity())
    late = Setting(8, Identity(), delay=4)
    plan = planned(10_000_000, 1e6, 2, 1.0, {sign: 1.2, sgd: 1.1, late: 1.1, Setting(32, Identity()): 9.0})
    (found,) = (method for method in compared(plan) if method.name == "uncompressed local SGD, every 8")
    assert found.seconds == pytest.approx(1.1 * (1.0 + 40 / 8), rel=1e-3)
    seconds = [method.seconds for method in compared(plan)]
    assert seconds == sorted(seconds)
    names = [method.name for method in compared(planned(10_000_000, 1e6, 2, 1.0, {sgd: 1.1}))]
    assert names.count("LocalUpdates, every 8, Identity()") == 1
    assert "uncompressed local SGD, every 8" not in names


def test_a_step_of_fixed_costs_is_too_small_to_forecast(capsys: pytest.CaptureFixture[str]) -> None:
    """Below 10 ms a step of DDP is advised, whatever the forecast."""
    measured = {Setting(8, Sign(per_tensor=True), keep_unsent=True): 1.2}
    for size, small in ((2_000, True), (20_000, False)):  # 8 and 80 kB at 1 MB/s: 8 and 80 ms by two workers, about
        plan = planned(size, 1e6, 2, 1e-4, measured)
        assert (plan.verdict.dense.seconds < 0.01) is small
        print_verdict(plan)
        out = capsys.readouterr().out
        assert ("Too small to forecast: " in out) is small
        assert out.startswith(f"Use: {'DistributedDataParallel' if small else 'one machine alone'}.")


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
    ("rate", "workers", "steps", "index", "expected"),
    [
        (1e5, 2, 1.0, 3, "local"),
        (1e6, 2, 100.0, 2, "hook"),
        (30e6, 32, 100.0, 2, "hook"),
        (1e15, 2, 100.0, 1, None),
        (1e3, 2, 100.0, 0, None),
    ],
)
def test_the_lines_to_paste_run(rate: float, workers: int, steps: float, index: int, expected: str | None) -> None:
    settings = {Setting(8, Sign(per_tensor=True), keep_unsent=True, delay=4): steps, Setting(1, Identity()): 2 * steps}
    lines = methods(planned(10_000_000, rate, workers, 0.5, settings))[index].lines
    model = nn.Linear(64, 64)
    names: dict[str, Any] = {"torch": torch, "model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    exec("\n".join(line.strip() for line in lines), names)
    if expected == "local":
        assert isinstance(names["local"], LocalUpdates)
        assert "every=8, compressor=packsaddle.Sign(per_tensor=True), overlap=" in lines[1]
    elif expected == "hook":
        assert isinstance(names["hook"], DDPHook)
    else:
        assert lines == ()


@pytest.mark.parametrize(
    ("setting", "optimizer", "expected"),
    [
        (Setting(8, Sign(per_tensor=True), keep_unsent=True), "muon", None),
        (Setting(32, Sign(per_tensor=True), keep_unsent=True), "muon", "outer=packsaddle.OuterSGD(momentum=0.5)"),
        (Setting(32, Rounded(), keep_unsent=True), "muon", "outer=packsaddle.OuterSGD(momentum=0.5)"),
        (Setting(8, Identity()), "adamw", None),
    ],
    ids=["Muon", "Muon, every 32", "Muon, two bits every 32", "uncompressed"],
)
def test_the_lines_have_a_momentum_where_it_helped(setting: Setting, optimizer: Any, expected: str | None) -> None:
    lines = methods(planned(10_000_000, 1e5, 2, 0.5, {setting: 1.0}, optimizer))[-1].lines
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
