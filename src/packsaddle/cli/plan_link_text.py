"""The output of `packsaddle plan link`: JSON, or tables with a recommendation."""

import re
from collections.abc import Sequence
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
_ORDER = "shortest time to the same loss (step ms times x steps) first, unknown times last"
_ERROR = 0.1  # relative error of forecast times on idle machines (experiments/scale)
_BUSY = 0.3  # largest normal median over minimum of coding times, minus 1; more is a sign of other work on the machine
_NOTE = (
    "These are times of one step. The number of steps that a compressor needs depends on the optimizer: with "
    "--optimizer sgd or adamw measured numbers are included."
)
_STEPS_NOTE = (
    "x steps: steps for the progress of one dense step with {}, measured on a small language model, each compressor "
    "at its best learning rate (docs/choosing.md). Your model may differ."
)
_LOCAL_NOTE = (
    "x steps: measured on a small language model with {}, with {} workers (learning rates and seeds: {}). Your model "
    "may differ."
)
_UNEQUAL = (
    "Steps a second of all workers with these speeds: {} with equal steps, {} with "
    'workers=Workers(weight="steps"), {} by the fastest alone. Steps in a round: {}.'
)
_LONG_FLUSH = 10.0  # seconds of a flush from which it is named
_MEASURED_IN = {"adamw": ("AdamW", "experiments/race"), "muon": ("Muon and AdamW", "experiments/muon")}


@dataclass(frozen=True)
class LinkPlan:
    """The forecasts for a link, and their inputs: model, link, workers, times."""

    verdict: Verdict
    local: tuple[LocalForecast, ...]  # forecasts of local updates, the fastest first; empty: not requested
    workload: ModelSize
    link: Link
    source: str  # text: how the link's rate was obtained
    fleet: Fleet
    update: float  # seconds per step for error memory and noise, beyond plain SGD's update
    optimizer: Optimizer | None
    timing: Timing | None = None  # times of a step, whose minimum is `fleet.compute`. None: --compute was given
    slowest: tuple[Verdict, tuple[LocalForecast, ...]] | None = None  # forecasts for the maximum of `timing`
    unequal: dict[str, Any] | None = None  # `forecast_unequal` of the fastest local updates. None: speeds are equal
    coding_spread: float = 0.0  # median over minimum of the encoding times, minus 1: the largest of all compressors


def print_json(plan: LinkPlan) -> None:
    workload, link, verdict = plan.workload, plan.link, plan.verdict
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
        "break_even": verdict.break_even,
        "forecasts": verdict.plain(),
    }
    if plan.local:
        best = advice(verdict, plan.local[0], plan.optimizer)
        document |= {"local": [f.plain() for f in plan.local], "use": best.use, "lines": best.lines}
        document |= {"unequal": plan.unequal}
    print(dumps(document, indent=2))


