"""Saved states of every front: each path has a kind, and a state that is damaged at any one path is refused."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from gloo import run_in_processes
from specs import folded
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import packsaddle
from packsaddle import CompressedSGD, Compression, Escape, LocalUpdates, LowRank, OuterSGD, Overlap, RandomK, TopK
from packsaddle.feedback.state import FORMAT, Rule, State, Vector

Path = tuple[Any, ...]
NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")

# Every path of every front's state, "*" for the key of a parameter, group or fragment, and its kind.
OPTIMIZER = """
error: state.*.error, state.*.momentum
own: contraction.by_tensor, contraction.steps, contraction.whole, ledger, skips.consecutive, skips.total
constant: param_groups.*.rank, param_groups.*.workers
shared: aggregator.compressor, aggregator.state, noise, noise.kept, noise.size, noise.total,
    param_groups.*.start_step, param_groups.*.direction, param_groups.*.format, param_groups.*.lr,
    param_groups.*.param_names, param_groups.*.params, param_groups.*.seed, param_groups.*.step,
    param_groups.*.weight_decay, resets, state.*.start
"""
HOOK = """
error: error.*
own: ledger
constant: identity.rank, identity.workers
shared: aggregator, aggregator.compressor, aggregator.state, format, identity.exchange, identity.scope, identity.seed,
    skips.consecutive, skips.total, steps
"""
LOCAL = """
error: fragments.*.error.*, fragments.*.exchange.start.*, fragments.*.owed.*, fragments.*.shift.*
own: fragments.*.aggregator.compressor, fragments.*.aggregator.state, fragments.*.contraction.steps,
    clipped, fragments.*.trained, uncompressed, fragments.*.contraction.whole, ledger, pacing, schedule,
    share, skips.consecutive, skips.total
constant: fragments.*.exchange.invalid, fragments.*.made, identity.rank, identity.workers
shared: escape.start, escape.step, format, fragments.*.anchor.*, fragments.*.exchange,
    fragments.*.exchange.applied, fragments.*.exchange.due, fragments.*.exchange.mean, fragments.*.exchange.reports,
    fragments.*.rejected, fragments.*.rounds, identity.delay, identity.escape, identity.every, identity.fragments,
    identity.keep_unsent, identity.outer, identity.parameters, identity.seed, identity.weight_by_steps, outer, resets,
    steps
