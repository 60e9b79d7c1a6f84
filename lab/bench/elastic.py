"""Workers that are killed, stopped, slowed down and added at any time: does training continue, and at which cost?

    python -m lab.bench.elastic chaos [--runs 100] [--workers 2 3 4 5 6]
    python -m lab.bench.elastic replaced [--seeds 0 1 2] [--methods packsaddle diloco]
    python -m lab.bench.elastic slow [--seeds 0 1 2]
    python -m lab.bench.elastic cut                            (root and iproute2 needed)

Needs packsaddle[torchft]. With --out FILE each run is one line of the file, and runs already in it are not repeated.

chaos: runs of local updates with TopK and error memories, each disturbed three to six times. None may hang; anchors
must be bitwise identical on all workers of a round; and in each round the anchor must change by the weighted mean of
those workers' messages, where a message is a worker's local updates minus its error memory: checked along four random
directions, from each worker's own account.

replaced: one of four workers is killed every ten rounds and immediately replaced. Goodput is committed inner steps per
second, relative to an undisturbed run; the loss is the anchor's after an equal number of committed inner steps.

slow: one of four workers needs three times as long for a step; measures the steps per second of the other three.

cut: three hosts are network namespaces; the link of one is disconnected for a while.

An inner step is small and sleeps for --step seconds in place of computing, so that waiting is measured, on few cores.
Exit code 1 if a check fails.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CONTEXT = multiprocessing.get_context("forkserver")
HEARTBEAT = 1.0  # seconds without a heartbeat after which the lighthouse considers a worker dead
JOIN = 2.0  # seconds that it waits for live workers that have not joined the round: the grace period
TIMEOUT = 4.0  # timeout of a collective, seconds
LONGEST = 120.0  # seconds after which a chaos run counts as hanging
IN, HIDDEN, OUT = 16, 48, 8
DIRECTIONS = 4


@dataclass(frozen=True)
class Spec:
    """The settings of one worker."""

    name: str
    lighthouse: str
    log: str
    every: int
    rounds: int | None  # number of rounds after which it ends; None: by `position`
    position: int | None  # committed inner steps of all workers after which it ends
    step: float  # seconds
    seed: int
    memory: str | None = None
    weight: str | None = None
    method: str = "packsaddle"
    dtype: str = "float64"
    life: int = 0
    slow: float = 1.0
    until: str | None = None  # it ends once this file exists
    grace: float = 25.0  # maximum seconds of leaving
    fault: int = 0  # its confirmation fails in this round, counted from 1, on this worker only; 0: never
    environment: dict[str, str] = field(default_factory=dict)


class Log:
    """A file of JSON lines, each written immediately."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, **said: Any) -> None:
        os.write(self._file, (json.dumps({"t": time.time(), **said}) + "\n").encode())


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT)
    ).to(dtype)


def batch(seed: int, worker: str, step: int, dtype: torch.dtype, size: int = 32) -> tuple[Tensor, Tensor]:
    """Return a batch of a fixed function of sixteen numbers, with noise; a pure function of its arguments."""
    word = int.from_bytes(hashlib.sha256(f"{seed} {worker} {step}".encode()).digest()[:7], "little")
    rng = torch.Generator().manual_seed(word)
    fixed = torch.Generator().manual_seed(99)
    mix_in, mix_out = torch.randn(IN, 24, generator=fixed) / 2, torch.randn(24, OUT, generator=fixed) / 4
    x = torch.randn(size, IN, generator=rng)
    y = torch.sin(x @ mix_in) @ mix_out + 0.1 * torch.randn(size, OUT, generator=rng)
    return x.to(dtype), y.to(dtype)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def digest(vector: Tensor) -> str:
    return hashlib.sha256(vector.numpy().tobytes()).hexdigest()[:16]


def validation(model: nn.Module, seed: int, dtype: torch.dtype) -> float:
    x, y = batch(seed, "validation", 0, dtype, 4096)
    with torch.no_grad():
        return float(nn.functional.mse_loss(model(x), y))


_slowness = 1.0


