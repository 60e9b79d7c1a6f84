"""Golden trajectories: hashes of x, e and bytes after 20 steps, for some 200 settings.

A change that should not change any number is tried with it, on one machine:

    python tests/support/golden.py --out before.json      # before
    python tests/support/golden.py --compare before.json  # after; prints the settings that differ and exits with 1
    python tests/support/golden.py --compare before.json --only "W=2.*local"  # those of a name alone

It uses public names alone, so that it survives any move of files. Hashes are not committed: they depend on the machine.
That saved states continue bit for bit, on any number of workers, is tested in tests/feedback/engine.
"""

import argparse
import hashlib
import json
import math
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import elastic_runs
import torch
from gloo import run_in_processes
from specs import folded, local_options
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import packsaddle
from packsaddle import OuterSGD, RandomK, TopK
from packsaddle.comm import resolve

STEPS = 20
COMPRESSORS = {
    "Identity": packsaddle.Identity(),
    "RandomK": packsaddle.RandomK(0.05),
    "TopK": packsaddle.TopK(0.05),
    "TopK int8": packsaddle.TopK(0.05, values="int8"),
    "TopK by chunks": packsaddle.TopK(0.05, values="int2", chunk=256),
    "AdaptiveTopK": packsaddle.AdaptiveTopK(0.3),
    "SharedTopK": packsaddle.SharedTopK(0.05),
    "SketchTopK": packsaddle.SketchTopK(0.02, rows=3, columns=64),
    "Sign": packsaddle.Sign(),
    "QSGD": packsaddle.QSGD(),
    "QSGD of fixed width": packsaddle.QSGD(coded=False),
    "LinearSketch": packsaddle.LinearSketch(0.1),
    "LowRank": packsaddle.LowRank(2),
}


@dataclass(frozen=True)
class How:
    """How a run goes, apart from the options of what is run."""

    bad: tuple[int, ...] = ()  # steps in which the gradient is not finite on worker 0
    dtype: torch.dtype = torch.float32
    width: int = 60  # of the network
    inner: str = "sgd"
    groups: bool = False  # two parameter groups
    rates: Mapping[int, tuple[float, ...]] = field(default_factory=dict)  # learning rates by group, from a step on
    frozen: tuple[int, int] | None = None  # steps from and below which a parameter is frozen
    scaler: bool = False
    scalars: bool = False
    huge: bool = False  # a parameter near the largest number
    weighted: bool = False  # workers by their rank
    flush: tuple[int, ...] = ()  # before these steps


def fold_how(options: Mapping[str, Any]) -> tuple[How, dict[str, Any]]:
    """Return how a run goes, and the other options."""
    names = {f.name for f in fields(How)}
    how = How(**{name: value for name, value in options.items() if name in names})
    return how, {name: value for name, value in options.items() if name not in names}


def by_round(t: int) -> packsaddle.Compressor:
    """A compressor that changes its budget, and once its kind."""
    return packsaddle.QSGD() if t in (2, 7) else TopK(0.05 * (1 + t % 3))


