"""The commands `packsaddle report` and `packsaddle compressors`."""

from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Annotated

import tyro

from packsaddle.checkpoint.atomic_files import write_whole
from packsaddle.cli.console import brief, digits, number_table, print_runs, print_table, require_plots, short_exchange
from packsaddle.cli.parsing import HIDE_DEFAULT
from packsaddle.errors import ConfigError, config_errors
from packsaddle.runs.run_folder import read_runs


def report(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, HIDE_DEFAULT],
    out: Path | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Compare runs: tables, figures and an HTML page.

    Runs that differ only in their seed are averaged. The page is one self-contained file.

    Examples:
        packsaddle report runs/a runs/b
        packsaddle report runs --out comparison --overwrite
        packsaddle report runs --json --out comparison.json

    Args:
        runs: Run folders, or folders that contain run folders, up to three levels deep (as a study does).
        out: New folder for the report; by default `report` in the first folder of RUNS. With --json, a new file.
        overwrite: Allow the report's folder, or the file, to exist, and overwrite it.
        json: Print one JSON document with the numbers of the tables instead, or write it to the file --out.
    """
    from packsaddle.runs.report import write_report
    from packsaddle.runs.report.tables import document

    if not runs:
        raise ConfigError("report needs at least one run folder")
    found = read_runs(runs)
    if not json:
        print_runs(found)
        require_plots("the report's page")  # the table is printed without them
        print(f"report: {write_report(found, out or runs[0] / 'report', overwrite=overwrite)}")
        return

    # Print the document, or write it to a new file.
    text = dumps(document(found), indent=2, allow_nan=False)
    if out is None:
        print(text)
        return
    if out.is_dir() or (out.exists() and not overwrite):
        raise ConfigError(f"--out: {out} exists already; name a new file" + " or add --overwrite" * (not out.is_dir()))
    try:
        write_whole(out, lambda file: file.write(text.encode() + b"\n"))
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be written: {error.strerror or error}") from None


def compressors(d: int = 1_000_000, ratio: float = 0.01, workers: int = 4, json: bool = False) -> None:
    """List the compressors with their bytes and their speed.

    Also lists the contraction mu (a lower bound on the fraction of the squared norm that compression keeps), linearity
    and the communication protocol. The time is measured on this machine.

    Examples:
        packsaddle compressors --d 1000000 --ratio 0.01 --workers 8

    Args:
        d: Length of the Gaussian float32 vector that is compressed.
        ratio: Fraction of the coordinates to send, in (0, 1], for compressors that have one.
        workers: Number of workers, on which the bytes depend.
        json: Print JSON lines instead of a table.
    """
    from packsaddle.compressors import registry
    from packsaddle.plan import coding as coding_speed

    if d < 1 or workers < 1:
        raise ConfigError(f"d and workers must be at least 1, got {d} and {workers}")
    with config_errors():
        listed = registry.compressors(ratio)

    # Each JSON line is printed as soon as its compressor is timed.
    if json:
        for compressor in listed:
            print(dumps(asdict(coding_speed.tabulate(compressor, d, workers))))
        return
    table = number_table("compressor", "mu", "kept %", "linear", "exchange", "sent kB", "received kB", "ms")
    for e in (coding_speed.tabulate(compressor, d, workers) for compressor in listed):
        cells = [f"{e.mu:.2g}", f"{100 * e.kept:.1f}", "yes" if e.linear else "no", short_exchange(e.protocol)]
        cells += [digits(e.sent / 1e3), digits(e.received / 1e3), f"{e.milliseconds:.1f}"]
        table.add_row(brief(e.compressor), *cells)
    print_table(table, "--json prints it whole")
    print(f"d = {d:,}, {workers} workers. mu holds for every vector; kept, 100 (1 - ||v - C(v)||^2 / ||v||^2), is")
    print("measured on a Gaussian one. Bytes and ms: of one step, per worker.")