def print_tables(plan: LinkPlan) -> None:
    verdict, workload, link, fleet = plan.verdict, plan.workload, plan.link, plan.fleet
    steps = ("x steps",) if plan.optimizer else ()
    units = ("sent kB", "step ms", "coding ms", "exchange ms")
    table = number_table("compressor", "by", *units, *steps, "pays below Mbit/s", words=2)
    for f in verdict.forecasts:
        cells = [ms(part) for part in (f.time.total, f.time.compression, f.time.exchange)]
        needed = "unknown" if f.steps is None else f"{'>= ' * f.steps.at_least}{f.steps.factor:.3g}"
        cells += [needed] * len(steps)
        name, style = ("dense (DDP)", "bold") if f.is_dense else (brief(f.compressor), None)
        by = short_exchange(f.exchange)
        table.add_row(name, by, digits(f.sent / 1e3), *cells, _pays_below(f, verdict), style=style)
    print_table(table, _UNCUT)
    print(f"Rows: {_ORDER if plan.optimizer else 'shortest step first'}. Sent: per worker and step.")

    # Print the quantities common to all forecasts.
    print(f"{workload.name}: {workload.d:,} compressed coordinates, {workload.dense:,} dense, {fleet.workers} workers.")
    waiting = f" and {ms(fleet.waiting)} ms of waiting for the slowest worker" if fleet.waiting else ""
    print(f"In every step: {ms(fleet.compute)} ms of computing{waiting}.")
    if plan.timing:
        print(spread(plan.timing, plan.optimizer or "adamw"))
    print("DDP's exchange overlaps with the backward pass.")
    print(f"Coding includes {ms(plan.update)} ms for the error memory, and for the noise with --noise.")
    print(coding_spread(plan.coding_spread))
    payload = f"{format_rate(8 * link.rate)} of payload each way, {1e6 * link.latency:.0f} us a message"
    print(f"Link: {_line(link.rate)}, {plan.source}: {payload}.")

    # Print the verdict.
    if plan.optimizer == "muon":
        print("Gradients: compressors behind the DDP hook were not measured with muon.")
    else:
        print(f"{'Gradients: ' * bool(plan.local)}{_sentence(verdict, link, counted=plan.optimizer is not None)}")
        print(_NOTE if plan.optimizer is None else _STEPS_NOTE.format(plan.optimizer))
    if plan.local:
        _print_local(verdict.dense.seconds, plan.local, fleet.workers, "muon" if plan.optimizer == "muon" else "adamw")
        if plan.unequal:
            *rates, steps = plan.unequal.values()
            print(_UNEQUAL.format(*map(digits, rates), ", ".join(map(str, steps))))
        best = advice(verdict, plan.local[0], plan.optimizer)
        if best.lines:
            print("\n    ".join(["Lines for your script:", *best.lines]))
        if best.is_local and (seconds := flush_seconds(verdict, plan.local[0], link.rate)) >= _LONG_FLUSH:
            print(f"flush() takes {digits(seconds)} s on this link.")
        if plan.slowest:
            if_slow = advice(plan.slowest[0], plan.slowest[1][0], plan.optimizer)
            print(f"If every step took as long as the slowest measured one, use: {if_slow.use}")
        print(f"Use: {best.use}")


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


def spread(timing: Timing, optimizer: str) -> str:
    """Return a sentence on the measured times of a step, with advice if the median shows a busy machine."""
    busy = timing.median / timing.low - 1
    said = f" The machine is busy: the median is {busy:.0%} longer. Repeat this on an idle one."
    return (
        f"That is the minimum of {timing.repeats} steps with {optimizer}, which took {ms(timing.low)} to "
        f"{ms(timing.high)} ms.{said if busy > _ERROR else ''}"
    )


def coding_spread(busy: float) -> str:
    """Return a sentence on the measured coding times, with advice if `busy`, median over minimum - 1, is large."""
    said = " The machine is busy: repeat this on an idle one." if busy > _BUSY else ""
    return f"Coding times are minima of repeated calls, whose medians are up to {busy:.0%} longer.{said}"


def _line(payload: float) -> str:
    """Format a payload rate, in bytes per second, as the nominal rate of the link that carries it."""
    return format_rate(8 * payload / FRAMING)


def _sentence(verdict: Verdict, link: Link, *, counted: bool) -> str:
    """Return the verdict on compressing gradients as text; `counted`: times include the number of steps needed."""
    best, dense, equal = verdict.best.seconds, verdict.dense.seconds, verdict.break_even

    # If compression does not pay, name the rates at which it does.
    if not verdict.compress:
        unknown = [f.compressor for f in verdict.forecasts if not f.is_known]
        elsewhere = "Compression does not pay on any link."
        if equal is not None:
            elsewhere = f"Compression pays below {_line(equal)}."
        elif unknown:
            elsewhere = f"The number of steps is unknown for {', '.join(unknown)}."
        return f"DO NOT COMPRESS: no compressor is known to be faster than dense training. {elsewhere}"

    # Else compare the fastest compressor with dense training.
    how = f"{verdict.best.compressor} by {verdict.best.exchange}"
    factor = verdict.best.steps.factor if verdict.best.steps else 1.0
    shown = f"{ms(best)} ms"
    took = f"a step of {shown}" if factor == 1 else f"{shown} for the progress of one dense step ({factor:.3g} steps)"
    gain = f"{took} instead of {ms(dense)}, {dense / best:.3g} times as fast"
    doubt = "; that is within the error of this model, so HARDLY WORTH IT" if dense / best < 1 + _ERROR else ""
    pays = "Compression pays" if counted else "Its step is shorter than DDP's"
    until = f" {pays} below {_line(equal)}." if equal is not None and equal > link.rate else ""
    return f"{'Best' if counted else 'Shortest step'}: {how}: {gain}{doubt}.{until}"