"""


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))


def train(model: nn.Module, optimizer: Any, steps: int) -> None:
    for t in range(steps):
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()


def escape(model: nn.Module) -> Escape:
    return Escape(2, 10.0, lambda: sum(float(p.square().sum()) for p in model.parameters()))


def optimizer(**options: Any) -> CompressedSGD:
    model = network()
    if options.pop("escapes", False):
        options["escape"] = escape(model)
    found = CompressedSGD(
        model.named_parameters(), 0.1, **folded({"compressor": TopK(0.2), "dense_below": 20, "seed": 3, **options})
    )
    train(model, found, 5)
    return found


def local(**options: Any) -> LocalUpdates:
    model = network()
    if options.pop("escapes", False):
        options["escape"] = escape(model)
    inner = torch.optim.SGD(model.named_parameters(), 0.1, momentum=0.9)
    two_way = Compression(TopK(0.2), exchange="two-way", dense_below=20, monitor_every=1)
    found = LocalUpdates(inner, **{"compressor": two_way, "every": 4, "seed": 3, **options})
    train(model, inner, 6)
    return found


ALONE: dict[str, tuple[str, Callable[[], Any]]] = {
    "optimizer, two-way": (OPTIMIZER, lambda: optimizer(exchange="two-way", monitor_every=1, momentum=0.9)),
    "optimizer, escape": (OPTIMIZER, lambda: optimizer(escapes=True, momentum=0.9)),
    "optimizer, noise": (OPTIMIZER, lambda: optimizer(compressor=RandomK(0.2), noise=0.1)),
    "optimizer, LowRank": (OPTIMIZER, lambda: optimizer(compressor=LowRank(1))),
    "local, pending": (LOCAL, lambda: local(overlap=Overlap(3, 2), outer=OuterSGD())),
    "local, escape": (LOCAL, lambda: local(escapes=True)),
}


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list) and any(isinstance(inner, Mapping | Tensor) for inner in value):
        for i, inner in enumerate(value):
            yield from leaves(inner, (*path, i))
    else:
        yield path, value


def kinds(table: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in table.replace(",\n    ", ", ").strip().split("\n"):
        kind, _, paths = line.partition(": ")
        found |= dict.fromkeys(paths.split(", "), kind)
    return found


def listed(path: Path, table: Mapping[str, str]) -> str | None:
    """Return the kind in a table of a path, or of what it is in."""
    words = ["*" if isinstance(key, int) or key in NAMES else str(key) for key in path]
    return next((table[name] for n in range(len(words), 0, -1) if (name := ".".join(words[:n])) in table), None)


def check_kinds(front: Any, table: str) -> None:
    for path, value in leaves(front.state_dict()):
        if value is None and f"{path[-1]}.*" in table:  # none of its vectors are there
            continue
        assert listed(path, kinds(table)) == front.saved_state.rule(path).kind, path


def without(state: Any, path: Path, value: Any = None, *, drop: bool = False) -> Any:
    """Return a copy of a state with another value at a path, or nothing."""
    state = copy.deepcopy(state)
    place = state
    for key in path[:-1]:
        place = place[key]
    if drop:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return state


def damaged(state: Any) -> Iterator[tuple[str, Any]]:
    """Yield states that are damaged at one path. States of torch's optimizers and warm starts are not ours to check."""
    for path, value in leaves(state):
        if path[0] == "outer" or path[-2:-1] == ("param_groups",) or "compressor" in path or "qs" in path:
            continue
        if path[-1] in ("lr", "weight_decay", "param_names", "momentum", "by_tensor") or "by_tensor" in path:
            continue
        name = ".".join(map(str, path))
        if not isinstance(path[-1], int):
            yield f"{name} is missing", without(state, path, drop=True)
        if isinstance(value, Tensor):
            yield f"{name} of another shape", without(state, path, value[None])
            yield f"{name} of another dtype", without(state, path, value.int())
        elif path[-1] == "format":
            for other in (float("nan"), 1, FORMAT + 1, str(FORMAT), None):
                yield f"{name} is {other}", without(state, path, other)
        elif isinstance(value, int | float | str):
            yield f"{name} of another type", without(state, path, [value])


def check_damage(front: Any) -> int:
    state, count = copy.deepcopy(front.state_dict()), 0
    before = [(path, copy.deepcopy(value)) for path, value in leaves(front.state_dict())]
    for what, bad in damaged(state):
        message = ""
        try:
            front.load_state_dict(bad)
        except ValueError as error:
            message = str(error)
        assert message, f"{what}, and it is loaded"
        assert "\n" not in message, what
        count += 1
    for (path, old), (other, new) in zip(before, leaves(front.state_dict()), strict=True):
        assert path == other
        assert torch.equal(old, new) if isinstance(old, Tensor) else old == new, path
    front.load_state_dict(state)
    return count


@pytest.mark.parametrize("name", ALONE)
def test_every_path_has_its_kind(name: str) -> None:
    table, make = ALONE[name]
    check_kinds(make(), table)


@pytest.mark.parametrize("name", ALONE)
def test_a_state_damaged_at_any_path_is_refused(name: str) -> None:
    assert check_damage(ALONE[name][1]()) > 30


def hooks() -> list[int]:
    found = []
    for scope in ("model", "bucket"):
        model = DistributedDataParallel(network())
        inner = torch.optim.SGD(model.parameters(), 0.1)
        spec = Compression(TopK(0.2), exchange="two-way", dense_below=20)
        hook = packsaddle.register_ddp_hook(model, spec, optimizer=inner, scope=scope)
        train(model, inner, 5)
        check_kinds(hook, HOOK)
        found.append(check_damage(hook))
    return found


def test_hooks(tmp_path: Any) -> None:
    for counts in run_in_processes(hooks, 2, tmp_path):
        assert min(counts) > 30


def test_a_field_without_a_rule() -> None:
    view = torch.zeros(3)
    state = State(
        "Front", [Rule(("a",), "own")], dict, lambda: [Vector(("b", "*"), {"x": view.shape}, lambda: {"x": view})]
    )
    with pytest.raises(ValueError, match=r"b\.x is in the state, and Front has no rule for it"):
        state.split({("b", "x"): view})
