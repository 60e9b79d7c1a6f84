"""The command `packsaddle plan link`, which forecasts how fast each method of training is on a network link."""

import math
import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import tyro

from packsaddle.cli.compressor_names import FIXED, WITH_RATIO, names_compressors, read_compressor
from packsaddle.cli.console import brief, is_first
from packsaddle.cli.flags import grouped
from packsaddle.cli.own_function import call
from packsaddle.cli.parsing import Seconds
from packsaddle.cli.plan_link_text import LinkPlan, print_json, print_tables, print_verdict
from packsaddle.cli.progress import countdown
from packsaddle.comm.devices import local_device
from packsaddle.comm.group import Group
from packsaddle.comm.launching import process_group, under_launcher
from packsaddle.compressors import Compressor
from packsaddle.compressors.registry import compressors, describe
from packsaddle.errors import ConfigError, config_errors
from packsaddle.messages import first_line
from packsaddle.plan import link as link_planner
from packsaddle.plan import local as local_planner
from packsaddle.plan.coding import Pace, measure_with_spread
from packsaddle.plan.link import MEASURED, Optimizer, forecast, probe, probe_locally
from packsaddle.plan.local import Inner, LocalForecast, check_most_steps, forecast_local, measured_with
from packsaddle.plan.model import ModelSize, TrainingStep, hidden_matrices, muon_and_adamw, update_seconds
from packsaddle.plan.step_time import LATENCY, Fleet, Link
from packsaddle.plan.timing import Timing

_BATCH = 32


