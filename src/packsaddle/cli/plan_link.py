"""The command `packsaddle plan link`."""

import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from json import dumps
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from packsaddle.cli.compressor_names import FIXED, WITH_RATIO, called, check_name
from packsaddle.cli.console import brief, digits, is_first, kilobytes, number_table, print_table, short_exchange
from packsaddle.cli.flags import grouped
from packsaddle.cli.own_function import call, importing_from
from packsaddle.cli.parsing import Seconds
from packsaddle.comm.group import Group
from packsaddle.comm.launching import local_device, process_group, under_launcher
from packsaddle.compressors import Compressor
from packsaddle.compressors.registry import compressors, describe
from packsaddle.errors import ConfigError, config_errors
from packsaddle.messages import first_line
from packsaddle.plan import link as link_planner
from packsaddle.plan.coding import Pace, measure
from packsaddle.plan.link import MEASURED, Forecast, Optimizer, Verdict, forecast, probe, probe_locally
from packsaddle.plan.local import Inner, LocalForecast, check_most_steps, forecast_local, measured_with
from packsaddle.plan.model_size import ModelSize, update_seconds
from packsaddle.plan.step_time import FRAMING, LATENCY, Fleet, Link
from packsaddle.plan.timing import Timing
from packsaddle.plan.training_step import TrainingStep, random_batch
from packsaddle.runs.progress import Report, countdown

_BATCH = 32
_UNCUT = "--json prints it whole"
_ORDER = "shortest time to the same loss (step ms times x steps) first, unknown times last"
_ERROR = 0.1  # relative error of forecast times on idle machines (experiments/scale)
_NOTE = (
    "These are times of one step. The number of steps that a compressor needs depends on the optimizer: with "
    "--optimizer sgd or adamw measured numbers are included."
)
_STEPS_NOTE = (
    "x steps: steps for the progress of one dense step with {}, measured on a small language model, each compressor "
    "at its best learning rate (docs/choosing.md). Your model may differ."
)
_LOCAL_NOTE = (
    "x steps: measured on a small language model with {}, with 2 or 4 workers (learning rates and seeds: {}). Your "
    "model may differ."
)
_MEASURED_IN = {"adamw": ("AdamW", "experiments/race"), "muon": ("Muon and AdamW", "experiments/muon")}


@dataclass(frozen=True)
class LinkOptions:
    """Options of `packsaddle plan link`: model, times, local updates. Raises ValueError for incompatible options.

    Args:
        d: Number of parameters of the model, such as 25M, 25e6 or 25000000, instead of --model.
        model: Network to train, instead of --d: mnist-autoencoder, char-transformer (117,221 parameters, over
            Python's own reference), or resnet18, resnet34 or resnet50 (for 32 x 32 images). For your own model
            MODULE:FUNCTION, which is imported from the current folder and called without arguments; implies --local.
        data: MODULE:FUNCTION that returns a batch for your own model, called with the number of examples. A batch is
            the model's argument, a tuple of its arguments, or a dict of keyword arguments.
        input: Shape of one example for your own model, instead of --data: 3x224x224 for random numbers, int64:1024 for
            random tokens.
        latency: Time of a small message on the link; by default 100us. It is measured if RATE is auto.
        compute: Time of a step without communication (forward, backward, optimizer), such as 55ms; by default
            measured on this machine for --model, with AdamW or --optimizer.
        batch: Examples per worker and step when the compute time is measured; by default 32.
        spread: Standard deviation of the workers' compute times, as a fraction of their mean.
        noise: Include the time for generating the artificial noise of Algorithm 1.
        local: Also plan local updates (their period, compressor, fragments and overlap), and recommend the fastest
            method. Their numbers of steps were measured with adamw, which becomes the default of --optimizer, and with
            muon.
        most_steps: Exclude local updates that need more than this multiple of the steps of dense training.
    """

    d: int | None = None
    model: str | None = None
    data: str | None = None
    input: str | None = None
    latency: Seconds | None = None
    compute: Seconds | None = None
    batch: int | None = None
    spread: float = 0.0
    noise: bool = False
    local: bool = False
    most_steps: float | None = None

    def __post_init__(self) -> None:
        if (self.d is None) == (self.model is None):
            raise ValueError(f"model or --d must be given, not both; got model={self.model} and d={self.d}")
        if self.compute is None and self.model is None:
            raise ValueError("d needs --compute SECONDS (a --model is measured)")
        if self.compute is not None and self.batch is not None:
            raise ValueError("batch is for measuring the compute time, which --compute sets: leave out one of them")
        if self.most_steps is not None and not (self.local or self.is_own):
            raise ValueError("most_steps is for local updates: it needs --local")
        example = (self.data is not None) + (self.input is not None)
        if example and not self.is_own:
            raise ValueError(f"{'input' if self.data is None else 'data'} is for --model MODULE:FUNCTION")
        if self.is_own and example != (self.compute is None):
            raise ValueError("model MODULE:FUNCTION needs one of --data MODULE:FUNCTION, --input SHAPE and --compute")

    @property
    def is_own(self) -> bool:
        """True if the model is the user's own."""
        return ":" in (self.model or "")

    def training_step(self) -> TrainingStep | None:
        """Make the training step (model and batch) to time; None for --d. Its batch is None with --compute.

        Raises ConfigError if the user's function fails or returns no module.
        """
        batch = _BATCH if self.batch is None else self.batch
        if self.model is None:
            return None
        if not self.is_own:
            return TrainingStep.of_model(self.model, batch)
        with importing_from(Path.cwd()), torch.random.fork_rng(devices=[]):
            model = call(self.model)
            if not isinstance(model, torch.nn.Module):
                raise ConfigError(f"{self.model} must return a torch.nn.Module, got {type(model).__name__}")
            return TrainingStep(model, call(self.data, batch) if self.data else _random_batch(self.input, model, batch))


