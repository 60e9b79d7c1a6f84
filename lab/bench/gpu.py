"""All tests and measurements that need a GPU, in one command of at most nine minutes that needs no network.

    make gpu
    python -m lab.bench.gpu --out gpu.json [--d 25000000 100000000 1000000000]

Parts, begun while time remains: how often a step and a round make the host wait, how many kernels they launch, and
their peak memory; two processes behind DDP's hook and with local updates; with two GPUs a round over NCCL beside an
all-reduce; steps of packsaddle's optimizers and of torch's fused ones; packing and unpacking. Times are relative to a
device copy of the vector: medians and ranges over turns. The JSON file is written after each part. It has the names of
the GPUs, and the reasons why parts failed or were skipped. Started again with the same file on the same machine, the
command measures the missing and the failed parts only. At the end it prints all parts as one table. Without a GPU it
ends with an error.
"""

import argparse
import gc
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
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
from packsaddle.numerics.devices import accelerators
from packsaddle.plan import Timing, side_by_side

SECONDS = 530.0
COLLECTIVE = timedelta(minutes=2)  # the longest time of a collective, so that a hang ends its part and not the command
Work = Callable[[], object]

LEGEND = """ms: the median time. copies: the same relative to a copy of d float32 numbers on the device, and its range.
waits: how often a step made the host wait for the device. launches: the kernels of a step. peak MB: the memory that a
step allocated beyond the parameters, the gradient and the optimizer's state."""


def ratios(times: dict[str, Timing]) -> dict[str, dict[str, float]]:
    """Return, by name of the measured work, its milliseconds, and the median and range of its time over a copy's."""
    one = times["copy"].median
    return {
        name: {
            "ms": round(1e3 * t.median, 4),
            "copies": round(t.median / one, 3),
            "low": round(t.low / one, 3),
            "high": round(t.high / one, 3),
        }
        for name, t in times.items()
    }


def copier(d: int) -> Work:
    """Return a function that copies a vector float32[d] on the device."""
    source, target = (torch.ones(d, device="cuda") for _ in range(2))
    return lambda: target.copy_(source)


