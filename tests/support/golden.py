"""Golden trajectories: hashes of x, e, bytes and saved state after 20 steps, for some forty settings.

A change that should not change any number is tried with it, on one machine:

    python tests/support/golden.py --out before.json      # before
    python tests/support/golden.py --compare before.json  # after; prints the settings that differ and exits with 1

It uses public names alone, so that it survives any move of files. Hashes are not committed: they depend on the machine.
"""

import argparse
import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from gloo import run_in_processes
from specs import folded
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import packsaddle

STEPS = 20
COMPRESSORS = {
    "Identity": packsaddle.Identity(),
    "RandomK": packsaddle.RandomK(0.05),
    "RandomK bfloat16": packsaddle.RandomK(0.05, values="bfloat16"),
    "TopK": packsaddle.TopK(0.05),
    "TopK int8 per tensor": packsaddle.TopK(0.05, values="int8", per_tensor=True),
    "TopK by chunks": packsaddle.TopK(0.05, values="int2", chunk=256),
    "AdaptiveTopK": packsaddle.AdaptiveTopK(0.3),
    "SharedTopK": packsaddle.SharedTopK(0.05),
    "SketchTopK": packsaddle.SketchTopK(0.02, rows=3, columns=64),
    "Sign": packsaddle.Sign(),
    "Stages": packsaddle.Stages(packsaddle.Sign()),
    "QSGD": packsaddle.QSGD(),
    "QSGD of fixed width": packsaddle.QSGD(coded=False),
    "LinearSketch": packsaddle.LinearSketch(0.1),
    "LowRank": packsaddle.LowRank(2),
}
ESCAPE = {"interval": 6, "radius": 0.01}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    **{name: {"compressor": c, "noise": 0.01, "monitor_every": 7} for name, c in COMPRESSORS.items()},
    "two-way": {"compressor": packsaddle.TopK(0.05), "exchange": "two-way"},
    "coordinator": {"compressor": packsaddle.TopK(0.05), "exchange": "coordinator", "back": packsaddle.RandomK(0.5)},
    "auto": {"compressor": packsaddle.QSGD(), "exchange": "auto"},
    "gradient memory": {"compressor": packsaddle.RandomK(0.05), "memory": "gradient"},
    "EF21": {"compressor": packsaddle.TopK(0.05), "memory": "ef21"},
    "EF21 momentum": {"compressor": packsaddle.TopK(0.05), "memory": "ef21", "momentum": 0.9, "noise": 0.01},
    "momentum": {"compressor": packsaddle.RandomK(0.05), "momentum": 0.9, "nesterov": True},
    "STORM": {"compressor": packsaddle.TopK(0.05), "momentum": packsaddle.Storm(0.1), "closure": True},
    "eager noise": {"compressor": packsaddle.RandomK(0.05), "noise": packsaddle.Noise(0.01, lazy=False)},
    "lazy noise": {"compressor": packsaddle.RandomK(0.05), "noise": packsaddle.Noise(0.01, lazy=True)},
    "weight decay": {"compressor": packsaddle.RandomK(0.05), "weight_decay": 0.01},
    "escape": {"compressor": packsaddle.TopK(0.05), "noise": 0.05, "escape": ESCAPE},
    "no guard": {"compressor": packsaddle.RandomK(0.05), "max_skipped": None},
    "NaN": {"compressor": packsaddle.RandomK(0.05), "noise": 0.01, "bad": 5},
    "NaN two-way": {"compressor": packsaddle.TopK(0.05), "exchange": "two-way", "bad": 5},
    "float64": {"compressor": packsaddle.TopK(0.05), "dtype": torch.float64},
}
HOOKS: dict[str, dict[str, Any]] = {
    **{
        f"{name} {scope}": {"compressor": c, "noise": 0.01, "scope": scope}
        for name, c in COMPRESSORS.items()
        for scope in ("bucket", "model")
    },
    "two-way": {"compressor": packsaddle.TopK(0.05), "exchange": "two-way", "scope": "model"},
    "NaN": {"compressor": packsaddle.TopK(0.05), "bad": 5},
    "escape": {"compressor": packsaddle.TopK(0.05), "noise": 0.05, "escape": ESCAPE, "scope": "model"},
    "AdamW": {"compressor": packsaddle.TopK(0.1), "adamw": True, "start_step": 4},
    "no error feedback": {"compressor": packsaddle.RandomK(0.1), "decay": 0.0},
}


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    rng = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(30, 60), nn.Tanh(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 30))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2, generator=rng)
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