def _random_batch(text: str | None, model: torch.nn.Module, batch: int) -> torch.Tensor | None:
    """Return a batch of random examples of the shape in --input; None without it. Raises ConfigError if invalid."""
    if text is None:
        return None
    kind, _, sizes = text.rpartition(":")
    if kind not in ("", "float32", "int64") or not all(size.isdecimal() for size in sizes.split("x")):
        raise ConfigError(f"--input must be a shape such as 3x224x224, or int64:1024 for tokens, got {text!r}")
    return random_batch(model, tuple(map(int, sizes.split("x"))), batch, tokens=kind == "int64")


@dataclass(frozen=True)
class _Inputs:
    """The inputs of a plan (model, link, workers, times), and the forecasts of local updates."""

    workload: ModelSize
    link: Link
    source: str  # text: how the link's rate was obtained
    fleet: Fleet
    update: float  # seconds per step for error memory and noise, beyond plain SGD's update
    optimizer: Optimizer | None
    local: tuple[LocalForecast, ...]  # sorted by time, shortest first; empty: not requested
    timing: Timing | None = None  # measured times of a step; `fleet` has the minimum. None: --compute was given
    slowest: tuple[Verdict, tuple[LocalForecast, ...]] | None = None  # forecasts for the maximum of `timing`


@grouped(
    {
        "": "model d workers data input json",
        "compressor": "compressor ratio optimizer",
        "local update": "local most_steps",
        "step time": "compute batch spread noise latency",
    }
)
def link(
    rate: Annotated[str, tyro.conf.Positional],
    options: LinkOptions,
    compressor: str = "best",
    ratio: float | None = None,
    optimizer: Optimizer | None = None,
    workers: int | None = None,
    json: bool = False,
) -> None:
    """Find the compressor that trains fastest on a network link.

    Forecasts the time of a step with each compressor, and compares it with uncompressed (dense) training.

    Examples:
        packsaddle plan link 100mbit --model char-transformer --workers 2 --local
        packsaddle plan link 100mbit --model char-transformer --workers 2 --optimizer muon
        packsaddle plan link 100mbit --model resnet18 --optimizer sgd
        packsaddle plan link 100mbit --model train:make_model --input int64:256 --batch 8 --workers 2
        packsaddle plan link 20mbit/100mbit --model char-transformer --local
        torchrun --nnodes 2 --nproc-per-node 1 -m packsaddle.cli plan link auto --model resnet18

    Args:
        rate: Rate of each worker's link, such as 100mbit, 1gbit or 12.5MB/s; UP/DOWN, such as 20mbit/100mbit, for
            different rates of sending and receiving (the slower one limits); or "auto" to measure it between
            torchrun's workers, or without torchrun between processes on this machine.
        compressor: "best" (all of them), or one of RandomK, TopK, SketchTopK, SharedTopK, LinearSketch, AdaptiveTopK,
            Sign, QSGD, LowRank and Identity, in any case; or a call: 'TopK(0.01, values="int8")'.
        ratio: Fraction of the coordinates to send, such as 0.01 or 1%; by default 0.01.
        optimizer: Multiply step times by the number of steps that each compressor needed with this optimizer, relative
            to dense training. sgd, adamw: measured with the DDP hook; only measured compressors are compared, unless
            --ratio is given. muon (with AdamW for all except hidden matrices): measured with local updates; implies
            --local.
        workers: Number of workers; by default 4, or the number that torchrun started.
        json: Print one JSON document.
    """
    if options.local and optimizer == "sgd":
        raise ConfigError("--local was measured with adamw and muon only: leave out --optimizer sgd")
    with config_errors():
        if optimizer == "muon" or (options.is_own and optimizer != "sgd"):
            options = replace(options, local=True)
        chosen = optimizer or ("adamw" if options.local else None)
        verdict, inputs = _plan(rate, options, compressor, ratio, chosen, workers)
    if is_first():
        show = _print_json if json else _print_tables
        show(verdict, inputs)


