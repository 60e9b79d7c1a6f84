"""Table 1 with numbers: the paper's orders, plans for one d and epsilon, and exponents measured on known saddles."""

import csv
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from packsaddle.folderlock import locked
from packsaddle.plan import plan
from packsaddle.progress import StudyProgress
from packsaddle.reproduce import scaling
from packsaddle.reproduce.exponents import exponents, shares, steps
from packsaddle.reproduce.pool import default_jobs, in_parallel
from packsaddle.reproduce.study import Scale
from packsaddle.reproduce.theorem import COMPRESSORS, Job, all_jobs, few_jobs, measure
from packsaddle.runfolder import RunFolder, commit, environment, make_new
from packsaddle.schema import ConfigError
from packsaddle.table1 import TABLE_1
from packsaddle.theory import Assumptions

# The paper's rows, and what stands for them in the measurements (with k/d = 1/8, or half of the energy kept).
STANDS_FOR = {"uncompressed": "Identity", "SketchTopK": "SketchTopK", "RandomK": "RandomK", "constant": "AdaptiveTopK"}


def tabulate(scale: Scale, folder: Path, version: str, *, resume: bool, jobs: int | None) -> list[dict[str, Any]]:
    """Measure what is missing, write tables and figure, and return the rows of exponents. Raises ConfigError."""
    wanted = list(few_jobs() if scale == "smoke" else all_jobs())
    if folder.exists() and not resume:
        raise ConfigError(f"output folder {folder} exists already; go on with --resume or choose another --out")
    if not folder.exists():
        make_new(folder)
    with locked(folder):
        return _tabulated(wanted, folder, version, scale, jobs)


def _tabulated(
    wanted: Sequence[Job], folder: Path, version: str, scale: Scale, jobs: int | None
) -> list[dict[str, Any]]:
    lines = _measured(folder / "runs.jsonl")
    done = {Job(**{key: line[key] for key in Job.__dataclass_fields__}) for line in lines}
    lines += _measure([job for job in wanted if job not in done], len(wanted), folder, jobs or default_jobs())
    rows = steps(lines)
    RunFolder(folder).write_json("environment.json", {**environment(version, 1, "cpu"), "scale": scale})
    RunFolder(folder).write_json("table1.json", table(rows))
    for name, content in (("shares", shares(lines)), ("steps", rows), ("exponents", exponents(rows))):
        _write(content, folder / f"{name}.csv")
    scaling.draw(rows, list(COMPRESSORS)).savefig(folder / "figure.png", dpi=130)
    return exponents(rows)


def _measured(record: Path) -> list[dict[str, Any]]:
    """The measurements that are there; the last line may have been cut off."""
    lines = []
    for text in record.read_text().splitlines() if record.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def _measure(missing: Sequence[Job], all_of_them: int, folder: Path, jobs: int) -> list[dict[str, Any]]:
    if not missing:
        return []
    found: list[dict[str, Any]] = []
    done = dict.fromkeys((str(i) for i in range(all_of_them - len(missing))), 1.0)
    with StudyProgress("table1", all_of_them) as progress:

        def look(active: Collection[Job]) -> None:
            progress.show({**done, **dict.fromkeys(map(str, active), 0.0)}, set(map(str, active)))

        for job, result in in_parallel(measure, missing, jobs, look):
            RunFolder(folder).append("runs.jsonl", {**result, "commit": commit()})
            found.append(result)
            done[f"{job}"] = 1.0
        look(())
    return found


def table(rows: Sequence[Mapping[str, Any]], d: int = 1_000_000, epsilon: float = 0.1) -> dict[str, Any]:
    """Return Table 1 at a d and an epsilon, each row with the plan that stands for it and the measured exponents."""
    slopes = exponents([dict(row) for row in rows])
    found = []
    for row in TABLE_1:
        ours = STANDS_FOR[row.compressor.split()[0]]
        known = Assumptions(d, epsilon, lipschitz_gradient=1.0 if row.lipschitz else None)
        planned = plan(known, COMPRESSORS[ours])
        measured = [s for s in slopes if s["compressor"] == ours and s["lipschitz"] == row.lipschitz]
        numbers = {key: getattr(planned, key) for key in ("mu", "eta", "steps", "sent", "total", "theorem")}
        found.append({**row.plain(d, epsilon), "stands_for": ours, "plan": numbers, "exponents": measured})
    return {"d": d, "epsilon": epsilon, "rows": found}


def _write(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    if not rows:
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
