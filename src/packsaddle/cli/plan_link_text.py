"""The output of `packsaddle plan link`: the advised method of training with lines to paste into a script, a comparison
of methods, and optional tables of all forecasts. With --json it is one JSON document instead."""

import re
from dataclasses import asdict, dataclass
from json import dumps
from typing import Any

from packsaddle.cli.console import brief, digits, number_table, print_table, short_exchange
from packsaddle.compressors.registry import describe
from packsaddle.plan.link import Forecast, Optimizer, Verdict, format_rate
from packsaddle.plan.local import Inner, LocalForecast, measured_workers
from packsaddle.plan.model import ModelSize
from packsaddle.plan.step_time import FRAMING, Fleet, Link
from packsaddle.plan.timing import Timing

_UNCUT = "--json prints it whole"
_ERROR = 0.1  # relative error of forecast times on idle machines (experiments/scale)
# Shortest step of dense training, in seconds, that is forecast. Shorter steps consist mostly of fixed costs of some ms
# (experiments/scale).
_SMALLEST = 0.01
_BUSY = 0.3  # the machine is busy if median and minimum encoding time differ by more than this fraction
_UNEQUAL = (
    "Inner steps a second of all workers with these speeds: {} with equal steps, {} with "
    'workers=packsaddle.Workers(weight="steps"), {} by the fastest alone. Steps in a round: {}.'
)
_LONG_FLUSH = 10.0  # shortest time of `LocalUpdates.flush`, in seconds, that the output mentions
_NAMES = {"sgd": "SGD", "adamw": "AdamW", "muon": "Muon and AdamW"}


@dataclass(frozen=True)
class LinkPlan:
    """The forecast time of each method of training on a network link, and the inputs of the forecasts: model, link,
    workers, times."""

    verdict: Verdict
    local: tuple[LocalForecast, ...]  # forecasts of local updates, the fastest first; empty with --optimizer sgd
    workload: ModelSize
    link: Link
    source: str  # text that describes how the link's rate was obtained
    fleet: Fleet
    update: float  # seconds per step for error memory and noise, in addition to plain SGD's update
    optimizer: Optimizer
    timing: Timing | None = None  # measured times of a step, whose minimum is `fleet.compute`; None: not measured
    slowest: "LinkPlan | None" = None  # forecasts for steps of the maximum time in `timing`; None: not measured
    unequal: dict[str, Any] | None = None  # `forecast_unequal(...)` of the fastest local updates; None: equal speeds
    coding_spread: float = 0.0  # maximum over compressors of (median encoding time) / (minimum encoding time) - 1


@dataclass(frozen=True)
class Method:
    """A method of training, its forecast, and the lines of a script that apply it."""

    name: str
    seconds: float  # seconds to make the progress of one step of uncompressed ("dense") training
    lines: tuple[str, ...] = ()  # lines of a script; empty for DistributedDataParallel and for one machine alone
    flush: float = 0.0  # time of `LocalUpdates.flush` at the end of training, in seconds


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
    # flush() all-reduces all coordinates. It sends four bits of each, except after uncompressed rounds.
    workload, workers = plan.workload, plan.fleet.workers
    bits = 8 * workload.itemsize if setting.compressor.lossless else 4
    flush = 2 * (workers - 1) / workers * (workload.d + workload.dense) * bits / 8 / plan.link.rate
    name = f"LocalUpdates, every {setting.every}, {brief(describe(setting.compressor))}{', overlap' * bool(delay)}"
    return Method(name, forecast.seconds, lines, flush)


def print_json(plan: LinkPlan) -> None:
    workload, link, verdict = plan.workload, plan.link, plan.verdict
    best = advised(plan)
    document = {
        "model": workload.name,
        "compressed": workload.d,
        "dense": workload.dense,
        "link": {**asdict(link), "nominal_bits": link.bits, "source": plan.source},
        "fleet": asdict(plan.fleet),
        "update": plan.update,
        "optimizer": plan.optimizer,
        "measured_step": asdict(plan.timing) if plan.timing else None,
        "coding_spread": plan.coding_spread,
        "compress": verdict.compress,
        "best": verdict.best.compressor,
        "forecasts": verdict.plain(),
        "local": [f.plain() for f in plan.local],
        "use": best.name,
        "lines": best.lines,
        "too_small": is_too_small(plan),
        "compared": {method.name: method.seconds for method in compared(plan)},
        "unequal": plan.unequal,
    }
    print(dumps(document, indent=2))


def print_verdict(plan: LinkPlan) -> None:
    best, fleet, link = advised(plan), plan.fleet, plan.link

    # Print the advised method, and the lines of a script that apply it.
    print(f"Use: {best.name}.")
    if best.lines:
        print("\n    ".join(["", *best.lines]))
    if best.flush >= _LONG_FLUSH:
        print(f"\nflush() takes {digits(best.flush)} s on this link.")
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
    print(f"{plan.workload.name}: {ms(fleet.compute)} ms of computing a step. Link: {_line(link.rate)}, {plan.source}.")
    print(
        f"Forecasts count the steps that each method needed on a small language model with {_NAMES[plan.optimizer]}; "
        "your model may differ. --table shows all of them."
    )
    if plan.unequal:
        *rates, steps = plan.unequal.values()
        print(_UNEQUAL.format(*map(digits, rates), ", ".join(map(str, steps))))
    for sentence in _doubts(plan, best):
        print(sentence)