def _plan(
    rate: str,
    options: LinkOptions,
    compressor: str,
    ratio: float | None,
    optimizer: Optimizer | None,
    workers: int | None,
) -> tuple[Verdict, _Inputs]:
    # Validate all options before measuring.
    candidates = _candidates(compressor, ratio, optimizer)
    bits = None if rate == "auto" else link_planner.slower_rate(rate)
    workers = _workers(workers)
    if bits is None and options.latency is not None:
        raise ConfigError("--latency is measured if RATE is auto: leave it out")
    link = Link.nominal(bits or 1.0, LATENCY if options.latency is None else options.latency)
    source, step = "as given", options.training_step()
    if step is None:
        workload = ModelSize.of_size(options.d or 0)
    else:
        trained = [p for p in step.model.parameters() if p.requires_grad]
        workload = ModelSize.of_parameters(str(options.model), trained)
    most = math.inf if options.most_steps is None else options.most_steps
    inner: Inner = "muon" if optimizer == "muon" else "adamw"
    settings = measured_with(workers, inner)
    check_most_steps(most, settings)
    fleet = Fleet(workers, options.compute or 0.0, options.spread)

    with process_group() if under_launcher() else nullcontext() as group:
        # Measure the time of an update and, unless they are given, the link and the compute time.
        device = torch.device("cpu") if group is None else local_device()
        if group is None and step is not None:
            device = next(step.model.parameters()).device
        if bits is None:
            link, source = _measured(group, workers, device)
        total = len(candidates) + len({s.compressor for s in settings}) * options.local + 1
        with countdown("plan", total, quiet=not is_first()) as report:
            report(0, "timing the model and an update")
            timing = None
            if options.compute is None and step is not None:
                timing = _timed(step.to(device), optimizer or "adamw", str(options.model))
                fleet = replace(fleet, compute=timing.low)
            update = update_seconds(workload.d, noise=options.noise, device=device)

            # Forecast; `pace` measures the speed of each compressor, once.
            pace = cache(_reporting(partial(measure, repeats=3, device=device), report))

            def forecasts(fleet: Fleet) -> tuple[Verdict, tuple[LocalForecast, ...]]:
                verdict = forecast(workload, link, fleet, candidates, pace, update=update, optimizer=optimizer)
                if not options.local:
                    return verdict, ()
                return verdict, forecast_local(
                    workload, link, fleet, pace, optimizer=inner, update=update, most_steps=most
                )

            verdict, local = forecasts(fleet)
            slowest = forecasts(replace(fleet, compute=timing.high)) if timing else None
    return verdict, _Inputs(workload, link, source, fleet, update, optimizer, local, timing, slowest)


def _timed(step: TrainingStep, optimizer: Optimizer, name: str) -> Timing:
    """Measure the time of a training step. Raises ConfigError if the user's model fails on its batch."""
    try:
        return step.time(optimizer)
    except Exception as error:  # a user's model can raise anything
        raise ConfigError(f"{name} failed on its batch: {first_line(error)}") from None