def training(value: Any) -> Any:
    """Return a state without the bytes of the start, which depend on the text that workers compare there."""
    if isinstance(value, Mapping):
        return {key: training(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [training(part) for part in value if not (isinstance(part, list) and part[:1] == ["start"])]
    return value


def train(
    step_of: Callable[[Callable[[], Tensor]], Any],
    model: nn.Module,
    rank: int,
    bad: int = -1,
    dtype: torch.dtype = torch.float32,
    *,
    clear: bool = True,
) -> None:
    """Take the steps; the gradient of step `bad` is not finite on worker 0."""
    for t in range(STEPS):
        x = batch(t, rank, dtype)

        def closure(x: Tensor = x, t: int = t) -> Tensor:
            if clear:
                model.zero_grad()
            loss = (model(x) - x).square().mean()
            (loss * math.nan if t == bad and rank == 0 else loss).backward()
            return loss

        step_of(closure)


def objective(model: nn.Module) -> Callable[[], Tensor]:
    """Return what the escape check compares: the loss on one batch."""
    x = batch(STEPS, 0, torch.float32)
    return lambda: (model(x) - x).square().mean().detach()


def optimizer(setting: str) -> dict[str, str]:
    """Run CompressedSGD in one setting."""
    options = dict(OPTIMIZERS[setting])
    dtype, bad, closure = options.pop("dtype", torch.float32), options.pop("bad", -1), options.pop("closure", False)
    model = network(dtype)
    if "escape" in options:
        options["escape"] = packsaddle.Escape(**options["escape"], objective=objective(model))
    opt = packsaddle.CompressedSGD(
        model.parameters(), 0.1, seed=3, **folded({"dense_below": 100, "compare_every": 5} | options)
    )

    def step(evaluate: Callable[[], Tensor]) -> None:
        if closure:
            opt.step(evaluate)
        else:
            evaluate()
            opt.step()

    train(step, model, opt.channel.group.rank, bad, dtype, clear=options.get("memory") != "gradient")
    return {
        "x": digest(list(model.parameters())),
        "e": digest(opt.error()),
        "bytes": digest(training(opt.ledger.state_dict())),
        "state": digest(training(opt.state_dict())),
    }


def hook(setting: str) -> dict[str, str]:
    """Run the hook behind DistributedDataParallel in one setting."""
    options = dict(HOOKS[setting])
    bad, adamw = options.pop("bad", -1), options.pop("adamw", False)
    model = DistributedDataParallel(network(), bucket_cap_mb=0.02)
    if "escape" in options:
        options["escape"] = packsaddle.Escape(**options["escape"], objective=objective(model))
    inner = torch.optim.AdamW(model.parameters(), 1e-2) if adamw else torch.optim.SGD(model.parameters(), 0.1)
    hook = packsaddle.register_ddp_hook(
        model, seed=3, optimizer=inner, **folded({"dense_below": 100, "compare_every": 5} | options)
    )

    def step(evaluate: Callable[[], Tensor]) -> None:
        evaluate()
        inner.step()

    train(step, model, torch.distributed.get_rank(), bad)
    return {
        "x": digest(list(model.parameters())),
        "e": digest(hook.memory()),
        "bytes": digest(training(hook.ledger.state_dict())),
        "state": digest(training(hook.state_dict())),
    }


def sharded(name: str) -> dict[str, str]:
    """Run the hook between replicas of a model that FSDP2 shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model = network()
    for layer in (model[0], model[2], model[4], model):
        fully_shard(layer, mesh=mesh["shard"])
    hook = packsaddle.register_fsdp_hook(model, mesh["replicate"].get_group(), COMPRESSORS[name], noise=0.01, seed=3)
    inner = torch.optim.SGD(model.parameters(), 0.1)

    def step(evaluate: Callable[[], Tensor]) -> None:
        evaluate()
        inner.step()

    train(step, model, torch.distributed.get_rank())
    return {
        "x": digest([p.to_local() for p in model.parameters()]),
        "e": digest(hook.memory()),
        "bytes": digest(training(hook.ledger.state_dict())),
        "state": digest(training(hook.state_dict())),
    }


def everything() -> dict[str, dict[str, str]]:
    """Run all settings on this worker."""
    workers = torch.distributed.get_world_size()
    found = {f"optimizer, {name}": optimizer(name) for name in OPTIMIZERS}
    found |= {f"hook, {name}": hook(name) for name in HOOKS}
    if workers == 2:
        found |= {f"sharded, {name}": sharded(name) for name in ("Identity", "RandomK", "TopK", "QSGD")}
    return found


def golden() -> dict[str, dict[str, str]]:
    """Return all hashes, by number of workers, rank and setting."""
    found = {}
    for workers in (1, 2, 3):
        with tempfile.TemporaryDirectory() as folder:
            for rank, settings in enumerate(run_in_processes(everything, workers, Path(folder), timeout=3600)):
                found |= {f"W={workers}, rank {rank}, {name}": hashes for name, hashes in settings.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--compare", type=Path)
    options = parser.parse_args()
    found = golden()
    print(f"{len(found)} trajectories")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    if options.compare:
        before = json.loads(options.compare.read_text())
        unlike = [
            f"{name}: {', '.join(part for part in hashes if hashes[part] != found.get(name, {}).get(part))}"
            for name, hashes in before.items()
            if hashes != found.get(name)
        ]
        print("\n".join(unlike) or "all equal")
        sys.exit(bool(unlike))


if __name__ == "__main__":
    main()