def _doubts(plan: LinkPlan, best: Method) -> list[str]:
    """Return sentences, to be printed, that name the reasons why the forecasts of this plan are less certain than
    usual."""
    found = []
    if unknown := [f.compressor for f in plan.verdict.forecasts if f.steps is None]:
        found.append(f"Left out, as the number of steps is unknown: {', '.join(unknown)}.")
    if plan.optimizer == "muon":
        found.append("Compressors behind the DDP hook were not measured with muon.")
    inner: Inner = "muon" if plan.optimizer == "muon" else "adamw"
    if plan.local and plan.fleet.workers > (most := measured_workers(inner)[-1]):
        found.append(
            f"With {plan.fleet.workers} workers, more steps are needed than with {most}, whose numbers these are: "
            "gains are smaller, and rows with few steps (x steps) lose the least."
        )
    busy = plan.timing.median / plan.timing.low - 1 > _ERROR if plan.timing else False
    if busy or plan.coding_spread > _BUSY:
        found.append("The machine is busy: repeat this on an idle one.")
    if plan.slowest and plan.timing and (slow := advised(plan.slowest)).name != best.name:
        found.append(f"If every step took {ms(plan.timing.high)} ms, as the slowest measured one, use: {slow.name}.")
    return found


def print_tables(plan: LinkPlan) -> None:
    """Print a table of forecasts for the DDP hook, with a row for each compressor. If there are forecasts for local
    updates, also print a table of them, with a row for each setting."""
    verdict, workload, link, fleet = plan.verdict, plan.workload, plan.link, plan.fleet
    units = ("sent kB", "step ms", "coding ms", "link ms")
    table = number_table("compressor", "by", *units, "x steps", "pays below Mbit/s", words=2)
    for f in verdict.forecasts:
        cells = [ms(part) for part in (f.time.total, f.time.compression, f.time.exchange)]
        needed = "unknown" if f.steps is None else f"{'>= ' * f.steps.at_least}{f.steps.factor:.3g}"
        name, style = ("dense (DDP)", "bold") if f.is_dense else (brief(f.compressor), None)
        by = short_exchange(f.exchange)
        table.add_row(name, by, digits(f.sent / 1e3), *cells, needed, _pays_below(f, verdict), style=style)
    print()
    print_table(table, _UNCUT)
    if plan.local:
        _print_local(plan.local)
    print("Rows: shortest time to the same loss (step ms times x steps) first, unknown times last.")
    print("Sent: per worker and step, averaged over a round. x steps: relative to dense training.")

    # Print the quantities common to all forecasts.
    print(f"{workload.name}: {workload.d:,} compressed coordinates, {workload.dense:,} dense, {fleet.workers} workers.")
    waiting = f" and {ms(fleet.waiting)} ms of waiting for the slowest worker" if fleet.waiting else ""
    print(f"In every step: {ms(fleet.compute)} ms of computing{waiting}.")
    if timing := plan.timing:
        took = f"which took {ms(timing.low)} to {ms(timing.high)} ms"
        print(f"That is the minimum of {timing.repeats} steps with {plan.optimizer}, {took}.")
    print("DDP's exchange overlaps with the backward pass.")
    print(f"Coding includes {ms(plan.update)} ms for the error memory, and for the noise with --noise.")
    print(f"Coding times are minima of repeated calls, whose medians are up to {plan.coding_spread:.0%} longer.")
    payload = f"{format_rate(8 * link.rate)} of payload each way, {1e6 * link.latency:.0f} us a message"
    print(f"Link: {payload}.")


def ms(seconds: float) -> str:
    return digits(1e3 * seconds)


def _pays_below(f: Forecast, verdict: Verdict) -> str:
    if f.is_dense:
        return ""
    if not f.is_known:
        return "unknown"
    if f.break_even is None:
        return "any" if f.seconds < verdict.dense.seconds else "none"
    return digits(8 * f.break_even / FRAMING / 1e6)


def _line(payload: float) -> str:
    """Convert a payload rate, in bytes per second, to the nominal rate of the link, which counts packet headers too.
    Return the nominal rate as text."""
    return format_rate(8 * payload / FRAMING)


def _print_local(forecasts: tuple[LocalForecast, ...]) -> None:
    table = number_table("local updates", "every", "fragments", "delay", "sent kB", "step ms", "compute %", "x steps")
    for f in forecasts:
        cells = [str(f.setting.every), str(f.fragments), str(f.setting.delay), digits(f.sent / 1e3), ms(f.step)]
        name = brief(describe(f.setting.compressor))
        table.add_row(name, *cells, f"{100 * f.computing:.0f}", f"{f.steps:.3g}")
    print_table(table, _UNCUT)
