"""What does a whole training step cost on this machine's own worker processes, beside every way that torch has?"""

from packsaddle.comm.launch import launch
from packsaddle.performance.bench.contenders import PEERS
from packsaddle.performance.bench.race import Race, in_process_group, step_rows
from packsaddle.performance.bench.result import Result, machine


def run(race: Race, workers: int) -> list[Result]:
    """Race contenders on `workers` local processes, without a slow link. Raises ValueError, WorkerFailedError."""
    if not 1 <= workers <= 64:
        raise ValueError(f"workers must be 1 to 64, got {workers}")
    race.workload.images()  # what cannot be read is said here, not by a worker
    outcome = launch(in_process_group, (race,), workers)
    question = "Forward, backward, exchange, update: what does a training step cost without a slow link?"
    setting = {"workers": workers, **described(race), **machine()}
    return [Result(question, setting, step_rows(outcome.laps, None), [*legend(race), *outcome.notes])]


def described(race: Race) -> dict[str, object]:
    """The setting that every race shares."""
    workload = race.workload
    d = sum(p.numel() for p in workload.task().parameters())
    return {
        "model": workload.network,
        "d": d,
        "images": workload.source(),
        "batch per worker": workload.batch,
        "lr": race.lr,
        "rounds": race.rounds,
        "steps per block": race.block,
    }


def legend(race: Race) -> list[str]:
    """Say who the contenders are."""
    peers = dict.fromkeys(c.peer for c in race.field() if c.peer)
    named = [f"{peer}: {PEERS[peer]}" for peer in peers]
    return [*named, "DDP overlaps its exchange with backward, and sends no batch statistics, as packsaddle does not"]
