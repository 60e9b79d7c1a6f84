"""The output of `packsaddle plan link`: the advised method of training with lines to paste into a script, a comparison
of methods, and optional tables of all forecasts. With --json it is one JSON document instead."""

import re
from dataclasses import asdict, dataclass
from json import dumps

from packsaddle.cli.console import brief, digits, number_table, print_table, short_exchange
from packsaddle.compressors.registry import describe
from packsaddle.plan.link import Forecast, Optimizer, Verdict, format_rate
from packsaddle.plan.local import LocalForecast, measured_workers
from packsaddle.plan.model import ModelSize
from packsaddle.plan.step_time import Fleet, Link
from packsaddle.plan.timing import Timing

_UNCUT = "--json prints it whole"
_ERROR = 0.1  # relative error of forecast times on idle machines (experiments/scale)
# Shortest step of dense training, in seconds, that is forecast. Shorter steps consist mostly of fixed costs of some ms
# (experiments/scale).
_SMALLEST = 0.01
_NAMES = {"sgd": "SGD", "adamw": "AdamW", "muon": "Muon and AdamW"}


@dataclass(frozen=True)
class LinkPlan:
    """The forecast time of each method of training on a network link, and the inputs of the forecasts: model, link,
    workers, times."""

    verdict: Verdict
    local: tuple[LocalForecast, ...]  # forecasts of local updates, the fastest first; empty with --optimizer sgd
    workload: ModelSize
    link: Link
    fleet: Fleet
    update: float  # seconds per step for the error memory, in addition to plain SGD's update
    optimizer: Optimizer
    timing: Timing | None  # measured times of a step, whose minimum is `fleet.compute`; None: not measured


@dataclass(frozen=True)
class Method:
    """A method of training, its forecast, and the lines of a script that apply it."""

    name: str
    seconds: float  # seconds to make the progress of one step of uncompressed ("dense") training
    lines: tuple[str, ...] = ()  # lines of a script; empty for DistributedDataParallel and for one machine alone


def methods(plan: LinkPlan) -> list[Method]:
    """Return the methods to choose from, the simplest first: one machine alone, DistributedDataParallel, the DDP
    hook with the compressor forecast to be fastest (only if it is forecast to be faster than
    DistributedDataParallel), and the fastest setting of local updates."""
    # One machine alone accumulates the gradients of all workers' batches, one after the other.
    alone = plan.fleet.workers * plan.fleet.compute
    found = [Method("one machine alone", alone), Method("DistributedDataParallel", plan.verdict.dense.seconds)]
    if plan.verdict.compress:
        found.append(_by_hook(plan.verdict.best))
    return found + [_by_local_updates(plan, f) for f in plan.local[:1]]


def advised(plan: LinkPlan) -> Method:
    """Return the simplest method that is forecast to be less than 10% slower than the fastest one, since forecasts have
    an error of 10%. If steps are too short to forecast, return DistributedDataParallel."""
    found = methods(plan)
    if is_too_small(plan):
        return found[1]
    fastest = min(method.seconds for method in found)
    return next(method for method in found if method.seconds < fastest * (1 + _ERROR))


def is_too_small(plan: LinkPlan) -> bool:
    return plan.verdict.dense.time.total < _SMALLEST


def compared(plan: LinkPlan) -> list[Method]:
    """Return the methods to print, the fastest first: the result of `methods`, and uncompressed local SGD. Local SGD is
    added only if it has a forecast and is not already the fastest setting of local updates."""
    found = methods(plan)
    sgd = next((f for f in plan.local if f.setting.compressor.lossless and not f.setting.delay), None)
    if sgd is not None and sgd is not plan.local[0]:
        found.append(Method(f"uncompressed local SGD, every {sgd.setting.every}", sgd.seconds))
    return sorted(found, key=lambda method: method.seconds)


def _by_hook(forecast: Forecast) -> Method:
    # Name the exchange if it is two-way, since that is not the hook's default.
    argument = forecast.compressor
    if forecast.exchange == "two-way":
        argument = f'Compression({argument}, exchange="two-way")'
    compressor = re.sub(r"\b([A-Z]\w+\()", r"packsaddle.\1", argument)
    lines = (
        "import packsaddle",
        "model = torch.nn.parallel.DistributedDataParallel(model)",
        f"hook = packsaddle.register_ddp_hook(model, {compressor}, optimizer=optimizer)",
    )
    return Method(f"register_ddp_hook, {brief(forecast.compressor)}", forecast.seconds, lines)


def _by_local_updates(plan: LinkPlan, forecast: LocalForecast) -> Method:
    setting = forecast.setting
    arguments = [f"every={setting.every}", f"compressor=packsaddle.{describe(setting.compressor)}"]
    if delay := setting.delay:
        several = f"packsaddle.Overlap({delay}, fragments={forecast.fragments})"
        arguments.append(f"overlap={delay if forecast.fragments == 1 else several}")
    # Suggest an outer momentum for Muon with an exchange every 32 steps or more. The settings in the forecast were
    # measured without outer momentum, which decreased the loss further (experiments/muon).
    if plan.optimizer == "muon" and setting.every >= 32:
        arguments.append("outer=packsaddle.OuterSGD(momentum=0.5)")
    inner = "[muon, adamw]" if plan.optimizer == "muon" else "optimizer"
    lines = (
        "import packsaddle",
        f"local = packsaddle.LocalUpdates({inner}, {', '.join(arguments)}, model=model)  # no DistributedDataParallel",
        "local.flush()  # after the last step",
    )
    name = f"LocalUpdates, every {setting.every}, {brief(describe(setting.compressor))}{', overlap' * bool(delay)}"
    return Method(name, forecast.seconds, lines)