def _candidates(name: str, ratio: float | None, optimizer: Optimizer | None) -> list[Compressor]:
    """Return the compressors to compare: `name`, or for "best" all measured with `optimizer`, or all lossy ones."""
    if "(" in name:
        return [called(name, ratio)]
    name = name.lower()
    check_name(name)
    if optimizer is not None and name == "best" and ratio is None:
        return list(MEASURED[optimizer])
    if ratio is not None and name in FIXED:
        raise ConfigError(f"ratio is for one of best, {', '.join(WITH_RATIO)}, got compressor {name!r}")
    ratio = 0.01 if ratio is None else ratio
    if name == "best":
        return [c for c in compressors(ratio) if not c.lossless]
    return [WITH_RATIO[name](ratio)] if name in WITH_RATIO else [FIXED[name]]


def _reporting(pace: Callable[[Compressor, int], Pace], report: Report) -> Callable[[Compressor, int], Pace]:
    done = 0

    def reported(compressor: Compressor, d: int) -> Pace:
        nonlocal done
        done += 1
        report(done, f"timing {brief(describe(compressor))}")
        return pace(compressor, d)

    return reported


def ms(seconds: float) -> str:
    """Format a time, given in seconds, as milliseconds without the unit."""
    return digits(1e3 * seconds)


def _workers(requested: int | None) -> int:
    """Return the number of workers: torchrun's, else `requested`, else 4. Raises ConfigError if it is invalid."""
    world = int(os.environ["WORLD_SIZE"]) if under_launcher() else None
    if world is not None and requested not in (None, world):
        raise ConfigError(f"workers must be {world}, the number that torchrun started, got {requested}")
    workers = world or (4 if requested is None else requested)
    if workers < 2 and world is None:
        raise ConfigError(f"workers must be at least 2 (one worker sends nothing), got {workers}")
    return workers


def _measured(group: Group | None, workers: int, device: torch.device) -> tuple[Link, str]:
    if group is not None:
        return probe(group, device), "measured between torchrun's workers"
    return probe_locally(workers), "measured on this machine's loopback interface, NOT on a network"


def _print_json(verdict: Verdict, inputs: _Inputs) -> None:
    workload, link, fleet = inputs.workload, inputs.link, inputs.fleet
    document = {
        "model": workload.name,
        "compressed": workload.d,
        "dense": workload.dense,
        "link": {**asdict(link), "nominal_bits": link.bits, "source": inputs.source},
        "fleet": asdict(fleet),
        "update": inputs.update,
        "optimizer": inputs.optimizer,
        "measured_step": asdict(inputs.timing) if inputs.timing else None,
        "compress": verdict.compress,
        "best": verdict.best.compressor,
        "break_even": verdict.break_even,
        "forecasts": verdict.plain(),
        **({"local": [f.plain() for f in inputs.local]} if inputs.local else {}),
    }
    print(dumps(document, indent=2))