def work(spec: Spec) -> None:
    """Run one worker until it ends."""
    global _slowness
    os.environ.update(spec.environment)
    os.environ["RUST_LOG"] = "error"
    torch.set_num_threads(1)
    errors = os.open(spec.log.replace(".jsonl", ".err"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(errors, 2)
    os.dup2(errors, 1)
    import logging

    logging.getLogger("torchft").setLevel(logging.CRITICAL)
    _slowness = spec.slow

    def toggle(number: int, frame: object) -> None:
        global _slowness
        _slowness = 1.0 if _slowness > 1.0 else 3.0

    signal.signal(signal.SIGUSR1, toggle)
    log = Log(spec.log)
    try:
        (Ours if spec.method == "packsaddle" else DiLoCo)(spec, log).train()
        log.write(event="end")
    except SystemExit as leaving:
        log.write(event="left", code=leaving.code)
    except BaseException as error:
        log.write(event="error", error=f"{type(error).__name__}: {error}"[:500])
        raise
    os._exit(0)


class Ours:
    """A worker with packsaddle's local updates, and an account of its local updates and messages."""

    def __init__(self, spec: Spec, log: Log) -> None:
        import packsaddle
        from packsaddle.comm import connect

        self.spec, self.log = spec, log
        self.dtype = getattr(torch, spec.dtype)
        self.model = network(self.dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.optimizer.register_step_post_hook(self._stepped)  # runs before LocalUpdates' hook
        manager = connect(spec.lighthouse, name=spec.name, timeout=TIMEOUT, quorum_timeout=60.0, connect_timeout=20.0)
        elastic = packsaddle.Elastic(
            manager,
            memory_file=Path(spec.memory) if spec.memory else None,
            weight=spec.weight,
            patience=90.0,
            grace=spec.grace,
        )
        compression = packsaddle.Compression(
            packsaddle.TopK(1 / 8, values="int8"), dense_below=10, compare_every=1 if spec.dtype == "float64" else 100
        )
        self.local = packsaddle.LocalUpdates(self.optimizer, compression, every=spec.every, workers=elastic)
        if spec.fault:
            self._break(spec.fault)
        rng = torch.Generator().manual_seed(7)
        d = sum(p.numel() for p in self.model.parameters())
        self.directions = torch.randn(DIRECTIONS, d, generator=rng, dtype=torch.float64)
        self.moved = torch.zeros(d, dtype=torch.float64)

    def _break(self, number: int) -> None:
        """Make a confirmation raise after its collective has completed."""
        assert self.local._workers is not None
        channel, gather, seen = self.local._workers.channel, self.local._workers.channel.gather, [0]

        def gathered(parts: Any, **how: Any) -> Any:
            found = gather(parts, **how)
            seen[0] += "norm" in parts
            if "norm" in parts and seen[0] == number:
                raise RuntimeError("broken by the benchmark")
            return found

        channel.gather = gathered  # type: ignore[method-assign]

    def _stepped(self, *_: Any) -> None:
        self.moved += self.before - flat(list(self.model.parameters())).double()

    def anchor(self) -> Tensor:
        return flat(list(self.local.anchor().values()))

    def along(self, vector: Tensor) -> list[float]:
        return (self.directions @ vector.double()).tolist()

    def train(self) -> None:
        local, spec = self.local, self.spec
        local.join()
        membership = local._workers
        assert membership is not None
        pending = local.pending().double()
        self.say("join", None, pending)
        step = 0
        while not self.over():
            x, y = batch(spec.seed, f"{spec.name} {spec.life}", step, self.dtype)
            self.optimizer.zero_grad()
            nn.functional.mse_loss(self.model(x), y).backward()
            self.before = flat(list(self.model.parameters())).double()
            try:
                self.optimizer.step()
            except SystemExit:
                self.say("leave", None, local.pending().double())
                raise
            time.sleep(spec.step * _slowness)
            step += 1
            if local.exchanging:
                now = local.pending().double()
                self.say("round", self.moved - (now - pending), now)
                pending = now
                self.moved.zero_()
        with local.at_anchor():
            loss = validation(self.model, spec.seed, self.dtype)
        self.log.write(event="loss", loss=loss, position=local.position, rounds=local.rounds, lost=local.lost)
        local.flush()
        now = local.pending().double()
        self.say("round", self.moved - (now - pending), now)

    def over(self) -> bool:
        if self.spec.until is not None and Path(self.spec.until).exists():
            return True
        if self.spec.rounds is not None:
            return self.local.rounds >= self.spec.rounds
        return self.local.position >= (self.spec.position or 0)

    def say(self, event: str, sent: Tensor | None, pending: Tensor) -> None:
        local, membership = self.local, self.local._workers
        assert membership is not None
        anchor = self.anchor()
        self.log.write(
            event=event,
            round=local.rounds,
            history=membership.roster.history,
            past=list(membership.roster.past)[-2:-1],
            run=membership.roster.run,
            worker=membership.worker,
            here=sorted(w for w, m in membership.roster.members.items() if m.here),
            sends=membership.account.included == membership.account.attempts,
            weight=membership.account.last_weight,
            hash=digest(anchor),
            anchor=self.along(anchor),
            sent=None if sent is None else self.along(sent),
            pending=self.along(pending),
            workers=membership.workers,
            position=local.position,
            steps=local.steps,
            lost=local.lost,
            waiting=membership.waiting,
        )


class DiLoCo:
    """A worker with torchft's DiLoCo; its outer optimizer has learning rate 1, so that it applies the mean itself."""

    def __init__(self, spec: Spec, log: Log) -> None:
        import torchft.local_sgd

        from packsaddle.comm import connect

        self.spec, self.log, self.dtype = spec, log, getattr(torch, spec.dtype)
        self.model = network(self.dtype)
        self.manager = connect(
            spec.lighthouse, name=spec.name, timeout=TIMEOUT, quorum_timeout=60.0, connect_timeout=20.0
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        outer = torch.optim.SGD(self.model.parameters(), lr=1.0)

        def load(state: Any) -> None:
            self.model.load_state_dict(state)

        self.manager.register_state_dict_fn("model", load, self.model.state_dict)
        self.manager.register_state_dict_fn("inner", self.optimizer.load_state_dict, self.optimizer.state_dict)
        self.diloco = torchft.local_sgd.DiLoCo(self.manager, [self.model], self.optimizer, outer, sync_every=spec.every)

    def train(self) -> None:
        spec, step, seen = self.spec, 0, 0
        with self.diloco:
            while self.manager.batches_committed() * spec.every < (spec.position or 0):
                x, y = batch(spec.seed, f"{spec.name} {spec.life}", step, self.dtype)
                self.optimizer.zero_grad()
                nn.functional.mse_loss(self.model(x), y).backward()
                self.optimizer.step()
                time.sleep(spec.step * _slowness)
                step += 1
                if self.manager.current_step() != seen:
                    seen = self.manager.current_step()
                    position = self.manager.batches_committed() * spec.every
                    self.log.write(
                        event="round",
                        round=seen,
                        position=position,
                        steps=step,
                        hash=digest(flat(list(self.model.parameters()))),
                    )
        loss = validation(self.model, spec.seed, self.dtype)
        position = self.manager.batches_committed() * spec.every
        self.log.write(event="loss", loss=loss, position=position, rounds=seen, lost=0.0)


def shine(pipe: Any, seconds: float, bind: str, minimum: int) -> None:
    """Run a lighthouse for at most `seconds`."""
    os.environ["RUST_LOG"] = "off"
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(
        bind=bind,
        min_replicas=minimum,
        join_timeout_ms=int(1000 * JOIN),
        quorum_tick_ms=20,
        heartbeat_timeout_ms=int(1000 * HEARTBEAT),
    )
    pipe.send(server.address().rsplit(":", 1)[1])
    time.sleep(seconds)


@contextmanager
def lighthouse(minimum: int = 1) -> Iterator[str]:
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=shine, args=(theirs, 3600.0, "[::]:0", minimum), daemon=True)
    process.start()
    try:
        yield f"http://localhost:{ours.recv()}"
    finally:
        process.kill()
        process.join()


class Crew:
    """The workers of a run."""

    def __init__(self, folder: Path, first: Spec) -> None:
        self.folder, self.first = folder, first
        self.processes: dict[str, Any] = {}
        self.lives: dict[str, int] = {}
        self.logs: list[Path] = []

    def start(self, name: str, **more: Any) -> None:
        self.lives[name] = self.lives.get(name, -1) + 1
        log = self.folder / f"{name}-{self.lives[name]}.jsonl"
        self.logs.append(log)
        spec = replace(self.first, name=name, log=str(log), life=self.lives[name], **more)
        self.processes[name] = CONTEXT.Process(target=work, args=(spec,), daemon=True)
        self.processes[name].start()

    def alive(self) -> list[str]:
        return [name for name, process in self.processes.items() if process.is_alive()]

    def signal(self, name: str, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.processes[name].pid, number)

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()

    def read(self) -> list[list[dict[str, Any]]]:
        found = []
        for log in self.logs:
            lines = log.read_text().splitlines() if log.exists() else []
            found.append([json.loads(line) for line in lines if line.endswith("}")])
        return found

    def newest(self, key: str) -> float:
        """Return the largest value that any worker has logged for its last round."""
        return max((line[key] for lines in self.read() for line in lines if key in line), default=0)


# Random disturbances.


def chaos(number: int, seed: int, workers: Sequence[int], folder: Path) -> dict[str, Any]:
    """Make one disturbed run; return its record and the checks that failed."""
    rng = random.Random(f"{seed} {number}")
    count, weight = rng.choice(list(workers)), rng.choice([None, "steps"])
    done: list[str] = []
    with lighthouse() as address:
        first = Spec("", address, "", every=4, rounds=30, position=None, step=0.03, seed=number, weight=weight)
        crew = Crew(folder, first)
        keeps = {f"w{i}": rng.random() < 0.6 for i in range(12)}

        def start(name: str) -> None:
            crew.start(name, memory=str(folder / f"{name}.memory") if keeps[name] else None)

        for i in range(count):
            start(f"w{i}")
        begin = time.monotonic()
        try:
            _until(lambda: crew.newest("round") >= 1, 60)
            moments = sorted(rng.uniform(0, 5) for _ in range(rng.randint(3, 6)))
            stopped: dict[str, float] = {}
            since, added = time.monotonic(), count
            while crew.alive() and time.monotonic() - begin < LONGEST:
                now = time.monotonic() - since
                for name in [n for n, until in stopped.items() if now > until]:
                    crew.signal(name, signal.SIGCONT)
                    del stopped[name]
                if moments and now > moments[0]:
                    moments.pop(0)
                    free = [n for n in crew.alive() if n not in stopped]
                    kind = rng.choice(["kill", "kill", "term", "stop", "slow", "add"])
                    if kind == "add" and added < 6:
                        start(f"w{added}")
                        added += 1
                    elif kind == "slow" and free:
                        crew.signal(rng.choice(free), signal.SIGUSR1)
                    elif len(free) > 1:  # at least one remains
                        name = rng.choice(free)
                        if kind == "stop":
                            crew.signal(name, signal.SIGSTOP)
                            stopped[name] = now + rng.uniform(0.3, 6.0)
                        else:
                            kind = "term" if kind == "term" else "kill"
                            crew.signal(name, signal.SIGTERM if kind == "term" else signal.SIGKILL)
                            crew.processes[name].join(20)
                            if rng.random() < 0.7 and crew.alive():  # replace it
                                start(name)
                    done.append(kind)
                time.sleep(0.02)
            hangs = crew.alive()
        finally:
            crew.end()
    logs = crew.read()
    wrong = [f"hangs: {', '.join(hangs)}"] if hangs else []
    wrong += [f"{line['error']}" for lines in logs for line in lines if line["event"] == "error"]
    if not any(line["event"] == "end" for lines in logs for line in lines):
        wrong.append("nobody came to the end")
    found = account(logs)
    losses = [line["loss"] for lines in logs for line in lines if line["event"] == "loss"]
    return {
        "workers": count,
        "weight": weight,
        "disturbances": done,
        "seconds": round(time.monotonic() - begin, 1),
        "wrong": wrong + found.pop("wrong"),
        "loss": min(losses, default=None),
        **found,
    }


def account(logs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Compare the workers' logs of the same rounds: anchors, and the mean of their messages."""
    wrong: list[str] = []
    rounds: dict[int, list[dict[str, Any]]] = {}
    for lines in logs:
        for line in lines:
            if line["event"] in ("round", "join"):
                rounds.setdefault(line["history"], []).append(line)
    anchors = {history: lines[0]["anchor"] for history, lines in rounds.items()}
    checked = 0
    for lines in rounds.values():
        if len({line["hash"] for line in lines}) > 1:
            wrong.append(f"anchors differ after round {lines[0]['round']}")
        before = [anchors[p] for line in lines for p in line["past"] if p in anchors]
        sent = {line["worker"]: line for line in lines if line["sent"] is not None}
        joined = {line["worker"] for line in lines if line["sent"] is None}
        here = set(lines[0]["here"])
        if not before or here - joined - sent.keys() or not sent:
            continue  # a worker of the round has not logged it
        total = sum(line["weight"] for line in sent.values() if line["sends"])
        for i in range(DIRECTIONS):
            mean = sum(line["weight"] * line["sent"][i] for line in sent.values() if line["sends"]) / (total or 1.0)
            if abs(before[0][i] - lines[0]["anchor"][i] - mean) > 1e-8:
                wrong.append(
                    f"round {lines[0]['round']}: the anchor moved by {before[0][i] - lines[0]['anchor'][i]:.6g}, "
                    f"and {mean:.6g} was sent"
                )
                break
        checked += 1
    return {"wrong": wrong, "rounds": len(rounds), "accounted": checked}


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


# Costs.


def replaced(seed: int, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run disturbed and undisturbed crews of each method concurrently, so that the machine is equally loaded."""
    position = 4 * arguments.every * arguments.rounds
    crews: dict[tuple[str, bool], Crew] = {}
    kills: dict[tuple[str, bool], int] = {}
    with ExitStack() as stack:
        for method in arguments.methods:
            for disturbed in (False, True):
                address = stack.enter_context(lighthouse())
                inside = folder / f"{method}-{disturbed}"
                inside.mkdir()
                first = Spec("", address, "", arguments.every, None, position, arguments.step, seed)
                first = replace(first, method=method, dtype="float32")
                crews[method, disturbed], kills[method, disturbed] = Crew(inside, first), 0
        stack.callback(lambda: [crew.end() for crew in crews.values()])
        for crew in crews.values():
            for i in range(4):
                crew.start(f"w{i}", memory=_file(crew, i, arguments))
        rng, begin = random.Random(seed), time.monotonic()
        left = set(crews)
        while left and time.monotonic() - begin < 10 * arguments.rounds * arguments.every * arguments.step:
            for key in sorted(left):
                crew = crews[key]
                if any(line["event"] == "loss" for lines in crew.read() for line in lines):
                    left.discard(key)
                elif key[1] and crew.newest("round") >= 10 * (kills[key] + 1):
                    i = rng.randrange(4)
                    crew.signal(f"w{i}", signal.SIGKILL)
                    crew.processes[f"w{i}"].join()
                    crew.start(f"w{i}", memory=_file(crew, i, arguments))
                    kills[key] += 1
            time.sleep(0.1)
        time.sleep(3 * arguments.step)
    found: dict[str, Any] = {method: {} for method in arguments.methods}
    for (method, disturbed), crew in crews.items():
        told = {"kills": kills[method, disturbed], **speed(crew, position)}
        found[method]["killed" if disturbed else "alone"] = told
    return found


def _file(crew: Crew, i: int, arguments: argparse.Namespace) -> str | None:
    return str(crew.folder / f"w{i}.memory") if arguments.keep else None


def speed(crew: Crew, position: int) -> dict[str, Any]:
    """Return a crew's speed up to a position, from the first round with all workers, and the loss there."""
    logs = crew.read()
    lines = [line for found in logs for line in found]
    rounds = sorted((line["t"], line["position"]) for line in lines if line["event"] == "round")
    start = next(((t, p) for t, p in rounds if p >= 4 * crew.first.every), rounds[0])
    end = next(((t, p) for t, p in rounds if p >= position), rounds[-1])
    losses = [line["loss"] for line in lines if line["event"] == "loss"]
    return {
        "rate": (end[1] - start[1]) / (end[0] - start[0]),
        "loss": statistics.mean(losses) if losses else None,
        "position": end[1],
        "lost": max((line["lost"] for line in lines if line["event"] == "loss"), default=0.0),
        "errors": [line["error"] for line in lines if line["event"] == "error"],
    }


def slow(seed: int, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run crews of four concurrently, the last worker slow except in "none"; return the others' steps per second."""
    crews: dict[str, Crew] = {}
    with ExitStack() as stack:
        for case in ("none", "weights", "alike"):
            address, inside = stack.enter_context(lighthouse()), folder / case
            inside.mkdir()
            first = Spec("", address, "", arguments.every, arguments.rounds, None, arguments.step, seed)
            first = replace(first, weight="steps" if case == "weights" else None, dtype="float32")
            crews[case] = Crew(inside, first)
        stack.callback(lambda: [crew.end() for crew in crews.values()])
        for case, crew in crews.items():
            for i in range(4):
                crew.start(f"w{i}", slow=3.0 if i == 3 and case != "none" else 1.0)
        longest = 10 * arguments.rounds * arguments.every * arguments.step
        _until(lambda: not any(crew.alive() for crew in crews.values()), longest)
    found = {}
    for case, crew in crews.items():
        logs = crew.read()
        rounds = [[line for line in lines if line["event"] == "round"] for lines in logs]
        rates = []
        for lines in rounds[:3]:
            first_line, last = lines[2], lines[-2]  # paces are unknown before; the last one is the flush
            rates.append((last["steps"] - first_line["steps"]) / (last["t"] - first_line["t"]))
        found[case] = {
            "rate": statistics.mean(rates),
            "loss": statistics.mean(line["loss"] for lines in logs for line in lines if line["event"] == "loss"),
            "slow_in": sum(line["workers"] == 4 for line in rounds[0]) / len(rounds[0]),
            "slow_steps": rounds[3][-1]["steps"] if rounds[3] else 0,
            "errors": [line["error"] for lines in logs for line in lines if line["event"] == "error"],
        }
    return found


def cut(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run three workers on three hosts and a lighthouse on a fourth; disconnect the last worker for 15 seconds."""
    import threading

    from lab.bench.hosts import Hosts

    with Hosts(4, 100.0) as hosts:
        address = f"http://{hosts.address(3)}:29510"
        environment = {"GLOO_SOCKET_IFNAME": hosts.interface}
        specs = [
            Spec(f"w{i}", address, str(folder / f"w{i}.jsonl"), 10, 40, None, 0.1, 0, environment=environment, life=i)
            for i in range(3)
        ]
        crew = Crew(folder, specs[0])
        crew.logs = [Path(spec.log) for spec in specs]
        script = [sys.executable, __file__]
        commands = [["sh", "-c", 'sleep 1; exec "$@"', "sh", *script, "worker", json.dumps(asdict(s))] for s in specs]
        commands.append([*script, "lighthouse", str(folder / "over")])
        moments: list[float] = []

        def disturb() -> None:
            _until(lambda: crew.newest("round") >= 5, 60)
            hosts.plug(2, connected=False)
            moments.append(time.time())
            time.sleep(15)
            hosts.plug(2, connected=True)
            moments.append(time.time())
            _until(lambda: sum(any(x["event"] == "end" for x in lines) for lines in crew.read()) == 3, 120)
            (folder / "over").touch()

        thread = threading.Thread(target=disturb)
        thread.start()
        hosts.run(commands)
        thread.join()
    logs = crew.read()
    rounds = [[line for line in lines if line["event"] == "round"] for lines in logs]
    out, back = moments
    during = [line for line in rounds[0] if out < line["t"] < back]
    after = [line for line in rounds[2] if line["t"] > back]
    wrong = account(logs)["wrong"]
    wrong += [] if any(line["workers"] == 2 for line in during) else ["no round without the one behind the cable"]
    wrong += [] if any(line["workers"] == 3 for line in after) else ["the one behind the cable does not come back"]
    wrong += [line["error"] for lines in logs for line in lines if line["event"] == "error"]
    return {
        "wrong": wrong,
        "rounds_during": len(during),
        "first_after": during[0]["t"] - out if during else None,
        "back_after": after[0]["t"] - back if after else None,
        "rounds_of_all": sum(line["workers"] == 3 for line in after),
    }


Key = tuple[Any, ...]


def plan(arguments: argparse.Namespace) -> list[tuple[Key, Callable[[Path], dict[str, Any]]]]:
    """Return the requested runs, as functions with their keys."""
    if arguments.case == "chaos":
        numbers = range(arguments.first, arguments.first + arguments.runs)
        return [
            (("chaos", n), lambda folder, n=n: chaos(n, 0, arguments.workers, folder))  # type: ignore[misc]
            for n in numbers
        ]
    if arguments.case == "replaced":
        return [
            (("replaced", s, arguments.keep), lambda folder, s=s: replaced(s, folder, arguments))  # type: ignore[misc]
            for s in arguments.seeds
        ]
    if arguments.case == "slow":
        return [
            (("slow", s), lambda folder, s=s: slow(s, folder, arguments))  # type: ignore[misc]
            for s in arguments.seeds
        ]
    return [(("cut",), lambda folder: cut(arguments, folder))]


def done(path: Path | None) -> dict[Key, dict[str, Any]]:
    """Return the runs in a file."""
    lines = path.read_text().splitlines() if path is not None and path.exists() else []
    return {tuple(found.pop("key")): found for found in map(json.loads, lines)}


def summary(found: dict[Key, dict[str, Any]]) -> bool:
    """Print a summary of all runs; return True if all checks succeeded."""
    good = True
    trials = [f for key, f in found.items() if key[0] == "chaos"]
    if trials:
        bad = [f for f in trials if f["wrong"]]
        count = {k: sum(f["disturbances"].count(k) for f in trials) for k in ("kill", "term", "stop", "slow", "add")}
        print(f"chaos: {len(trials)} runs, {len(bad)} wrong; {count}")
        print(f"  {sum(f['rounds'] for f in trials)} rounds, {sum(f['accounted'] for f in trials)} accounted for")
        good &= not bad
    for method in ("packsaddle", "diloco"):
        for keep in (False, True):
            pairs = [f[method] for k, f in found.items() if k[0] == "replaced" and k[2] == keep and method in f]
            if not pairs:
                continue
            goodput = [f["killed"]["rate"] / f["alone"]["rate"] for f in pairs]
            loss = [f["killed"]["loss"] / f["alone"]["loss"] - 1 for f in pairs]
            how = "its memory kept" if keep else "its memory lost"
            print(f"replaced, {method}, {how}: goodput {_spread(goodput)}, loss over undisturbed {_spread(loss)}")
            good &= method != "packsaddle" or (min(goodput) >= 0.85 and max(loss) <= 0.02)
    for case in ("weights", "alike"):
        cost = [1 - f[case]["rate"] / f["none"]["rate"] for key, f in found.items() if key[0] == "slow"]
        if cost:
            print(f"slow, {case}: costs the others {_spread(cost)}")
            good &= case != "weights" or max(cost) <= 0.1
    if ("cut",) in found:
        print(f"cut: {found['cut',]}")
        good &= not found["cut",]["wrong"]
    return good


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1%} ({min(values):.1%} to {max(values):.1%}, {len(values)} seeds)"


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        work(Spec(**json.loads(sys.argv[2])))
    if sys.argv[1:2] == ["lighthouse"]:
        ours, theirs = multiprocessing.Pipe()
        import threading

        threading.Thread(target=shine, args=(theirs, 3600.0, "[::]:29510", 1), daemon=True).start()
        ours.recv()
        _until(Path(sys.argv[2]).exists, 3600.0)
        os._exit(0)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("chaos", "replaced", "slow", "cut", "summary"))
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 3, 4, 5, 6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=["packsaddle", "diloco"])
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--step", type=float, default=0.2)
    parser.add_argument("--keep", action="store_true", help="replaced: the one that takes its place has its file")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "packsaddle", "torchft", "torchft.local_sgd"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that started processes are ended
    found = done(arguments.out)
    for key, run in [] if arguments.case == "summary" else plan(arguments):
        if key in found:
            continue
        folder = Path(tempfile.mkdtemp(prefix="elastic-"))
        found[key] = run(folder)
        if found[key].get("wrong") or found[key].get("errors"):
            print(f"see {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
        line = json.dumps({"key": key, **found[key]})
        print(line, flush=True)
        if arguments.out is not None:
            with arguments.out.open("a") as file:
                file.write(line + "\n")
    sys.exit(not summary(found))


if __name__ == "__main__":
    main()