def print_json(plan: LinkPlan) -> None:
    workload, link, verdict = plan.workload, plan.link, plan.verdict
    best = advised(plan)
    document = {
        "model": workload.name,
        "compressed": workload.d,
        "dense": workload.dense,
        "link": {**asdict(link), "nominal_bits": link.bits},
        "fleet": asdict(plan.fleet),
        "update": plan.update,
        "optimizer": plan.optimizer,
        "measured_step": asdict(plan.timing) if plan.timing else None,
        "compress": verdict.compress,
        "best": verdict.best.compressor,
        "forecasts": verdict.plain(),
        "local": [f.plain() for f in plan.local],
        "use": best.name,
        "lines": best.lines,
        "too_small": is_too_small(plan),
        "compared": {method.name: method.seconds for method in compared(plan)},
    }
    print(dumps(document, indent=2))


def print_verdict(plan: LinkPlan) -> None:
    best, fleet, link = advised(plan), plan.fleet, plan.link

    # Print the advised method, and the lines of a script that apply it.
    print(f"Use: {best.name}.")
    if best.lines:
        print("\n    ".join(["", *best.lines]))
    if is_too_small(plan):
        print(
            f"Too small to forecast: a dense step of {ms(plan.verdict.dense.seconds)} ms is no longer than the fixed "
            "costs of an exchange, which the forecast leaves out. Time a larger model, or train on one machine."
        )

    # Print the comparison, and the sources of its numbers.
    print(f"\nTime for the progress of one dense step of {fleet.workers} workers:\n")
    table = number_table("method", "ms", "times")
    for method in compared(plan):
        style = "bold" if method.name == best.name else None
        table.add_row(method.name, ms(method.seconds), digits(method.seconds / best.seconds), style=style)
    print_table(table)
    print(f"One machine alone accumulates {fleet.workers} batches a step; with fewer it may need less time.")
    print(f"{plan.workload.name}: {ms(fleet.compute)} ms of computing a step. Link: {format_rate(link.bits)}.")
    print(
        f"Forecasts count the steps that each method needed on a small language model with {_NAMES[plan.optimizer]}; "
        "your model may differ. --table shows all of them."
    )
    if plan.optimizer != "sgd" and fleet.workers > (most := measured_workers(plan.optimizer)[-1]):
        print(f"Steps were counted with at most {most} workers: with {fleet.workers}, gains are smaller.")
    if plan.timing and plan.timing.median / plan.timing.low - 1 > _ERROR:
        print("The machine is busy: repeat this on an idle one.")


def print_tables(plan: LinkPlan) -> None:
    """Print a table of forecasts for the DDP hook, with a row for each compressor. If there are forecasts for local
    updates, also print a table of them, with a row for each setting."""
    verdict, workload, link, fleet = plan.verdict, plan.workload, plan.link, plan.fleet
    table = number_table("compressor", "by", "sent kB", "step ms", "coding ms", "link ms", "x steps", words=2)
    for f in verdict.forecasts:
        cells = [ms(part) for part in (f.time.total, f.time.compression, f.time.exchange)]
        name, style = ("dense (DDP)", "bold") if f.is_dense else (brief(f.compressor), None)
        table.add_row(name, short_exchange(f.exchange), digits(f.sent / 1e3), *cells, f"{f.steps:.3g}", style=style)
    print()
    print_table(table, _UNCUT)
    if plan.local:
        _print_local(plan.local)
    print("Rows: shortest time to the same loss (step ms times x steps) first.")
    print("Sent: per worker and step, averaged over a round. x steps: relative to dense training.")

    # Print the quantities common to all forecasts.
    print(f"{workload.name}: {workload.d:,} compressed coordinates, {workload.dense:,} dense, {fleet.workers} workers.")
    if timing := plan.timing:
        took = f"which took {ms(timing.low)} to {ms(timing.high)} ms"
        print(f"Computing: the minimum of {timing.repeats} steps with {plan.optimizer}, {took}.")
    print(f"DDP's exchange overlaps with the backward pass. Coding includes {ms(plan.update)} ms for the error memory.")
    print(f"Link: {format_rate(8 * link.rate)} of payload each way, {1e6 * link.latency:.0f} us a message.")


def ms(seconds: float) -> str:
    return digits(1e3 * seconds)


def _print_local(forecasts: tuple[LocalForecast, ...]) -> None:
    table = number_table("local updates", "every", "fragments", "delay", "sent kB", "step ms", "compute %", "x steps")
    for f in forecasts:
        cells = [str(f.setting.every), str(f.fragments), str(f.setting.delay), digits(f.sent / 1e3), ms(f.step)]
        name = brief(describe(f.setting.compressor))
        table.add_row(name, *cells, f"{100 * f.computing:.0f}", f"{f.steps:.3g}")
    print_table(table, _UNCUT)