ESCAPE = {"interval": 6, "radius": 0.01}  # at each step
RARELY = {"interval": 6, "radius": 10.0, "compare": "y"}
FALLING = {6: (0.03, 0.05), 12: (0.1, 0.02)}
PAUSING = {5: (0.1, 0.0), 9: (0.0, 0.0), 11: (0.1, 0.1)}
LARGE = {"compressor": TopK(0.01), "noise": 0.01, "width": 1024}  # above 2^20 coordinates
OPTIMIZERS: dict[str, dict[str, Any]] = {
    **{name: {"compressor": c, "noise": 0.01, "monitor_every": 7} for name, c in COMPRESSORS.items()},
    "two-way": {"compressor": TopK(0.05), "exchange": "two-way"},
    "coordinator": {"compressor": TopK(0.05), "exchange": "coordinator", "back": RandomK(0.5)},
    "auto": {"compressor": packsaddle.QSGD(), "exchange": "auto"},
    "momentum": {"compressor": RandomK(0.05), "momentum": 0.9, "nesterov": True},
    "eager noise": {"compressor": RandomK(0.05), "noise": packsaddle.Noise(0.01, lazy=False)},
    "lazy noise": {"compressor": RandomK(0.05), "noise": packsaddle.Noise(0.01, lazy=True)},
    "weight decay": {"compressor": RandomK(0.05), "weight_decay": 0.01},
    "escape": {"compressor": TopK(0.05), "noise": 0.05, "escape": ESCAPE},
    "no guard": {"compressor": RandomK(0.05), "max_skipped": None},
    "NaN": {"compressor": RandomK(0.05), "noise": 0.01, "bad": (5,)},
    "NaN two-way": {"compressor": TopK(0.05), "exchange": "two-way", "bad": (5,)},
    "float64": {"compressor": TopK(0.05), "dtype": torch.float64},
    "bfloat16": {"compressor": TopK(0.05), "dtype": torch.bfloat16, "noise": 0.01},
    "bfloat16, two-way": {"compressor": TopK(0.05), "dtype": torch.bfloat16, "exchange": "two-way", "bad": (5,)},
    "float16": {"compressor": RandomK(0.05), "dtype": torch.float16},
    "changing lr": {"compressor": TopK(0.05), "rates": FALLING, "noise": 0.01},
    "changing lr, two-way": {"compressor": TopK(0.05), "rates": FALLING, "exchange": "two-way"},
    "lr 0": {"compressor": TopK(0.05), "rates": {5: (0.0,), 9: (0.1,)}, "noise": 0.01},
    "lr 0, lazy noise": {"compressor": RandomK(0.05), "rates": {5: (0.0,), 9: (0.1,)}, "lazy": True, "noise": 0.01},
    "groups": {"compressor": TopK(0.05), "groups": True, "noise": 0.01},
    "groups, changing lr": {"compressor": TopK(0.05), "groups": True, "rates": PAUSING, "momentum": 0.9},
    "groups, lazy noise": {"compressor": RandomK(0.05), "groups": True, "lazy": True, "noise": 0.01},
    "frozen": {"compressor": TopK(0.05), "frozen": (6, 13), "noise": 0.01},
    "frozen, lazy noise": {"compressor": RandomK(0.05), "frozen": (6, 13), "noise": 0.01, "lazy": True},
    "frozen, two-way": {"compressor": TopK(0.05), "frozen": (6, 13), "exchange": "two-way"},
    "scaler": {"compressor": TopK(0.05), "scaler": True},
    "scaler, NaN": {"compressor": TopK(0.05), "scaler": True, "bad": (5,), "dtype": torch.float16},
    "scalars": {"compressor": TopK(0.05), "scalars": True, "bad": (5,)},
    "large": LARGE,
    "large, NaN": LARGE | {"bad": (2, 7)},
    "large, NaN, momentum": LARGE | {"bad": (2, 7), "momentum": 0.9},
    "large, frozen": LARGE | {"frozen": (6, 13)},
    "huge": {"compressor": TopK(0.05), "huge": True},
    "huge, two-way": {"compressor": TopK(0.05), "huge": True, "exchange": "two-way"},
    "huge, lazy noise": {"compressor": RandomK(0.5), "huge": True, "lazy": True, "noise": 0.01},
    "NaN, Nesterov": {"compressor": RandomK(0.05), "momentum": 0.9, "nesterov": True, "bad": (5, 6)},
    "NaN, lazy noise": {"compressor": RandomK(0.05), "noise": 0.01, "lazy": True, "bad": (5,)},
    "escape by the interval": {"compressor": TopK(0.05), "noise": 0.05, "escape": RARELY, "bad": (5,)},
    "NaN, all compressed": {"compressor": TopK(0.05), "dense_below": 0, "bad": (5,)},
}
HOOKS: dict[str, dict[str, Any]] = {
    **{
        f"{name} {scope}": {"compressor": c, "noise": 0.01, "scope": scope}
        for name, c in COMPRESSORS.items()
        for scope in ("bucket", "model")
    },
    "two-way": {"compressor": TopK(0.05), "exchange": "two-way", "scope": "model"},
    "NaN": {"compressor": TopK(0.05), "bad": (5,)},
    "AdamW": {"compressor": TopK(0.1), "inner": "adamw", "start_step": 4},
    "no error feedback": {"compressor": RandomK(0.1), "decay": 0.0},
    "bfloat16": {"compressor": TopK(0.05), "dtype": torch.bfloat16, "noise": 0.01},
    "bfloat16 model": {"compressor": TopK(0.05), "dtype": torch.bfloat16, "scope": "model", "bad": (5,)},
    "groups": {"compressor": TopK(0.05), "groups": True, "monitor_every": 3},
    "scaler": {"compressor": TopK(0.05), "scaler": True},
    "scaler, NaN": {"compressor": TopK(0.05), "scaler": True, "bad": (5,), "scope": "model", "exchange": "two-way"},
    "decay": {"compressor": TopK(0.05), "decay": 0.5},
    "two-way bucket": {"compressor": TopK(0.05), "exchange": "two-way"},
    "two-way, NaN": {"compressor": TopK(0.05), "exchange": "two-way", "bad": (5,)},
    "by the step": {"compressor": by_round, "start_step": 3},
    "by the step, two-way": {"compressor": by_round, "start_step": 3, "exchange": "two-way"},
    "by the step, two-way model": {"compressor": by_round, "exchange": "two-way", "scope": "model"},
    "NaN, Adam": {"compressor": TopK(0.05), "bad": (5, 6), "inner": "adamw", "noise": 0.01, "scope": "model"},
    "NaN, AdaptiveTopK": {"compressor": packsaddle.AdaptiveTopK(0.3), "bad": (5,)},
    "large": LARGE,
    "large, NaN": LARGE | {"bad": (2, 7), "scope": "model"},
    "measured": {"compressor": TopK(0.05), "monitor_every": 3, "bad": (6,)},
    "measured, model": {"compressor": TopK(0.05), "monitor_every": 3, "scope": "model", "compare_every": 1},
    "no limit": {"compressor": TopK(0.05), "max_skipped": None, "bad": (5, 6), "scaler": True},
}
SHARDED: dict[str, dict[str, Any]] = {
    **{name: {"compressor": COMPRESSORS[name], "noise": 0.01} for name in ("Identity", "RandomK", "TopK", "QSGD")},
    "NaN": {"compressor": TopK(0.05), "noise": 0.01, "bad": (5, 6)},
    "two-way": {"compressor": TopK(0.05), "exchange": "two-way"},
    "two-way, NaN": {"compressor": TopK(0.05), "exchange": "two-way", "bad": (5,), "inner": "adamw"},
    "by the step": {"compressor": by_round, "start_step": 3, "decay": 0.5},
    "bfloat16": {"compressor": TopK(0.05), "dtype": torch.bfloat16, "monitor_every": 3},
}
DELAY = {"compressor": TopK(0.1), "delay": 2}
LOCAL: dict[str, dict[str, Any]] = {
    "Sign": {},
    **{name: {"compressor": COMPRESSORS[name]} for name in ("Identity", "RandomK", "TopK", "QSGD", "LowRank")},
    "every step": {"every": 1, "compressor": TopK(0.1), "inner": "sgd", "keep_unsent": False},
    "every step, unsent kept": {"every": 1, "compressor": TopK(0.1)},
    "unsent not kept": {"compressor": TopK(0.1), "keep_unsent": False},
    "SGD": {"compressor": RandomK(0.1), "inner": "sgd"},
    "Nesterov outside": {"outer": OuterSGD()},
    "Nesterov outside, unsent not kept": {"outer": OuterSGD(), "keep_unsent": False},
    "fragments": {"compressor": TopK(0.1), "fragments": 3},
    "delay": DELAY,
    "delay, unsent not kept": DELAY | {"keep_unsent": False},
    "delay, Nesterov outside": DELAY | {"outer": OuterSGD()},
    "fragments with delay": DELAY | {"fragments": 2},
    "fragments with delay, Nesterov outside": DELAY | {"fragments": 2, "outer": OuterSGD(), "inner": "sgd"},
    "weights": {"compressor": TopK(0.1), "weighted": True},
    "weights with delay": DELAY | {"weighted": True},
    "senders": {"compressor": TopK(0.1), "exchange": "senders"},
    "two-way": {"compressor": TopK(0.1), "exchange": "two-way"},
    "two-way by the round": {"compressor": by_round, "exchange": "two-way", "every": 2},
    "two-way by the round, with delay": {"compressor": by_round, "exchange": "two-way", "every": 2, "delay": 1},
    "noise": {"compressor": TopK(0.1), "noise": 0.01},
    "decay": {"compressor": TopK(0.1), "decay": 0.8},
    "escape": {"every": 2, "compressor": TopK(0.1), "noise": 0.05, "escape": RARELY | {"interval": 3}},
    "escape in each round": {"every": 2, "compressor": TopK(0.1), "noise": 0.05, "escape": ESCAPE},
    "flush": {"compressor": TopK(0.1), "flush": (10, STEPS)},
    "flush with delay": DELAY | {"flush": (10, STEPS), "fragments": 2, "outer": OuterSGD()},
    "NaN": {"compressor": TopK(0.1), "bad": (6,)},
    "NaN, SGD": {"compressor": TopK(0.1), "bad": (6,), "inner": "sgd", "keep_unsent": False},
    "NaN with delay": DELAY | {"bad": (6,), "fragments": 2, "outer": OuterSGD()},
    "NaN two-way": {"compressor": TopK(0.1), "exchange": "two-way", "bad": (6,)},
    "bfloat16": {"compressor": TopK(0.1), "dtype": torch.bfloat16},
    "bfloat16 with delay": DELAY | {"dtype": torch.bfloat16},
    "offload": {"compressor": TopK(0.1), "offload": True},
    "frozen": {"compressor": TopK(0.1), "frozen": (6, 13), "noise": 0.01},
    "no limit": {"compressor": TopK(0.1), "max_skipped": None, "bad": (6, 10)},
    "compared and measured": {"compressor": TopK(0.1), "compare_every": 1, "monitor_every": 2, "fragments": 2},
}