def _print_local(dense: float, forecasts: Sequence[LocalForecast], workers: int, optimizer: Inner) -> None:
    """Print the table of local updates, and compare the fastest with dense training (`dense` seconds per step)."""
    table = number_table("local updates", "every", "fragments", "delay", "sent kB", "step ms", "compute %", "x steps")
    for f in forecasts:
        cells = [str(f.setting.every), str(f.fragments), str(f.setting.delay), digits(f.sent / 1e3), ms(f.step)]
        name = brief(describe(f.setting.compressor))
        table.add_row(name, *cells, f"{100 * f.computing:.0f}", f"{f.steps:.3g}")
    print_table(table, _UNCUT)
    print(f"Rows: {_ORDER}. Sent: per worker and step, averaged over a round.")

    # Compare the fastest by seconds per step times the number of steps relative to dense training.
    best = forecasts[0]
    took = f"{ms(best.seconds)} ms for the progress of one dense step, which takes {ms(dense)}"
    times = dense / best.seconds
    verdict = f"{times:.3g} times as fast" if times > 1 + _ERROR else "NOT WORTH IT on this link"
    print(f"{_call(best, optimizer)}: {took}: {verdict}; {best.computing:.0%} of the time is computing.")
    inner, where = _MEASURED_IN[optimizer]
    *fewer, most = measured_workers(optimizer)
    print(_LOCAL_NOTE.format(inner, f"{', '.join(map(str, fewer))} or {most}", where))
    if workers > most:
        print(
            f"With {workers} workers, more steps are needed than with {most}, whose numbers these are: gains are "
            f"smaller, and rows with few steps (x steps) lose the least."
        )


def _call(f: LocalForecast, optimizer: Optimizer | None, package: str = "", more: str = "") -> str:
    inner = "[muon, adamw]" if optimizer == "muon" else "optimizer"
    setting = f"every={f.setting.every}, compressor={package}{describe(f.setting.compressor)}"
    if delay := f.setting.delay:
        fragments = f"{package}Overlap({delay}, fragments={f.fragments})"
        setting += f", overlap={delay if f.fragments == 1 else fragments}"
    return f"{package}LocalUpdates({inner}, {setting}{more})"


@dataclass(frozen=True)
class Advice:
    """The fastest method of training, in words, and the lines of a script that apply it."""

    use: str
    lines: list[str]  # empty for plain DDP
    is_local: bool = False  # it is local updates, whose training ends with `flush`


def flush_seconds(verdict: Verdict, local: LocalForecast, rate: float) -> float:
    """Return the seconds of `LocalUpdates.flush` at a rate in bytes a second: four bits a value, or 32 as rounds."""
    bits = 32 if local.setting.compressor.lossless else 4
    return verdict.dense.sent * bits / 32 / rate


def advice(verdict: Verdict, local: LocalForecast, optimizer: Optimizer | None) -> Advice:
    """Return the fastest method: dense training, unless the hook or local updates are faster by more than the error of
    a forecast."""
    dense, hook = verdict.dense.seconds, verdict.best
    if dense < min(hook.seconds, local.seconds) * (1 + _ERROR):
        return Advice("DistributedDataParallel as it is.", [])
    if local.seconds <= hook.seconds:
        # With an outer momentum every 32 steps of Muon the loss was lower than in the forecast's measurements
        # (experiments/muon).
        helps = optimizer == "muon" and local.setting.every >= 32
        more = (", outer=packsaddle.OuterSGD(momentum=0.5)" if helps else "") + ", model=model"
        lines = [
            "import packsaddle",
            f"local = {_call(local, optimizer, 'packsaddle.', more)}  # and no DistributedDataParallel",
            "local.flush()  # after the last step",
        ]
        return Advice(f"LocalUpdates, {_faster(dense, local.seconds)}", lines, is_local=True)

    # The hook: a two-way exchange is not its default.
    argument = hook.compressor
    if hook.exchange == "two-way":
        argument = f'Compression({argument}, exchange="two-way")'
    compressor = re.sub(r"\b([A-Z]\w+\()", r"packsaddle.\1", argument)
    lines = [
        "import packsaddle",
        "model = torch.nn.parallel.DistributedDataParallel(model)",
        f"hook = packsaddle.register_ddp_hook(model, {compressor}, optimizer=optimizer)",
    ]
    return Advice(f"register_ddp_hook with {argument}, {_faster(dense, hook.seconds)}", lines)


def _faster(dense: float, seconds: float) -> str:
    return f"{dense / seconds:.3g} times as fast as dense training."
