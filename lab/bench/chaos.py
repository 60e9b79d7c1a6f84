"""Does a run that is resumed after its workers are killed at random moments end with an undisturbed run's weights?

    python -m lab.bench.chaos [--runs 200] [--workers 2 3 4] [--seed 0]

Each run trains a small network with gloo processes and saves a checkpoint every step or every few; every second run
uses local updates. At a random time (starting, training, saving, ending) a random process gets SIGKILL, or SIGSTOP for
longer than the group's timeout. When the first process ends, the others are ended, and the same command is restarted
with --resume, as torchrun --max-restarts does. A run is disturbed up to three times; a run that ends before its first
disturbance is repeated. Then all its files, except for times, must be bitwise identical with an undisturbed run's.
Prints the runs as JSON lines; the exit code is 1 if anything differs.
"""

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from lab import __main__ as lab

CONFIG = """
lr = 0.5
epochs = 1
batch_size = 16
log_every = 5
[data]
name = "digits"
limit = 600
[model]
name = "autoencoder"
widths = [64, 16]
[compressor]
kind = "TopK"
ratio = 0.1
[noise]
std = 0.001
"""
# The same configuration with local updates. An exchange may be pending when the run is disturbed.
LOCAL = """
[local]
every = 3
optimizer = "adamw"
overlap = { delay = 2, fragments = 2 }
"""
TIMEOUT = 4  # timeout of the workers' collectives, seconds
LONGEST = 60  # maximum duration of an attempt, seconds; then its processes are killed
# Processes are forked after a first run in this process, so they need not import or compile anything.
CONTEXT = multiprocessing.get_context("fork")


@dataclass
class Trial:
    """The settings of one run, and the number of disturbances so far."""

    workers: int
    every: int  # steps between checkpoints
    local: bool  # True: the run uses local updates
    kills: int = 0  # number of processes that got SIGKILL while they were alive
    stops: int = 0  # number of processes that got SIGSTOP while they were alive
    equal: bool = False


def worker(arguments: Sequence[str], environment: dict[str, str], log: str) -> None:
    """Run `python -m lab run` with the environment variables that torchrun sets, in a process that acts as a worker."""
    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = ["packsaddle", *arguments]
    lab.main()


