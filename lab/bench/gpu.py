"""All tests and measurements that need a GPU, in one command of at most nine minutes that needs no network.

    make gpu
    python -m lab.bench.gpu --out gpu.json [--d 25000000 100000000 1000000000]

Parts, each within the remaining time: the Triton tests; how often a step and a round make the host wait, how many
kernels they launch, and their peak memory; two processes behind DDP's hook and with local updates; with two GPUs a
round over NCCL beside an all-reduce; steps of packsaddle's optimizers and of torch's fused ones; packing and unpacking.
Times are relative to a device copy of the vector: medians and ranges over turns. The JSON file is written after each
part. It has the name of the GPU, and the reasons why parts failed or were skipped. Started again with the same file on
the same machine, the command measures the missing parts only. At the end it prints all parts as one table. Without a
GPU it ends with an error; `--device cpu` runs it on small vectors as a test, without meaningful times.
"""

import argparse
import json
import subprocess
import sys
import time
import warnings
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
    """Return, by name of the measured work, its milliseconds, and the median and range of its time over a copy's."""
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
    """Return a function that copies a vector float32[d] on the device."""
    source, target = (torch.ones(d, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def parameter(d: int, device: str, seed: int = 0) -> nn.Parameter:
    """Return a parameter, a matrix of about d elements, with a gradient from `seed`."""
    weight = nn.Parameter(torch.zeros(-(-d // 1000), 1000, device=device))
    weight.grad = torch.randn(weight.shape, device=device, generator=torch.Generator(device).manual_seed(seed))
    return weight


Make = Callable[[nn.Parameter], torch.optim.Optimizer]


def _makers() -> dict[str, Make]:
    """Return functions that make the optimizers to measure, by name.

    They are torch's optimizers, packsaddle's, and torch's with one round of local updates in each step.
    """
    makers: dict[str, Make] = {
        "SGD, fused": lambda w: torch.optim.SGD([w], 1e-3, fused=True),
        "AdamW, fused": lambda w: torch.optim.AdamW([w], 1e-3, fused=True),
    }
    for compressor in (packsaddle.RandomK(0.01), packsaddle.TopK(0.01), packsaddle.QSGD(127)):
        for name, noise in (("", 0.0), (", noise", 1e-6)):
            makers[f"CompressedSGD {describe(compressor)}{name}"] = partial(_ours, compressor, noise)
    makers["AdamW, fused, and a round of local updates"] = _rounds
    return makers


def steps(device: str, d: int, repeats: int) -> dict[str, Any]:
    """Time optimizer steps and rounds of local updates.

    Memory holds only one optimizer and the copied vector at a time.
    """
    found: dict[str, Any] = {}
    for name, make in _makers().items():
        try:
            weight = parameter(d, device)
            optimizer = make(weight)
            times = side_by_side({"copy": copier(d, device), name: optimizer.step}, repeats=repeats)
            found |= {key: row for key, row in ratios(times).items() if key != "copy" or key not in found}
        except torch.OutOfMemoryError as error:
            found[name] = {"failed": str(error).splitlines()[0]}
    return found


def _ours(compressor: packsaddle.Compressor, noise: float, weight: nn.Parameter) -> torch.optim.Optimizer:
    return packsaddle.CompressedSGD([weight], 1e-3, compressor, noise=noise, process_group=Solo())


def _rounds(weight: nn.Parameter) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([weight], 1e-3, fused=True)
    packsaddle.LocalUpdates(optimizer, every=1, workers=Solo())
    return optimizer


def packing(device: str, d: int, repeats: int) -> dict[str, Any]:
    """Time the packing and unpacking of a vector's message by each compressor."""
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
    """Train with DDP's hook and with local updates, in two processes.

    Returns the losses of each, and True if the final parameters are identical on all workers.
    """
    with process_group() as group:  # NCCL, or gloo if both workers use one GPU
        found, where = {}, _device_of(device, group.rank)
        for name in ("hook", "local updates"):
            model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
            with torch.no_grad():
                for i, p in enumerate(model.parameters()):
                    p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
            model.to(where)
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
                x = torch.randn(32, 64, generator=rng).to(where)
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


def _device_of(device: str, rank: int) -> str:
    """Return the device of a worker: the GPU with its rank as index, or the first GPU if there are too few."""
    return f"cuda:{rank % torch.cuda.device_count()}" if device == "cuda" else device


def tests(seconds: float) -> dict[str, Any]:
    """Run the Triton tests in a separate process."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/numerics/test_triton.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    return {"rc": done.returncode, "says": done.stdout.strip().splitlines()[-1:]}


def counted(device: str, work: Work) -> dict[str, float]:
    """Run `work`, and return the number of times that the host waited for the device, the number of kernels launched,
    and the peak of allocated memory in MB. Returns {} on a CPU."""
    if device == "cpu":
        work()
        return {}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    launches = sum(event.count for event in profile.key_averages() if "LaunchKernel" in event.key)
    waits = sum("synchronizing" in str(warning.message) for warning in found)
    return {"waits": waits, "launches": launches, "peak MB": round(peak, 2)}


def waits(device: str, d: int = 1_000_000) -> dict[str, Any]:
    """Count the waits, kernels and peak memory (see `counted`) of one step of each optimizer.

    The optimizers are torch's, CompressedSGD, and torch's with local updates.
    """
    found: dict[str, Any] = {}
    for name, make in _makers().items():
        optimizer = make(parameter(d, device))
        for _ in range(3):
            optimizer.step()
        found[name] = counted(device, optimizer.step)
    optimizer = torch.optim.AdamW([parameter(d, device)], 1e-3)
    packsaddle.LocalUpdates(optimizer, every=1000, workers=Solo())
    optimizer.step()
    found["a step between two rounds of local updates"] = counted(device, optimizer.step)
    return found


def exchanged(device: str, d: int, repeats: int) -> dict[str, Any]:
    """Time a round of local updates between two workers, and an all-reduce of the same vector, relative to a copy."""
    with process_group() as group:
        where = _device_of(device, group.rank)
        weight, vector = parameter(d, where, group.rank), torch.ones(d, device=where)
        optimizer = torch.optim.SGD([weight], 1e-6)
        packsaddle.LocalUpdates(optimizer, every=1)
        works: dict[str, Work] = {"copy": copier(d, where), "all-reduce": lambda: torch.distributed.all_reduce(vector)}
        works["SGD's step and a round of local updates"] = optimizer.step
        # `repeats` is fixed, so that both workers make the same number of calls.
        return ratios(side_by_side(works, repeats=repeats))


def table(found: dict[str, Any]) -> str:
    """Return the rows of all parts as one Markdown table. A failed part has one row with the reason."""
    lines = ["| part | | measured |", "| --- | --- | --- |"]
    for part, rows in found.items():
        if isinstance(rows, dict):
            whole = {"": rows} if not all(isinstance(row, dict) for row in rows.values()) else rows
            for name, row in whole.items():
                lines.append(f"| {part} | {name} | {', '.join(f'{key} {value}' for key, value in row.items())} |")
        else:
            lines.append(f"| {part} | | {rows} |")
    return "\n".join(lines)


def _made_before(path: Path, here: dict[str, Any]) -> dict[str, Any]:
    """Return the parts that an earlier call on the same machine has written to the file, without failed parts."""
    old = json.loads(path.read_text()) if path.exists() else {}
    if any(old.get(name) != value for name, value in here.items()):
        return {}
    return {name: part for name, part in old.items() if not (isinstance(part, dict) and {"failed", "rc"} & part.keys())}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--d", type=int, nargs="+", default=[25_000_000, 100_000_000, 1_000_000_000])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(f"make gpu needs a CUDA GPU, and torch {torch.__version__} sees none here", file=sys.stderr)
        return 2
    end = time.monotonic() + SECONDS
    here: dict[str, Any] = {"device": args.device, **machine(args.device)}
    found = here | _made_before(args.out, here)
    parts: dict[str, Work] = {"tests": lambda: tests(max(1.0, end - time.monotonic()))}
    parts["waits"] = lambda: waits(args.device)
    parts["two processes"] = lambda: launch(trained, (args.device,), 2)
    if args.device == "cpu" or torch.cuda.device_count() > 1:
        for d in args.d:
            parts[f"exchange, d = {d:,}"] = partial(launch, exchanged, (args.device, d, args.repeats), 2)
    for d in args.d:
        parts[f"steps, d = {d:,}"] = partial(steps, args.device, d, args.repeats)
        parts[f"packing, d = {d:,}"] = partial(packing, args.device, d, args.repeats)
    parts = {name: part for name, part in parts.items() if name not in found}
    for name, part in parts.items():
        begin = time.monotonic()
        if begin > end:
            found[name] = {"failed": "no time was left"}
        else:
            try:
                found[name] = part()
            except Exception as error:  # the failure of one part must not discard the results of the rest
                found[name] = {"failed": f"{type(error).__name__}: {error}"}
        print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {args.out}\n\n{table(found)}")
    failed = [name for name, part in found.items() if isinstance(part, dict) and ("failed" in part or part.get("rc"))]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