def network(dtype: torch.dtype = torch.float32, width: int = 60) -> nn.Sequential:
    rng = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(30, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 30))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2 * (60 / width) ** 0.5, generator=rng)
    return model.to(dtype)


def batch(step: int, rank: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(12, 30, generator=torch.Generator().manual_seed(1000 * rank + step)).to(dtype)


def digest(value: Any) -> str:
    """Return a hash of tensors and plain types, nested."""
    found = hashlib.sha256()

    def add(x: Any) -> None:
        if isinstance(x, Tensor):
            found.update(f"{x.dtype}{tuple(x.shape)}".encode())
            found.update(x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(x, Mapping):
            for key in sorted(x, key=repr):
                found.update(repr(key).encode())
                add(x[key])
        elif isinstance(x, list | tuple):
            found.update(f"[{len(x)}".encode())
            for part in x:
                add(part)
        else:
            found.update(repr(x).encode())

    add(value)
    return found.hexdigest()[:16]


def counted(ledger: packsaddle.Ledger) -> Any:
    """Return the bytes by purpose, without those of the start, which depend on the text that workers compare there."""
    return sorted(part for part in ledger.state_dict() if part[:1] != ["start"])


@dataclass
class Run:
    """A run of one front, which has the error and the ledger, and of the optimizer that steps."""

    front: str
    how: How
    model: nn.Module
    inner: torch.optim.Optimizer
    part: Any  # a CompressedSGD, which is its own inner optimizer, a hook or a LocalUpdates
    rank: int
    scaler: Any = None

    def shards(self) -> list[Tensor]:
        """Return this worker's part of each parameter."""
        return [p.to_local() if hasattr(p, "to_local") else p for p in self.model.parameters()]

    def train(self) -> None:
        for t in range(STEPS):
            self._begin(t)
            loss = self._gradient(t)
            if self.scaler is not None:
                self.scaler.step(self.inner)
                self.scaler.update()
            elif self.how.scalars:
                self.inner.step(scalars=torch.stack([loss.detach(), torch.tensor(float(t))]))
            else:
                self.inner.step()
        if STEPS in self.how.flush:
            self.part.flush(packsaddle.Identity())

    def _begin(self, t: int) -> None:
        """Do what the setting has before step t."""
        if t in self.how.flush:
            self.part.flush(packsaddle.Identity())
        if t in self.how.rates:
            for group, lr in zip(self.inner.param_groups, self.how.rates[t], strict=False):
                group["lr"] = lr
        if self.how.frozen:
            first, last = self.how.frozen
            self.model[2].weight.requires_grad_(not first <= t < last)

    def _gradient(self, t: int) -> Tensor:
        """Compute gradients, and return the loss."""
        x = batch(t, self.rank, self.how.dtype)
        self.model.zero_grad()
        loss: Tensor = (self.model(x) - x).square().mean()
        if self.how.huge:  # its gradient is this factor: once of a step that would overflow, at one coordinate
            factor = torch.full_like(self.model.huge, 1e32)
            factor[0, 0] = -2e37 if t in (8, 9) else 1e32
            loss = loss + (factor * self.model.huge).sum()
        if t in self.how.bad and self.rank == 0:
            loss = loss * math.nan
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss

    def hashes(self) -> dict[str, str]:
        x: list[Any] = self.shards()
        if self.how.scalars:
            x.append(self.part.scalars)
        if self.front == "local":
            self.part.wait()  # for the bytes of a running exchange
            x.append(self.part.anchor())
        if self.front == "local":
            e = [self.part.pending(), self.part.error()]
        else:
            e = self.part.error() if self.front == "optimizer" else self.part.memory()
        return {
            "x": digest(x),
            "e": digest(e),
            "bytes": digest(counted(self.part.ledger)),
        }


def objective(model: nn.Module) -> Callable[[], Tensor]:
    """Return what the escape check compares: the loss on one batch."""
    x = batch(STEPS, 0, torch.float32)
    return lambda: (model(x) - x).square().mean().detach()


def with_escape(options: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the options with a common choice of what is checked, and the escape check of the model."""
    options = {"dense_below": 100, "compare_every": 5, "seed": 3} | options
    if "escape" in options:
        options["escape"] = packsaddle.Escape(**options["escape"], objective=objective(model))
    return options


def parameters(model: nn.Module, how: How) -> Any:
    """Return the parameters, or two groups of them."""
    found = list(model.parameters())
    return [{"params": found[:3]}, {"params": found[3:], "lr": 0.03, "weight_decay": 0.02}] if how.groups else found


def stepper(model: nn.Module, how: How) -> torch.optim.Optimizer:
    """Return the optimizer behind a hook or within local updates."""
    if how.inner == "adamw":
        return torch.optim.AdamW(parameters(model, how), 1e-2)
    return torch.optim.SGD(parameters(model, how), 0.1)


def scaler_of(how: How) -> Any:
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4) if how.scaler else None


def optimizer(options: Mapping[str, Any]) -> Run:
    """Return a run of CompressedSGD."""
    how, options = fold_how(options)
    model = network(how.dtype, how.width)
    if how.huge:
        model.register_parameter("huge", nn.Parameter(torch.full((12, 12), 3.4e38)))
    opt = packsaddle.CompressedSGD(parameters(model, how), 0.1, **folded(with_escape(options, model)))
    return Run("optimizer", how, model, opt, opt, resolve(None).rank, scaler_of(how))


def hook(options: Mapping[str, Any]) -> Run:
    """Return a run of the hook behind DistributedDataParallel."""
    how, options = fold_how(options)
    model = DistributedDataParallel(network(how.dtype, how.width), bucket_cap_mb=0.02)
    inner, scaler = stepper(model, how), scaler_of(how)
    part = packsaddle.register_ddp_hook(model, optimizer=inner, scaler=scaler, **folded(with_escape(options, model)))
    return Run("hook", how, model, inner, part, resolve(None).rank, scaler)


def sharded(options: Mapping[str, Any]) -> Run:
    """Return a run of the hook between replicas of a model that FSDP2 shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    how, options = fold_how(options)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model = network(how.dtype)
    for layer in (model[0], model[2], model[4], model):
        fully_shard(layer, mesh=mesh["shard"])
    inner = stepper(model, how)
    part = packsaddle.register_fsdp_hook(model, mesh["replicate"].get_group(), seed=3, **folded(options))
    if how.bad:
        part.protect(inner)
    return Run("sharded", how, model, inner, part, resolve(None).rank)


def local(options: Mapping[str, Any]) -> Run:
    """Return a run of local updates."""
    how, options = fold_how({"inner": "adamw"} | options)
    model = network(how.dtype)
    group = resolve(None)
    if how.weighted:
        options["weight"] = 1.0 + group.rank
    inner, scaler = stepper(model, how), scaler_of(how)
    part = packsaddle.LocalUpdates(
        inner, scaler=scaler, **local_options(**with_escape({"every": 4, "exchange": "direct"} | options, model))
    )
    return Run("local", how, model, inner, part, group.rank, scaler)


FRONTS = {"optimizer": optimizer, "hook": hook, "sharded": sharded, "local": local}
TABLES = {"optimizer": OPTIMIZERS, "hook": HOOKS, "sharded": SHARDED, "local": LOCAL, "elastic": elastic_runs.SETTINGS}
ALONE = {"sharded": 2, "elastic": 1}  # fronts that run with one number of processes


def elastic(name: str) -> dict[str, str]:
    """Run workers that come and go, in threads of this process that take turns."""
    found = elastic_runs.run(**elastic_runs.SETTINGS[name])
    hashes = {part: digest([worker[key] for worker in found]) for part, key in (("x", "x"), ("e", "e"))}
    counts = [(worker["counts"], counted(worker["ledger"])) for worker in found]
    return hashes | {"bytes": digest(counts)}


def hashes(names: list[str]) -> dict[str, dict[str, str]]:
    """Run these settings on this worker."""
    found = {}
    for name in names:
        front, _, setting = name.partition(", ")
        if front == "elastic":
            found[name] = elastic(setting)
            continue
        run = FRONTS[front](TABLES[front][setting])
        run.train()
        found[name] = run.hashes()
    return found


def golden(only: str = "") -> dict[str, dict[str, str]]:
    """Return all hashes, by number of workers, rank and setting; only those that the expression matches."""
    found: dict[str, dict[str, str]] = {}
    for workers in (1, 2, 3):
        tables = {front: table for front, table in TABLES.items() if front not in ALONE or ALONE[front] == workers}
        names = [f"{front}, {setting}" for front, table in tables.items() for setting in table]
        names = [n for n in names if any(re.search(only, f"W={workers}, rank {r}, {n}") for r in range(workers))]
        if names:
            with tempfile.TemporaryDirectory() as folder:
                outcomes = run_in_processes(hashes, workers, Path(folder), names, timeout=3600)
            for rank, settings in enumerate(outcomes):
                found.update({f"W={workers}, rank {rank}, {name}": row for name, row in settings.items()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--only", default="", metavar="REGEX", help="run the settings that it matches")
    options = parser.parse_args()
    found = golden(options.only)
    print(f"{len(found)} trajectories")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    if options.compare:
        before = json.loads(options.compare.read_text())
        unlike = [
            f"{name}: {', '.join(part for part in hashes if hashes[part] != found.get(name, {}).get(part))}"
            for name, hashes in before.items()
            if hashes != found.get(name) and (name in found or re.search(options.only, name))
        ]
        print("\n".join(unlike) or "all equal")
        sys.exit(bool(unlike))


if __name__ == "__main__":
    main()
