"""Everything that needs a GPU, in one command of at most nine minutes and without a network.

    make gpu
    python -m lab.bench.gpu --out gpu.json [--d 25000000 100000000 1000000000] [--figure1 CIFAR10]

Parts, each within the remaining time: the CUDA and Triton tests (one checks that a step does not synchronize); steps
of packsaddle's optimizers and of torch's fused ones; a round of local updates; packing and unpacking; two gloo
processes on this GPU, behind DDP's hook and with local updates; figure 1 at the paper's scale until the time is over.
Times are relative to a device copy of the vector: medians and ranges over turns. The JSON file is written after each
part, with the name of the GPU, and the reasons of parts that failed or were skipped. Without a GPU it raises an error;
`--device cpu` runs it on small vectors as a test, without meaningful times.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import packsaddle
from lab.bench.result import machine
from packsaddle.comm import Solo, launch, process_group
from packsaddle.compressors import compressors, describe
from packsaddle.plan import Timing, side_by_side

ROOT = Path(__file__).parents[2]
SECONDS = 530.0
Work = Callable[[], object]


def ratios(times: dict[str, Timing], copy: str = "copy") -> dict[str, dict[str, float]]:
    """Return milliseconds, and the median and range relative to a copy of the vector."""
    one = times[copy].median
    return {
        name: {
            "ms": round(1e3 * t.median, 4),
            "copies": round(t.median / one, 3),
            "low": round(t.low / one, 3),
            "high": round(t.high / one, 3),
        }
        for name, t in times.items()
    }


def copier(d: int, device: str) -> Work:
    """Return a function that copies float32[d]."""
    source, target = (torch.ones(d, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def parameter(d: int, device: str) -> nn.Parameter:
    """Return a parameter, a matrix of about d elements, with a gradient."""
    weight = nn.Parameter(torch.zeros(-(-d // 1000), 1000, device=device))
    weight.grad = torch.randn(weight.shape, device=device, generator=torch.Generator(device).manual_seed(0))
    return weight


def steps(device: str, d: int, repeats: int) -> dict[str, Any]:
    """Time optimizer steps and rounds of local updates; only one of them and the copy are in memory at a time."""
    fused = {"fused": True}
    solo = Solo()
    makers: dict[str, Callable[[nn.Parameter], torch.optim.Optimizer]] = {
        "SGD, fused": lambda w: torch.optim.SGD([w], 1e-3, **fused),  # type: ignore[arg-type]
        "AdamW, fused": lambda w: torch.optim.AdamW([w], 1e-3, **fused),  # type: ignore[arg-type]
    }
    for compressor in (packsaddle.RandomK(0.01), packsaddle.TopK(0.01)):
        for name, noise in (("", 0.0), (", noise", 1e-6)):
            makers[f"CompressedSGD {describe(compressor)}{name}"] = partial(_ours, compressor, noise, solo)
    makers["AdamW, fused, and a round of local updates"] = partial(_rounds, fused, solo)
    found: dict[str, Any] = {}
    for name, make in makers.items():
        try:
            weight = parameter(d, device)
            optimizer = make(weight)
            times = side_by_side({"copy": copier(d, device), name: optimizer.step}, repeats=repeats)
            found |= {key: row for key, row in ratios(times).items() if key != "copy" or key not in found}
        except torch.OutOfMemoryError as error:
            found[name] = {"failed": str(error).splitlines()[0]}
    return found


def _ours(compressor: packsaddle.Compressor, noise: float, group: Any, weight: nn.Parameter) -> torch.optim.Optimizer:
    return packsaddle.CompressedSGD([weight], 1e-3, compressor, noise=noise, process_group=group)


def _rounds(fused: dict[str, bool], group: Any, weight: nn.Parameter) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([weight], 1e-3, **fused)  # type: ignore[arg-type]
    packsaddle.LocalUpdates(optimizer, every=1, compressor=packsaddle.TopK(1 / 32, values="int2"), workers=group)
    return optimizer


def packing(device: str, d: int, repeats: int) -> dict[str, Any]:
    """Time packing and unpacking by each compressor."""
    v = torch.randn(d, generator=torch.Generator(device).manual_seed(0), device=device)
    out, found = torch.zeros_like(v), dict[str, Any]()
    for compressor in compressors(0.01):
        works = {
            "copy": copier(d, device),
            f"{describe(compressor)} pack": partial(compressor.encode, v, seed=0, step=0),
        }
        try:
            message = compressor.encode(v, seed=0, step=0)
            received = compressor.receive(message.parts, d, seed=0, step=0)
            works[f"{describe(compressor)} unpack"] = partial(compressor.add_decoded, received, out, 1e-6)
            found |= ratios(side_by_side(works, repeats=repeats))
        except (torch.OutOfMemoryError, RuntimeError, ValueError) as error:
            found[describe(compressor)] = {"failed": str(error).splitlines()[0]}
    return found


def trained(device: str) -> dict[str, Any]:
    """Train behind the hook and with local updates; return the losses, and True if all workers have one model."""
    with process_group() as group:  # gloo, since both workers use one GPU
        found = {}
        for name in ("hook", "local updates"):
            model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
            with torch.no_grad():
                for i, p in enumerate(model.parameters()):
                    p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
            model.to(device)
            optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
            forward: nn.Module = model
            local = None
            if name == "hook":
                forward = DistributedDataParallel(model)
                packsaddle.register_ddp_hook(forward, packsaddle.TopK(0.1), optimizer=optimizer)
            else:
                local = packsaddle.LocalUpdates(optimizer, every=4, compressor=packsaddle.TopK(0.1), overlap=2)
            rng = torch.Generator().manual_seed(group.rank)
            losses = []
            for _ in range(20):
                x = torch.randn(32, 64, generator=rng).to(device)
                loss = nn.functional.cross_entropy(forward(x), x[:, :10].argmax(1))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            if local is not None:
                local.flush()
            x = nn.utils.parameters_to_vector(model.parameters()).detach().cpu()
            others = group.all_gather(x)
            found[name] = {"first loss": losses[0], "last loss": losses[-1],
                           "one model": all(torch.equal(x, other) for other in others)}  # fmt: skip
        return found


def tests(seconds: float) -> dict[str, Any]:
    """Run the CUDA and Triton tests in a separate process."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/numerics/test_triton.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    return {"rc": done.returncode, "says": done.stdout.strip().splitlines()[-1:]}


