"""packsaddle plan --link."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from json import dumps

import torch
from rich.table import Table

from packsaddle import rate
from packsaddle.commands.console import is_first, print_table
from packsaddle.compress import Compressor
from packsaddle.exchange import Group, local_device, process_group, under_launcher
from packsaddle.linkplan import Forecast, Verdict, forecast
from packsaddle.linkprobe import probe, probe_locally
from packsaddle.pace import measure
from packsaddle.progress import megabytes
from packsaddle.schema import ConfigError
from packsaddle.steptime import Fleet, Link
from packsaddle.workload import Workload, compute_seconds

_LATENCY = 1e-4  # seconds, gloo's over a local network
_NOTE = (
    "Per step only: compressors need different numbers of steps, and how many is no matter of the link; "
    "docs/plans.md says where to look."
)


@dataclass(frozen=True)
class LinkOptions:
    """What is known of the model and the workers; None: not given."""

    d: int | None
    model: str | None
    latency: float | None  # seconds
    compute: float | None  # seconds
    batch: int | None
    spread: float | None

    def workload(self) -> Workload:
        if (self.d is None) == (self.model is None):
            raise ConfigError(f"--link needs one of --model and --d, got model={self.model} and d={self.d}")
        if self.compute is None and self.model is None:
            raise ConfigError("--d needs --compute SECONDS (a --model is measured)")
        if self.compute is not None and self.batch is not None:
            raise ConfigError("--batch is for measuring the computing, which --compute gives: leave one out")
        return Workload.of_model(self.model) if self.model is not None else Workload.of_size(self.d or 0)


def plan_link(
    text: str, options: LinkOptions, candidates: Sequence[Compressor], workers: int | None, json: bool
) -> None:
    """Predict the time of a step for every compressor and say which is shortest. Raises ConfigError."""
    try:
        bits = None if text == "auto" else rate.parse(text)
        workers = _workers(workers)
        if bits is None and options.latency is not None:
            raise ConfigError("--latency is measured by --link auto: leave it out")
        given = Link.nominal(bits or 1.0, _LATENCY if options.latency is None else options.latency)
        workload = options.workload()
        unmeasured = Fleet(workers, options.compute or 0.0, options.spread or 0.0)  # refused now, not after measuring
        with process_group() if under_launcher() else nullcontext() as group:
            device = torch.device("cpu") if group is None else local_device()
            link, source = (given, f"{rate.show(bits)} as given") if bits else _measured(group, workers, device)
            fleet = unmeasured
            if options.compute is None:
                fleet = replace(fleet, compute=compute_seconds(workload.name, options.batch or 32, device=device))
            pace = partial(measure, repeats=3, device=device)
            verdict = forecast(workload, link, fleet, candidates, pace)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if is_first():
        show = _print_json if json else _print_tables
        show(verdict, workload, link, source, fleet)


def _workers(asked: int | None) -> int:
    """torchrun's, if it runs; else as many as asked for."""
    if not under_launcher():
        workers = 4 if asked is None else asked
        if workers < 2:
            raise ConfigError(f"workers must be at least 2 (one worker sends nothing), got {workers}")
        return workers
    world = int(os.environ["WORLD_SIZE"])
    if asked not in (None, world):
        raise ConfigError(f"workers must be torchrun's {world}, or be left out, got {asked}")
    return world


def _measured(group: Group | None, workers: int, device: torch.device) -> tuple[Link, str]:
    if group is not None:
        return probe(group, device), "measured between torchrun's workers"
    return probe_locally(workers), "measured on this machine's loopback, so NO network is in it"


def _print_json(verdict: Verdict, workload: Workload, link: Link, source: str, fleet: Fleet) -> None:
    document = {
        "model": workload.name,
        "compressed": workload.d,
        "dense": workload.dense,
        "link": {**asdict(link), "nominal_bits": link.bits, "source": source},
        "fleet": asdict(fleet),
        "compress": verdict.compress,
        "best": verdict.best.compressor,
        "break_even": verdict.break_even,
        "forecasts": verdict.plain(),
    }
    print(dumps(document, indent=2))


def _print_tables(verdict: Verdict, workload: Workload, link: Link, source: str, fleet: Fleet) -> None:
    table = Table("compressor", "exchange", "sent", "step ms", "compute", "waiting", "coding", "latency", "bandwidth")
    table.add_column("pays below")
    for column in table.columns[2:]:
        column.justify = "right"
    for f in verdict.forecasts:
        t = f.time
        parts = (t.total, t.compute, t.waiting, t.compression, t.latency, t.bandwidth)
        cells = [f"{1e3 * part:,.4g}" for part in parts]
        name = "none: dense" if f.is_dense else f.compressor
        table.add_row(name, f.exchange, megabytes(f.sent), *cells, _pays_below(f, verdict), style=_style(f))
    print_table(table)
    print(f"{workload.name}: {workload.d:,} compressed coordinates, {workload.dense:,} dense, {fleet.workers} workers.")
    print(f"Link: {_bits(link.rate)} of payload each way, {1e6 * link.latency:.0f} us a message; {source}.")
    print(_sentence(verdict, link))
    print(_NOTE)


def _style(f: Forecast) -> str | None:
    return "bold" if f.is_dense else None


def _pays_below(f: Forecast, verdict: Verdict) -> str:
    if f.is_dense:
        return ""
    if f.break_even is None:
        return "any link" if f.time.total < verdict.dense.time.total else "no link"
    return _bits(f.break_even)


def _sentence(verdict: Verdict, link: Link) -> str:
    best, dense = verdict.best, verdict.dense
    at = verdict.break_even
    if verdict.compress:
        gain = dense.time.total / best.time.total
        until = f" Compression pays below {_bits(at)}." if at is not None and at > link.rate else ""
        return f"Best: {best.compressor} by {best.exchange}, {gain:.2f} times as many steps a second as dense.{until}"
    where = f"compression pays below {_bits(at)} of payload." if at is not None else "no link makes compression pay."
    return f"Do not compress: dense has the shortest step. At this latency {where}"


def _bits(payload: float) -> str:
    return rate.show(8 * payload)