def attempt(trial: Trial, arguments: Sequence[str], log: Path, disturb: tuple[float, int, int] | None) -> bool:
    """Start the workers once; return True if all succeed.

    `disturb` is a disturbance: seconds after the start, rank of the worker, and number of the signal.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(trial.workers):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": trial.workers, "LOCAL_WORLD_SIZE": trial.workers}
        world |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment = {name: str(value) for name, value in world.items()}
        processes.append(CONTEXT.Process(target=worker, args=(arguments, environment, str(log))))
        processes[-1].start()
    begin = time.monotonic()
    running = {p.sentinel: p for p in processes}
    while running:
        now = time.monotonic() - begin
        until = LONGEST if disturb is None else disturb[0]
        for sentinel in wait(list(running), timeout=max(0.0, until - now)):
            ended = running.pop(sentinel)  # type: ignore[call-overload]
            ended.join()
            if ended.exitcode != 0:
                end(processes)
                return False
        if disturb is not None and time.monotonic() - begin >= disturb[0]:
            _, rank, number = disturb
            if processes[rank].is_alive():
                os.kill(processes[rank].pid or 0, number)
                trial.kills += number == signal.SIGKILL
                trial.stops += number == signal.SIGSTOP
            disturb = None
        # A process that got SIGSTOP never ends if no other process waits for it.
        if time.monotonic() - begin > LONGEST:
            end(processes)
            return False
    return True


def end(processes: Sequence[Any]) -> None:
    """Kill the processes of an attempt, as a launcher does after one of them has failed."""
    for process in processes:
        process.kill()
        process.join()


def disturbed(trial: Trial, config: Path, folder: Path, rng: random.Random, length: float) -> Path:
    """Repeat a run until it is disturbed at least once, and return its folder.

    The time of a disturbance is drawn from the duration of the preceding attempt, so a faster run may end before it.
    """
    for again in range(20):
        begin, where = time.monotonic(), folder.with_name(f"{folder.name}-{again}")
        try_once(trial, config, where, rng, length)
        if trial.kills + trial.stops:
            return where
        length = time.monotonic() - begin
    raise SystemExit("20 runs ended before anything disturbed them")


def try_once(trial: Trial, config: Path, folder: Path, rng: random.Random, length: float) -> None:
    """Disturb a run up to three times, resuming it after each, until it completes."""
    arguments = ["run", str(config), "--resume", str(folder), "--checkpoint-every", str(trial.every)]
    arguments += ["--timeout", str(TIMEOUT)]
    disturbances = rng.randint(1, 3)
    log = folder.with_suffix(".log")
    for i in range(disturbances + 5):
        disturb = None
        if i < disturbances:
            number = signal.SIGKILL if rng.random() < 0.8 else signal.SIGSTOP
            disturb = (rng.uniform(0, length), rng.randrange(trial.workers), number)
        if attempt(trial, arguments, log, disturb):
            break


def digest(folder: Path) -> str:
    """Return a hash of the contents of all files of a run, except for recorded times."""
    found = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key, inner in value.items():
                if "seconds" not in str(key) and key != "label":
                    found.update(str(key).encode())
                    take(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                take(inner)
        else:
            found.update(repr(value).encode())

    # Checkpoints of earlier steps may remain if the run was disturbed at its end; only *.pt files are compared.
    for path in sorted((folder / "checkpoint").glob("*.pt")):
        found.update(path.name.encode())
        take(torch.load(path, weights_only=True))
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        take(json.loads(line))
    take(json.loads((folder / "summary.json").read_text()))
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        configs = {False: base / "steps.toml", True: base / "local.toml"}
        configs[False].write_text(CONFIG)
        configs[True].write_text(CONFIG.replace("lr = 0.5", "lr = 0.003") + LOCAL)
        for local, config in configs.items():
            warm_up(config, base / f"first-{local}")
        straight: dict[tuple[int, int, bool], tuple[str, float]] = {}
        for number in range(args.runs):
            key = (rng.choice(args.workers), rng.choice([1, 3]), number % 2 == 1)
            config = configs[key[2]]
            if key not in straight:
                straight[key] = undisturbed(key, config, base)
            expected, length = straight[key]
            trial = Trial(*key)
            folder = disturbed(trial, config, base / f"run-{number}", rng, length)
            trial.equal = (folder / "summary.json").exists() and digest(folder) == expected
            trials.append(trial)
            print(json.dumps(asdict(trial)), flush=True)
            if not trial.equal:
                print(folder.with_suffix(".log").read_text(), file=sys.stderr, flush=True)
    sys.exit(not all(t.equal for t in trials))


def warm_up(config: Path, folder: Path) -> None:
    """Run one worker in this process before forking, to import and compile all modules. It starts no threads."""
    sys.argv = ["packsaddle", "run", str(config), "--out", str(folder), "--checkpoint-every", "5"]
    with redirect_stdout(io.StringIO()):
        lab.main()


def undisturbed(key: tuple[int, int, bool], config: Path, base: Path) -> tuple[str, float]:
    """Return the hash of an undisturbed run (see `digest`), and its duration in seconds."""
    trial, folder = Trial(*key), base / f"straight-{key[0]}-{key[1]}-{key[2]}"
    arguments = ["run", str(config), "--resume", str(folder), "--checkpoint-every", str(key[1])]
    begin = time.monotonic()
    assert attempt(trial, arguments, folder.with_suffix(".log"), None), folder.with_suffix(".log").read_text()
    length = time.monotonic() - begin
    return digest(folder), length


if __name__ == "__main__":
    main()
