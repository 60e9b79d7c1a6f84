"""The command `python -m lab report`."""

from json import dumps
from pathlib import Path

from lab.cli.console import print_runs, require_plots
from lab.runs.run_folder import read_runs
from packsaddle.checkpoint.atomic_files import write_whole
from packsaddle.errors import ConfigError


def report(
    runs: tuple[Path, ...],
    /,
    out: Path | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Compare runs: tables, figures and an HTML page.

    Runs that differ only in their seed are averaged. The page is one self-contained file.

    Examples:
        python -m lab report runs/a runs/b
        python -m lab report runs --out comparison --overwrite
        python -m lab report runs --json --out comparison.json

    Args:
        runs: Run folders, or folders that contain run folders, up to three levels deep (as a study does).
        out: New folder for the report; by default `report` in the first folder of RUNS. With --json, a new file.
        overwrite: Allow the report's folder, or the file, to exist, and overwrite it.
        json: Print one JSON document with the numbers of the tables instead, or write it to the file --out.
    """
    from lab.runs.report import write_report
    from lab.runs.report.tables import document

    found = read_runs(runs)
    if not json:
        print_runs(found)
        require_plots("the report's page")  # only the page needs these packages, not the printed tables
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
