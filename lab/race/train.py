"""Benchmarks of whole training steps, in worker processes of this machine and over a real slow link.

Contenders are the requested compressors and torch's own ways to exchange gradients. Over a link, the time of a step is
compared with its floor: the computing time plus the time that the link needs for the step's bytes.
"""

import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from lab.bench.hosts import HostFailedError, Hosts, available
from lab.bench.result import Result, machine
from lab.origin import Origin
from lab.race.contenders import PEERS
from lab.race.race import Outcome, Race, in_process_group, step_rows
from packsaddle.comm import WorkerFailedError, launch
from packsaddle.options import build


def race_on_workers(race: Race, workers: int) -> list[Result]:
    """Run a race on `workers` local processes, without a slow link. Raises ValueError, WorkerFailedError."""
    if not 1 <= workers <= 64:
        raise ValueError(f"workers must be 1 to 64, got {workers}")
    race.workload.examples()  # raises an error about unreadable data here rather than in a worker
    outcome = launch(in_process_group, (race,), workers)
    question = "Forward, backward, exchange, update: what does a training step cost without a slow link?"
    setting = {"workers": workers, **described(race), **machine(threads=1)}
    return [Result(question, setting, step_rows(outcome.laps, None), [*legend(race), *outcome.notes])]


def described(race: Race) -> dict[str, object]:
    """Return the settings of a race for the heading of its table."""
    workload = race.workload
    d, origin = sum(p.numel() for p in workload.task().parameters()), Origin.here(threads=1)
    return {
        "model": workload.network,
        "d": d,
        "images": workload.source(),
        "batch per worker": workload.batch,
        "lr": race.lr,
        "rounds": race.rounds,
        "steps per block": race.block,
        "date": origin.date,
        "commit": origin.commit,
    }


def legend(race: Race) -> list[str]:
    """Return notes that describe a race's contenders, for its table."""
    peers = dict.fromkeys(c.peer for c in race.field() if c.peer)
    named = [f"{peer}: {PEERS[peer]}" for peer in peers]
    return [*named, "DDP overlaps its exchange with backward, and sends no batch statistics, as packsaddle does not"]


def race_on_hosts(race: Race, hosts: int, rate_mbit: float, up_mbit: float | None = None) -> list[Result]:
    """Run a race on hosts whose links receive at `rate_mbit`, and send at `up_mbit` (None: the same).

    Raises ValueError for an invalid rate or if hosts cannot be created, WorkerFailedError if one fails.
    """
    if not 2 <= hosts <= 16:
        raise ValueError(f"hosts must be 2 to 16, got {hosts}")
    if reason := available():
        raise ValueError(f"link {reason}")
    race.workload.examples()  # raises an error about unreadable data here rather than in a worker
    with Hosts(hosts, rate_mbit, up_mbit) as network:
        outcome = hold(race, network)
    rates = {"rate Mbit/s": rate_mbit} if up_mbit is None else {"down Mbit/s": rate_mbit, "up Mbit/s": up_mbit}
    setting = {"hosts": hosts, **rates, **described(race), **machine(threads=1)}
    question = "What does a training step cost over this link, and what do its bytes allow?"
    rows = step_rows(outcome.laps, (up_mbit or rate_mbit) * 1e6 / 8, rate_mbit * 1e6 / 8)
    columns = [
        "kB: per step, by the ledger (peers: by arithmetic), of the fuller direction; counted: by the interface",
        "floor: a step of alone, then the bytes at the link's rate; allowed: the floor of ddp over the contender's",
    ]
    return [Result(question, setting, rows, [*columns, *legend(race), *outcome.notes])]


def hold(race: Race, hosts: Hosts) -> Outcome:
    """Run a race with torchrun on hosts, one worker on each. Raises WorkerFailedError."""
    with tempfile.TemporaryDirectory(prefix="packsaddle-link-") as folder:
        told, found = Path(folder) / "race.json", Path(folder) / "outcome.json"
        told.write_text(json.dumps(asdict(replace(race, interface=hosts.interface))))
        try:
            hosts.torchrun(["-m", "lab.race.host", str(told), str(found)])
        except HostFailedError as error:
            raise WorkerFailedError(str(error)) from None
        return build(Outcome, json.loads(found.read_text()))