@dataclass(frozen=True)
class LinkOptions:
    """Options of `packsaddle plan link`: model, times, local updates. Raises ValueError for incompatible options.

    Args:
        d: Number of parameters of the model, such as 25M, 25e6 or 25000000; give it instead of --model.
        model: MODULE:FUNCTION that returns the network to train, instead of --d. It is imported from the current folder
            and called without arguments. In a clone lab.toys has networks: mnist_autoencoder, char_transformer (117,221
            parameters), and resnet18, resnet34 and resnet50 for 32 x 32 images.
        data: MODULE:FUNCTION that returns a batch for the model, called with the number of examples. A batch is the
            model's argument, a tuple of its arguments, or a dict of keyword arguments.
        input: Shape of one example for the model, instead of --data: 3x224x224 for random numbers, int64:1024 for
            random tokens.
        latency: Time of a small message on the link, by default 100us. It is measured if RATE is auto.
        compute: Time of a step without communication (forward, backward, optimizer), such as 55ms. By default it is
            measured on this machine for --model, with AdamW or --optimizer.
        batch: Number of examples per worker and step when the compute time is measured, by default 32.
        spread: Standard deviation of the workers' compute times, as a fraction of their mean.
        noise: Include the time for generating the artificial noise of Algorithm 1.
        most_steps: Exclude local updates that need more than this multiple of the steps of dense training.
        speeds: Speed of each worker, such as 1,0.33, relative to a worker with the time --compute, to forecast local
            updates of workers of unequal speeds. By default --workers is the number of speeds.
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
    most_steps: float | None = None
    speeds: str | None = None

    @property
    def of_workers(self) -> list[float]:
        """The relative speeds of the workers, parsed from the text `speeds`, such as "1,0.33". It is empty if `speeds`
        is None. Raises ConfigError unless all speeds are numbers above 0."""
        texts = self.speeds.split(",") if self.speeds is not None else []
        if not all(re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*", text) and float(text) > 0 for text in texts):
            raise ConfigError(f"--speeds must be numbers above 0, such as 1,0.33, got {self.speeds!r}")
        return list(map(float, texts))

    def __post_init__(self) -> None:
        if self.d is not None and self.model is not None:
            raise ValueError(f"model {self.model} and --d {self.d} exclude each other: give one of them")
        if self.d is not None and self.compute is None:
            raise ValueError("d needs --compute SECONDS (a --model is measured)")
        if self.compute == 0:
            raise ValueError("compute must be above 0 (steps without computing cannot be compared), got 0")
        if self.compute is not None and self.batch is not None:
            raise ValueError("batch is for measuring the compute time, which --compute sets: leave out one of them")
        example = (self.data is not None) + (self.input is not None)
        if self.model is None and example:
            raise ValueError(f"{'input' if self.data is None else 'data'} is for --model MODULE:FUNCTION")
        if self.model is not None and ":" not in self.model:
            raise ValueError(f"model must be MODULE:FUNCTION, got {self.model!r}")
        if self.model is not None and example != (self.compute is None):
            raise ValueError("model MODULE:FUNCTION needs one of --data MODULE:FUNCTION, --input SHAPE and --compute")

    def training_step(self) -> TrainingStep | None:
        """Return the training step to time, i.e. a model and a batch, or None if --d is given instead of --model. With
        --compute nothing is timed, so the batch is None. Raises ConfigError if the user's function fails or returns no
        module."""
        batch = _BATCH if self.batch is None else self.batch
        if self.model is None:
            return None
        with torch.random.fork_rng(devices=[]):
            model = call(self.model)
            if not isinstance(model, torch.nn.Module):
                raise ConfigError(f"{self.model} must return a torch.nn.Module, got {type(model).__name__}")
            if self.data:
                return TrainingStep(model, call(self.data, batch))
        if (text := self.input) is None:
            return TrainingStep(model, None)

        # Make random examples of the shape in --input.
        kind, _, sizes = text.rpartition(":")
        if kind not in ("", "float32", "int64") or not all(size.isdecimal() for size in sizes.split("x")):
            raise ConfigError(f"--input must be a shape such as 3x224x224, or int64:1024 for tokens, got {text!r}")
        shape = tuple(map(int, sizes.split("x")))
        return TrainingStep.of_model(model, shape, batch, tokens=kind == "int64")


@names_compressors
@grouped(
    {
        "": "model d workers data input table json",
        "compressor": "compressor ratio optimizer",
        "local update": "most_steps speeds",
        "step time": "compute batch spread noise latency",
    }
)
def link(
    rate: Annotated[str, tyro.conf.Positional],
    options: LinkOptions,
    compressor: str = "best",
    ratio: float | None = None,
    optimizer: Optimizer = "adamw",
    workers: int | None = None,
    table: bool = False,
    json: bool = False,
) -> None:
    """Find the method that trains fastest on a network link.

    Forecasts the time of local updates (several steps between exchanges) and of compressed gradients, and compares the
    fastest with uncompressed local SGD, with DistributedDataParallel and with one machine alone.

    Examples:
        packsaddle plan link 100mbit --model train:make_model --input int64:256 --batch 8 --workers 2
        packsaddle plan link 100mbit --model lab.toys:char_transformer --input int64:64 --workers 2
        packsaddle plan link 100mbit --model lab.toys:char_transformer --input int64:64 --optimizer muon
        packsaddle plan link 100mbit --model lab.toys:resnet18 --input 3x32x32 --optimizer sgd
        packsaddle plan link 20mbit/100mbit --d 25M --compute 55ms --table
        torchrun --nnodes 2 --nproc-per-node 1 -m packsaddle.cli plan link auto --d 25M --compute 55ms

    Args:
        rate: Rate of each worker's link, such as 100mbit, 1gbit or 12.5MB/s; UP/DOWN, such as 20mbit/100mbit, for
            different rates of sending and receiving (the slower one limits); or "auto" to measure it between
            torchrun's workers, or without torchrun between processes on this machine.
        compressor: "best" (all of them), or one of COMPRESSORS, in any case; or a call: 'TopK(0.01, values="int8")'.
        ratio: Fraction of the coordinates to send, such as 0.01 or 1%; by default 0.01.
        optimizer: Optimizer of the training. Step times are multiplied by the number of steps that each method needed
            with it, relative to dense training. sgd was measured with the DDP hook; adamw with the hook and with local
            updates; muon (with AdamW for all except hidden matrices) with local updates.
        workers: Number of workers; by default 4, or the number that torchrun started.
        table: Also print the forecasts of all compressors and settings.
        json: Print one JSON document.
    """
    with config_errors():
        for flag, given in (("--most-steps", options.most_steps), ("--speeds", options.speeds)):
            if given is not None and optimizer == "sgd":
                raise ConfigError(f"{flag} is for local updates, which were not measured with --optimizer sgd")
        plan = _plan(rate, options, compressor, ratio, optimizer, workers)
    if not is_first():
        return
    if json:
        print_json(plan)
        return
    print_verdict(plan)
    if table:
        print_tables(plan)


def _plan(
    rate: str,
    options: LinkOptions,
    compressor: str,
    ratio: float | None,
    optimizer: Optimizer,
    workers: int | None,
) -> LinkPlan:
    # Validate all options before measuring.
    candidates = _candidates(compressor, ratio, optimizer)
    speeds = options.of_workers
    given = _given(rate, options.latency)
    workers = _workers(workers if workers is not None else len(speeds) or None)
    if speeds and len(speeds) != workers:
        raise ConfigError(f"--speeds must have a number for each of the {workers} workers, got {len(speeds)}")
    if options.d is None and options.model is None:
        raise ConfigError("--model MODULE:FUNCTION or --d NUMBER must be given, the model to plan for")
    step = options.training_step()
    workload = ModelSize.of_model(str(options.model), step.model) if step else ModelSize.of_size(options.d or 0)
    if optimizer == "muon" and step is not None:
        hidden_matrices(step.model)  # raises ConfigError if the model has no parameters for Muon
    inner: Inner = "muon" if optimizer == "muon" else "adamw"
    settings = {} if optimizer == "sgd" else measured_with(workers, inner)
    most = math.inf if options.most_steps is None else options.most_steps
    if settings:
        with config_errors("--"):
            check_most_steps(most, settings)

    with process_group() if under_launcher() else nullcontext() as group:
        device = torch.device("cpu") if group is None else local_device()
        if group is None and step is not None:
            device = next(step.model.parameters()).device
            device = torch.device("cpu") if device.type == "meta" else device  # a model without data has only sizes
        link, source = (given, "as given") if given else _measured_link(group, device, workers)

        # Measure the compute time unless it is given, and the time for error memory and noise.
        timing = None
        with countdown("plan", 1, quiet=not is_first()) as report:
            report(0, "timing the model and an update")
            if options.compute is None and step is not None:
                timing = _timed(step, device, optimizer, str(options.model))
            update = update_seconds(workload.d, noise=options.noise, device=device)

        # Measure the coding speed of each compressor.
        total = len(candidates) + len({s.compressor for s in settings})
        with countdown("plan", total, quiet=not is_first()) as report:
            pace = _Paces(report, device)

            def plan(compute: float) -> LinkPlan:
                fleet = Fleet(workers, compute, options.spread)
                verdict = forecast(workload, link, fleet, candidates, pace, update=update, optimizer=optimizer)
                local: tuple[LocalForecast, ...] = ()
                if settings:
                    local = forecast_local(workload, link, fleet, pace, optimizer=inner, update=update, most_steps=most)
                return LinkPlan(verdict, local, workload, link, source, fleet, update, optimizer)

            fastest = plan(timing.low if timing else options.compute or 0.0)
            slowest = plan(timing.high) if timing else None
    local, compute = fastest.local, fastest.fleet.compute
    unequal = local_planner.forecast_unequal(local[0], compute, speeds) if speeds else None
    return replace(fastest, unequal=unequal, timing=timing, slowest=slowest, coding_spread=pace.spread)


def _given(rate: str, latency: float | None) -> Link | None:
    """Return the link with the given rate and latency, or None if the rate is "auto". Raises ConfigError if the rate or
    latency is invalid, or if a latency is given with "auto"."""
    if rate != "auto":
        return Link.nominal(link_planner.slower_rate(rate), LATENCY if latency is None else latency)
    if latency is not None:
        raise ConfigError("--latency is measured if RATE is auto: leave it out")
    return None


def _measured_link(group: Group | None, device: torch.device, workers: int) -> tuple[Link, str]:
    """Measure the link between the workers in `group`. If `group` is None, measure the link between `workers`
    processes on this machine instead. Returns the link, and a text that describes the measurement."""
    if group is not None:
        return probe(group, device), "measured between torchrun's workers"
    return probe_locally(workers), "measured on this machine's loopback interface, NOT on a network"


class _Paces:
    """A callable that returns the speed at which a compressor encodes and decodes vectors of d coordinates. The speed
    is measured only in the first call with this compressor and this d.

    `spread` is a relative difference of encoding times: (median time) / (minimum time) - 1. It is the maximum over all
    compressors measured so far.
    """

    def __init__(self, report: Callable[[int, str], object], device: torch.device) -> None:
        self.spread = 0.0
        self._report, self._device, self._found = report, device, dict[tuple[Compressor, int], Pace]()

    def __call__(self, compressor: Compressor, d: int) -> Pace:
        if (compressor, d) not in self._found:
            self._report(len(self._found), f"timing {brief(describe(compressor))}")
            pace, spread = measure_with_spread(compressor, d, repeats=3, device=self._device)
            self._found[compressor, d], self.spread = pace, max(self.spread, spread)
        return self._found[compressor, d]


def _timed(step: TrainingStep, device: torch.device, optimizer: Optimizer, name: str) -> Timing:
    try:
        step = step.to(device)
        return step.time(_optimizers(step.model, optimizer))
    except Exception as error:  # a user's model can raise anything
        batch = step.batch
        is_tensor = isinstance(batch, torch.Tensor)
        kind = f", {str(batch.dtype).removeprefix('torch.')} of shape {tuple(batch.shape)}" if is_tensor else ""
        raise ConfigError(f"{name} failed on its batch{kind}: {first_line(error)}") from None


def _optimizers(model: torch.nn.Module, name: Optimizer) -> list[torch.optim.Optimizer]:
    """Return optimizers of kind `name` for timing a training step of `model`. Their steps take as long as those of real
    training, but hardly change the model, since the learning rate is tiny."""
    rate, trained = 1e-9, [p for p in model.parameters() if p.requires_grad]
    if name == "sgd":
        return [torch.optim.SGD(trained, rate, momentum=0.9)]
    if name == "adamw":
        return [torch.optim.AdamW(trained, rate)]
    return muon_and_adamw(model, muon={"lr": rate}, adamw={"lr": rate})


def _candidates(text: str, ratio: float | None, optimizer: Optimizer) -> list[Compressor]:
    """Return the compressors to compare.

    If `text` is the name or the constructor call of a compressor, the result contains only this compressor. If `text`
    is "best" and `ratio` is None, the result contains all compressors that were measured with `optimizer`. If `text` is
    "best" and `ratio` is given, it contains all lossy compressors, each with this ratio.
    """
    name = read_compressor(text, ratio)
    if isinstance(name, Compressor):
        return [name]
    if name == "best" and ratio is None:
        return list(MEASURED[optimizer])
    if ratio is not None and name in FIXED:
        raise ConfigError(f"ratio is for one of best, {', '.join(WITH_RATIO)}, got compressor {name!r}")
    ratio = 0.01 if ratio is None else ratio
    if name == "best":
        return [c for c in compressors(ratio) if not c.lossless]
    return [WITH_RATIO[name](ratio)] if name in WITH_RATIO else [FIXED[name]]


def _workers(requested: int | None) -> int:
    """Return the number of workers: under torchrun the number that torchrun started, and otherwise `requested`, by
    default 4. Raises ConfigError if `requested` is below 2, or differs from the number that torchrun started."""
    world = int(os.environ["WORLD_SIZE"]) if under_launcher() else None
    if world is not None and requested not in (None, world):
        raise ConfigError(f"workers must be {world}, the number that torchrun started, got {requested}")
    workers = world or (4 if requested is None else requested)
    if workers < 2 and world is None:
        raise ConfigError(f"workers must be at least 2 (one worker sends nothing), got {workers}")
    return workers