def figure1(data: Path, seconds: float) -> dict[str, Any]:
    """Run figure 1 at the paper's scale, resuming an earlier part, until the time is over."""
    command = [sys.executable, "-m", "lab.paper", "fig1", "--scale", "paper", "--data-dir", str(data)]
    out = ROOT / "runs" / "gpu-figure1"
    command += ["--out", str(out), *["--resume"] * out.exists()]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"stopped after s": round(seconds), "folder": str(out.relative_to(ROOT))}
    return {"rc": done.returncode, "says": (done.stderr or done.stdout).strip().splitlines()[-1:]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--d", type=int, nargs="+", default=[25_000_000, 100_000_000, 1_000_000_000])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--figure1", type=Path, help="CIFAR-10's folder, for figure 1 at the paper's scale")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(f"make gpu needs a CUDA GPU, and torch {torch.__version__} sees none here", file=sys.stderr)
        return 2
    end = time.monotonic() + SECONDS
    found: dict[str, Any] = {"device": args.device, **machine(args.device)}
    parts: dict[str, Work] = {"tests": lambda: tests(max(1.0, end - time.monotonic()))}
    parts["two gloo processes"] = lambda: launch(trained, (args.device,), 2)
    for d in args.d:
        parts[f"steps, d = {d:,}"] = partial(steps, args.device, d, args.repeats)
        parts[f"packing, d = {d:,}"] = partial(packing, args.device, d, args.repeats)
    if args.figure1 is not None:
        parts["figure 1"] = lambda: figure1(args.figure1, max(1.0, end - time.monotonic()))
    for name, part in parts.items():
        begin = time.monotonic()
        if begin > end:
            found[name] = {"failed": "no time was left"}
        else:
            try:
                found[name] = part()
            except Exception as error:  # a failed part must not discard the others' results
                found[name] = {"failed": f"{type(error).__name__}: {error}"}
        print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {args.out}")
    failed = [name for name, part in found.items() if isinstance(part, dict) and ("failed" in part or part.get("rc"))]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
