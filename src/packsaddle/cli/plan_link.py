"""The command `packsaddle plan link`, which forecasts how fast each method of training is on a network link."""

from collections.abc import Mapping

import torch

from packsaddle.cli.console import brief
from packsaddle.cli.own_function import call
from packsaddle.cli.parsing import Seconds
from packsaddle.cli.plan_link_text import LinkPlan, print_json, print_tables, print_verdict
from packsaddle.cli.progress import countdown
from packsaddle.compressors import Compressor
from packsaddle.compressors.registry import describe
from packsaddle.errors import ConfigError, check_integers, check_positive, config_errors
from packsaddle.messages import first_line
from packsaddle.plan.coding import Pace, measure
from packsaddle.plan.link import MEASURED, Optimizer, forecast, slower_rate
from packsaddle.plan.local import Setting, forecast_local, measured_with
from packsaddle.plan.model import ModelSize, TrainingStep, hidden_matrices, muon_and_adamw, update_seconds
from packsaddle.plan.step_time import LATENCY, Fleet, Link
from packsaddle.plan.timing import Timing


def link(
    rate: str,
    /,
    model: str | None = None,
    d: int | None = None,
    workers: int = 4,
    data: str | None = None,
    input: str | None = None,
    batch: int = 32,
    compute: Seconds | None = None,
    optimizer: Optimizer = "adamw",
    latency: Seconds = LATENCY,
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

    Args:
        rate: Rate of each worker's link, such as 100mbit, 1gbit or 12.5MB/s; UP/DOWN, such as 20mbit/100mbit, for
            different rates of sending and receiving (the slower one limits).
        model: MODULE:FUNCTION that returns the network to train. It is imported from the current folder and called
            without arguments. In a clone lab.toys has networks: mnist_autoencoder, char_transformer (117,221
            parameters), and resnet18, resnet34 and resnet50 for 32 x 32 images.
        d: Number of parameters of the model, such as 25M, 25e6 or 25000000; give it instead of --model.
        workers: Number of workers.
        data: MODULE:FUNCTION that returns a batch for the model, called with the number of examples. A batch is the
            model's argument, a tuple of its arguments, or a dict of keyword arguments.
        input: Shape of one example for the model, instead of --data: 3x224x224 for random numbers, int64:1024 for
            random tokens.
        batch: Number of examples per worker and step when the compute time is measured.
        compute: Time of a step without communication (forward, backward, optimizer), such as 55ms. By default it is
            measured on this machine for --model, with AdamW or --optimizer.
        optimizer: Optimizer of the training. Step times are multiplied by the number of steps that each method needed
            with it, relative to dense training. sgd was measured with the DDP hook; adamw with the hook and with local
            updates; muon (with AdamW for all except hidden matrices) with local updates.
        latency: Time of a small message on the link, in seconds or such as 100us.
        table: Also print the forecasts of all compressors and settings.
        json: Print one JSON document.
    """
    # Validate all options before measuring.
    if (model is None) == (d is None):
        raise ConfigError("either --model MODULE:FUNCTION or --d NUMBER must be given, the model to plan for")
    if model is None and compute is None:
        raise ConfigError("--d needs --compute SECONDS (a --model is measured)")
    if model is None and (data is not None or input is not None):
        raise ConfigError("--data and --input are for --model MODULE:FUNCTION")
    if model is not None and [data, input, compute].count(None) != 2:
        raise ConfigError("--model needs one of --data MODULE:FUNCTION, --input SHAPE and --compute SECONDS")
    with config_errors("--"):
        check_integers(2, workers=workers)
        check_positive(compute=compute)
        Fleet(workers, compute or 0.0)  # raises ValueError if `compute` is too large
    with config_errors():
        network = Link.nominal(slower_rate(rate), latency)
        settings = {} if optimizer == "sgd" else measured_with(workers, optimizer)

    # Measure the compute time unless it is given, the time for error memory, and the speed of each compressor.
    step = None if model is None else _training_step(model, data, input, batch)
    size = ModelSize.of_size(d or 0) if step is None else ModelSize.of_model(str(model), step.model)
    device = torch.device("cpu") if step is None else next(step.model.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device  # a model on the meta device has only sizes
    if step is not None and optimizer == "muon":
        hidden_matrices(step.model)  # raises ConfigError if the model has no parameters for Muon
    timing = _timed(step, device, optimizer, str(model)) if step is not None and compute is None else None
    update = update_seconds(size.d, device=device)
    paces = _paces(size, MEASURED[optimizer], settings, device)

    # Forecast, and print the result.
    with config_errors():
        fleet = Fleet(workers, timing.low if timing else compute or 0.0)
        verdict = forecast(size, network, fleet, MEASURED[optimizer], lambda c, d: paces[c], update=update)
        local = forecast_local(size, network, fleet, settings, lambda c, d: paces[c], update=update)
    plan = LinkPlan(verdict, local, size, network, fleet, update, optimizer, timing)
    if json:
        print_json(plan)
        return
    print_verdict(plan)
    if table:
        print_tables(plan)


def _training_step(model: str, data: str | None, shape: str | None, batch: int) -> TrainingStep:
    """Return the training step to time, i.e. a model and a batch. Without `data` and `shape` nothing will be timed, so
    the batch is None. Raises ConfigError if the user's function fails or returns no module, or for an invalid shape."""
    with torch.random.fork_rng(devices=[]):
        network = call(model)
        if not isinstance(network, torch.nn.Module):
            raise ConfigError(f"{model} must return a torch.nn.Module, got {type(network).__name__}")
        if data is not None:
            return TrainingStep(network, call(data, batch))
    if shape is None:
        return TrainingStep(network, None)

    # Make random examples of this shape.
    kind, _, sizes = shape.rpartition(":")
    if kind not in ("", "float32", "int64") or not all(size.isdecimal() for size in sizes.split("x")):
        raise ConfigError(f"--input must be a shape such as 3x224x224, or int64:1024 for tokens, got {shape!r}")
    return TrainingStep.of_model(network, tuple(map(int, sizes.split("x"))), batch, tokens=kind == "int64")


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


def _paces(
    size: ModelSize, compressors: Mapping[Compressor, float], settings: Mapping[Setting, float], device: torch.device
) -> dict[Compressor, Pace]:
    """Measure the speed of each of `compressors`, and of the compressor of each setting, on a vector of the model's
    size. Returns the speeds by the compressor bound to the model."""
    bound = dict.fromkeys(size.bind(c) for c in [*compressors, *(setting.compressor for setting in settings)])
    found = {}
    # The time left is unknown: timing one compressor may take ten times as long as timing another.
    with countdown("plan", len(bound)) as report:
        for i, compressor in enumerate(bound):
            report(i, f"timing {brief(describe(compressor))} ({i + 1} of {len(bound)})")
            found[compressor] = measure(compressor, size.d, repeats=3, device=device)
    return found