def parameter(d: int, seed: int = 0) -> nn.Parameter:
    """Return a parameter, a matrix of about d elements, with a gradient from `seed`."""
    weight = nn.Parameter(torch.zeros(-(-d // 1000), 1000, device="cuda"))
    weight.grad = torch.randn(weight.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
    return weight


Make = Callable[[nn.Parameter], torch.optim.Optimizer]


def _makers() -> dict[str, Make]:
    """Return functions that make the optimizers to measure, by name.

    They are torch's optimizers, packsaddle's, and torch's with a round of local updates in each step or in none.
    """
    makers: dict[str, Make] = {
        "SGD, fused": lambda w: torch.optim.SGD([w], 1e-3, fused=True),
        "AdamW, fused": lambda w: torch.optim.AdamW([w], 1e-3, fused=True),
    }
    for compressor in (packsaddle.RandomK(0.01), packsaddle.TopK(0.01), packsaddle.QSGD(127)):
        for name, noise in (("", 0.0), (", noise", 1e-6)):
            makers[f"CompressedSGD {describe(compressor)}{name}"] = partial(_ours, compressor, noise)
    makers["AdamW, fused, and a round of local updates"] = partial(_local, 1)
    makers["AdamW, fused, between two rounds of local updates"] = partial(_local, 1_000_000)
    return makers


def steps(d: int, repeats: int) -> dict[str, Any]:
    """Time optimizer steps and rounds of local updates, with one optimizer in memory at a time."""
    found: dict[str, Any] = {}
    gc.collect()
    gc.freeze()  # later collections skip what torch has imported, which would take a second each
    for name, make in _makers().items():
        try:
            found |= _step(name, make, d, repeats)
        except torch.OutOfMemoryError as error:
            found[name] = {"failed": str(error).splitlines()[0]}
        gc.collect()  # optimizers contain reference cycles
    return found


def _step(name: str, make: Make, d: int, repeats: int) -> dict[str, dict[str, float]]:
    optimizer = make(parameter(d))
    return ratios(side_by_side({"copy": copier(d), name: optimizer.step}, repeats=repeats))


def _ours(compressor: packsaddle.Compressor, noise: float, weight: nn.Parameter) -> torch.optim.Optimizer:
    return packsaddle.CompressedSGD([weight], 1e-3, compressor, noise=noise, process_group=Solo())


def _local(every: int, weight: nn.Parameter) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([weight], 1e-3, fused=True)
    packsaddle.LocalUpdates(optimizer, every=every, workers=Solo())
    return optimizer


def packing(d: int, repeats: int) -> dict[str, Any]:
    """Time the packing and unpacking of a vector's message by each compressor."""
    v = torch.randn(d, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    out, found = torch.zeros_like(v), dict[str, Any]()
    for compressor in compressors(0.01):
        name, encode = describe(compressor), partial(compressor.encode, v, seed=0, step=0)
        try:
            received = compressor.receive(encode().parts, d, seed=0, step=0)
            decode = partial(compressor.add_decoded, received, out, 1e-6)
            works: dict[str, Work] = {"copy": copier(d), f"{name} pack": encode, f"{name} unpack": decode}
            found |= ratios(side_by_side(works, repeats=repeats))
        except (torch.OutOfMemoryError, RuntimeError, ValueError) as error:
            found[name] = {"failed": str(error).splitlines()[0]}
    return found


def trained() -> dict[str, Any]:
    """Train with DDP's hook and with local updates, in two processes.

    Returns the losses of each, and True if the final parameters are identical on all workers.
    """
    with process_group(COLLECTIVE) as group:  # NCCL and a GPU each, or gloo if both workers use one GPU
        found = {}
        for name in ("hook", "local updates"):
            model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
            with torch.no_grad():
                for i, p in enumerate(model.parameters()):
                    p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
            model.cuda()
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
                x = torch.randn(32, 64, generator=rng).cuda()
                loss = nn.functional.cross_entropy(forward(x), x[:, :10].argmax(1))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            if local is not None:
                local.flush()
            x = nn.utils.parameters_to_vector(model.parameters()).detach().cpu()
            others = group.all_gather(x)
            found[name] = {"first loss": round(losses[0], 4), "last loss": round(losses[-1], 4),
                           "one model": all(torch.equal(x, other) for other in others)}  # fmt: skip
        return found


def counted(work: Work) -> dict[str, float]:
    """Run `work` twice, and return the number of times that the host waited for the device, the number of kernels
    launched, and the peak of allocated memory in MB."""
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
    # Not the notice that the mode is a prototype, which torch gives once.
    waits = sum("called a synchronizing" in str(warning.message) for warning in found)
    return {"waits": waits, "launches": launches, "peak MB": round(peak, 2)}


def waits(d: int) -> dict[str, Any]:
    """Count the waits, kernels and peak memory (see `counted`) of one step of each optimizer."""
    found: dict[str, Any] = {}
    for name, make in _makers().items():
        optimizer = make(parameter(d))
        for _ in range(3):
            optimizer.step()
        found[name] = counted(optimizer.step)
    return found


def exchanged(d: int, repeats: int) -> dict[str, Any]:
    """Time a round of local updates between two workers, and an all-reduce of the same vector, relative to a copy."""
    with process_group(COLLECTIVE) as group:
        weight, vector = parameter(d, group.rank), torch.ones(d, device="cuda")
        optimizer = torch.optim.SGD([weight], 1e-6)
        packsaddle.LocalUpdates(optimizer, every=1)
        works: dict[str, Work] = {"copy": copier(d), "all-reduce": lambda: torch.distributed.all_reduce(vector)}
        works["SGD's step and a round of local updates"] = optimizer.step
        # `repeats` is fixed, so that both workers make the same number of calls.
        return ratios(side_by_side(works, repeats=repeats))


def table(found: dict[str, Any]) -> str:
    """Return the rows of all parts as one Markdown table. A failed part has one row with the reason."""
    lines = ["| part | | measured |", "| --- | --- | --- |"]
    for part, rows in found.items():
        is_table = isinstance(rows, dict) and all(isinstance(row, dict) for row in rows.values())
        lines += [f"| {part} | {name} | {_text(row)} |" for name, row in (rows if is_table else {"": rows}).items()]
    return "\n".join(lines)


def _text(row: Any) -> str:
    if not isinstance(row, dict):
        return str(row)
    if "copies" in row:
        return "{ms} ms, {copies} copies ({low} to {high})".format(**row)
    return ", ".join(f"{key}: {value}" for key, value in row.items() if key != "traceback")


def _has_failed(part: object) -> bool:
    return isinstance(part, dict) and "failed" in part


def parts(sizes: list[int], repeats: int) -> dict[str, Work]:
    """Return the functions that measure the parts, by name."""
    small = min(1_000_000, *sizes)
    works: dict[str, Work] = {
        f"waits, d = {small:,}": partial(waits, small),
        "two processes": partial(launch, trained, (), 2),
    }
    for d in sizes:
        exchange = partial(launch, exchanged, (d, repeats), 2)
        works[f"exchange, d = {d:,}"] = exchange if torch.cuda.device_count() > 1 else lambda: "skipped: needs two GPUs"
    for d in sizes:
        works[f"steps, d = {d:,}"] = partial(steps, d, repeats)
        works[f"packing, d = {d:,}"] = partial(packing, d, repeats)
    return works


def main(arguments: list[str] | None = None) -> int:
    # Read the command line, and the parts that are there.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--d", type=int, nargs="+", default=[25_000_000, 100_000_000, 1_000_000_000])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"make gpu needs a CUDA GPU, and torch {torch.__version__} sees none here", file=sys.stderr)
        return 2
    here: dict[str, Any] = {"gpus": accelerators(), **machine(), "repeats": args.repeats}
    old: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else here
    if others := [name for name, value in here.items() if old.get(name) != value]:
        parser.error(f"{args.out} was measured with another {others[0]}; name another file with --out")
    found = {name: part for name, part in old.items() if not _has_failed(part)}

    # Measure the missing parts.
    end = time.monotonic() + SECONDS
    for name, part in parts(args.d, args.repeats).items():
        if name in found:
            continue
        begin = time.monotonic()
        print(f"{name}: ", end="", flush=True)
        try:
            found[name] = part() if begin < end else {"failed": "no time was left"}
        except Exception as error:  # the failure of one part must not discard the results of the rest
            trace = getattr(error, "trace", "") or traceback.format_exc()
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            found[name] = {"failed": reason, "traceback": trace.splitlines()}
        print(f"{time.monotonic() - begin:.0f} s", flush=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")

    # Report.
    print(f"\n{table(found)}\n\n{LEGEND}\n\nPlease send {args.out} in an issue: everything above is in it.")
    if failed := [name for name, part in found.items() if _has_failed(part)]:
        print(f"failed: {', '.join(failed)}. The same command tries these parts again.", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