def _print_tables(verdict: Verdict, inputs: _Inputs) -> None:
    workload, link, fleet = inputs.workload, inputs.link, inputs.fleet
    steps = ("x steps",) if inputs.optimizer else ()
    units = ("sent kB", "step ms", "coding ms", "exchange ms")
    table = number_table("compressor", "by", *units, *steps, "pays below Mbit/s", words=2)
    for f in verdict.forecasts:
        cells = [ms(part) for part in (f.time.total, f.time.compression, f.time.exchange)]
        cells += [_steps(f)] * len(steps)
        name, style = ("dense (DDP)", "bold") if f.is_dense else (brief(f.compressor), None)
        by = short_exchange(f.exchange)
        table.add_row(name, by, kilobytes(f.sent), *cells, _pays_below(f, verdict), style=style)
    print_table(table, _UNCUT)
    print(f"Rows: {_ORDER if inputs.optimizer else 'shortest step first'}. Sent: per worker and step.")

    # Print the quantities common to all forecasts.
    print(f"{workload.name}: {workload.d:,} compressed coordinates, {workload.dense:,} dense, {fleet.workers} workers.")
    waiting = f" and {ms(fleet.waiting)} ms of waiting for the slowest worker" if fleet.waiting else ""
    print(f"In every step: {ms(fleet.compute)} ms of computing{waiting}.")
    if inputs.timing:
        print(_spread(inputs.timing, inputs.optimizer or "adamw"))
    print("DDP's exchange overlaps with the backward pass.")
    print(f"Coding includes {ms(inputs.update)} ms for the error memory, and for the noise with --noise.")
    payload = f"{link_planner.format_rate(8 * link.rate)} of payload each way, {1e6 * link.latency:.0f} us a message"
    print(f"Link: {_line(link.rate)}, {inputs.source}: {payload}.")

    # Print the verdict.
    of_what = "Gradients: " if inputs.local else ""
    if inputs.optimizer == "muon":
        print("Gradients: compressors behind the DDP hook were not measured with muon.")
    else:
        print(f"{of_what}{_sentence(verdict, link, counted=inputs.optimizer is not None)}")
        print(_NOTE if inputs.optimizer is None else _STEPS_NOTE.format(inputs.optimizer))
    if inputs.local:
        _print_local(verdict.dense.seconds, inputs.local, inputs.optimizer or "adamw")
        for line in _lines_to_paste(verdict, inputs.local[0], inputs.optimizer):
            print(line)
        if inputs.slowest:
            advice = _recommendation(inputs.slowest[0], inputs.slowest[1][0])
            print(f"If every step took as long as the slowest measured one, {advice.replace('Use:', 'use:', 1)}")
        print(_recommendation(verdict, inputs.local[0]))


def _spread(timing: Timing, optimizer: str) -> str:
    """Return a sentence on the measured times of a step, with advice if the median shows a busy machine."""
    busy = timing.median / timing.low - 1
    said = (
        f" The machine is busy: the median is {busy:.0%} longer. Repeat this on an idle one." if busy > _ERROR else ""
    )
    return (
        f"That is the minimum of {timing.repeats} steps with {optimizer}, which took {ms(timing.low)} to "
        f"{ms(timing.high)} ms.{said}"
    )


def _print_local(dense: float, forecasts: Sequence[LocalForecast], optimizer: Optimizer) -> None:
    """Print the table of local updates, and compare the fastest with dense training (`dense` seconds per step)."""
    table = number_table("local updates", "every", "parts", "delay", "sent kB", "step ms", "compute %", "x steps")
    for f in forecasts:
        cells = [str(f.setting.every), str(f.fragments), str(f.setting.delay), kilobytes(f.sent), ms(f.step)]
        name = brief(describe(f.setting.compressor))
        table.add_row(name, *cells, f"{100 * f.computing:.0f}", f"{f.steps:.3g}")
    print_table(table, _UNCUT)
    print(f"Rows: {_ORDER}. Sent: per worker and step, averaged over a round.")

    # Compare the fastest by seconds per step times the number of steps relative to dense training.
    best = forecasts[0]
    took = f"{ms(best.seconds)} ms for the progress of one dense step, which takes {ms(dense)}"
    times = dense / best.seconds
    verdict = f"{times:.3g} times as fast" if times > 1 + _ERROR else "NOT WORTH IT on this link"
    named = f"LocalUpdates({_inner(optimizer)}, {_setting(best)})"
    print(f"{named}: {took}: {verdict}; {best.computing:.0%} of the time is computing.")
    print(_LOCAL_NOTE.format(*_MEASURED_IN[optimizer]))


def _inner(optimizer: Optimizer | None) -> str:
    """Format the first argument of LocalUpdates."""
    return "[muon, adamw]" if optimizer == "muon" else "optimizer"


def _setting(f: LocalForecast, package: str = "") -> str:
    """Format the arguments of LocalUpdates after the optimizers; class names get the prefix `package`."""
    setting = f"every={f.setting.every}, compressor={package}{describe(f.setting.compressor)}"
    if delay := f.setting.delay:
        fragments = f"{package}Overlap({delay}, fragments={f.fragments})"
        setting += f", overlap={delay if f.fragments == 1 else fragments}"
    return setting


def _lines_to_paste(verdict: Verdict, local: LocalForecast, optimizer: Optimizer | None) -> list[str]:
    """Return Python lines for the user's script that apply the recommended method; empty for plain DDP."""
    method = _fastest(verdict, local)
    if method == "local":
        lines = [
            "import packsaddle",
            f"local = packsaddle.LocalUpdates({_inner(optimizer)}, {_setting(local, 'packsaddle.')})  # and no "
            "DistributedDataParallel",
            "local.flush()  # after the last step",
        ]
    elif method == "hook":
        compressor = re.sub(r"\b([A-Z]\w+\()", r"packsaddle.\1", _hook_argument(verdict.best))
        lines = [
            "import packsaddle",
            "model = torch.nn.parallel.DistributedDataParallel(model)",
            f"hook = packsaddle.register_ddp_hook(model, {compressor}, optimizer=optimizer)",
        ]
    else:
        return []
    return ["Lines for your script:", *(f"    {line}" for line in lines)]


def _recommendation(verdict: Verdict, local: LocalForecast) -> str:
    """Return the line that recommends the fastest: dense training, the compressing hook or local updates."""
    method, dense, hook = _fastest(verdict, local), verdict.dense.seconds, verdict.best
    if method == "dense":
        return "Use: DistributedDataParallel as it is."
    if method == "local":
        return f"Use: LocalUpdates, {dense / local.seconds:.3g} times as fast as dense training."
    argument = _hook_argument(hook)
    return f"Use: register_ddp_hook with {argument}, {dense / hook.seconds:.3g} times as fast as dense training."


def _fastest(verdict: Verdict, local: LocalForecast) -> Literal["dense", "hook", "local"]:
    """Return the fastest method; dense training unless another is faster by more than the error of a forecast."""
    hook = verdict.best.seconds
    if verdict.dense.seconds < min(hook, local.seconds) * (1 + _ERROR):
        return "dense"
    return "local" if local.seconds <= hook else "hook"


def _hook_argument(hook: Forecast) -> str:
    """Format the compressor of a forecast as the argument of register_ddp_hook."""
    name = hook.compressor
    return f'Compression({name}, exchange="two-way")' if hook.exchange == "two-way" else name  # not the default


def _steps(f: Forecast) -> str:
    if f.steps is None:
        return "unknown"
    return f"{'>= ' * f.steps.at_least}{f.steps.factor:.3g}"


def _pays_below(f: Forecast, verdict: Verdict) -> str:
    if f.is_dense:
        return ""
    if not f.is_known:
        return "unknown"
    if f.break_even is None:
        return "any" if f.seconds < verdict.dense.seconds else "none"
    return digits(8 * f.break_even / FRAMING / 1e6)


def _sentence(verdict: Verdict, link: Link, *, counted: bool) -> str:
    """Return the verdict on compressing gradients as text; `counted`: times include the number of steps needed."""
    if not verdict.compress:
        return f"DO NOT COMPRESS: no compressor is known to be faster than dense training. {_elsewhere(verdict)}"
    best, dense, equal = verdict.best.seconds, verdict.dense.seconds, verdict.break_even
    how = f"{verdict.best.compressor} by {verdict.best.exchange}"
    factor = verdict.best.steps.factor if verdict.best.steps else 1.0
    shown = f"{ms(best)} ms"
    took = f"a step of {shown}" if factor == 1 else f"{shown} for the progress of one dense step ({factor:.3g} steps)"
    gain = f"{took} instead of {ms(dense)}, {dense / best:.3g} times as fast"
    doubt = "; that is within the error of this model, so HARDLY WORTH IT" if dense / best < 1 + _ERROR else ""
    pays = "Compression pays" if counted else "Its step is shorter than DDP's"
    until = f" {pays} below {_line(equal)}." if equal is not None and equal > link.rate else ""
    return f"{'Best' if counted else 'Shortest step'}: {how}: {gain}{doubt}.{until}"


def _elsewhere(verdict: Verdict) -> str:
    """Return a sentence on the link rates at which compression pays, for a link on which it does not."""
    if verdict.break_even is not None:
        return f"Compression pays below {_line(verdict.break_even)}."
    if unknown := [f.compressor for f in verdict.forecasts if not f.is_known]:
        return f"The number of steps is unknown for {', '.join(unknown)}."
    return "Compression does not pay on any link."


def _line(payload: float) -> str:
    """Format a payload rate, in bytes per second, as the nominal rate of the link that carries it."""
    return link_planner.format_rate(8 * payload / FRAMING)
