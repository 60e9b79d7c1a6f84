"""Workers that join and leave under torchft: tests kill, stop and add them, and a host's link is disconnected.

    python -m lab.bench.elastic [--out FILE]                            (root and iproute2 needed)

Needs packsaddle[torchft]. Three of four hosts, network namespaces, train by local updates with TopK and error memories;
the link of one is disconnected for 15 seconds. Anchors must be bitwise identical on all workers of a round. In each
round the anchor must change by the mean of the workers' messages, where a message is a worker's local updates minus
the change of its error memory. This is checked along four random directions, from the log of each worker.

An inner step computes little and sleeps for `step` seconds, so that waiting can be measured on few cores. The exit code
is 1 if a check fails.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CONTEXT = multiprocessing.get_context("forkserver")
HEARTBEAT = 1.0  # seconds without a heartbeat after which the lighthouse considers a worker dead
JOIN = 2.0  # seconds that the lighthouse waits for live workers that have not joined a round: the grace period
TIMEOUT = 4.0  # timeout of a collective, seconds
IN, HIDDEN, OUT = 16, 48, 8
DIRECTIONS = 4
PROCESSES = 2  # number of processes of a site, which together train one worker's model


@dataclass(frozen=True)
class Spec:
    """The settings of one worker."""

    name: str
    lighthouse: str
    log: str
    every: int
    rounds: int | None  # number of rounds after which the worker ends; None: it ends by `position`
    position: int | None  # number of committed inner steps of all workers together after which the worker ends
    step: float  # duration of an inner step, seconds
    seed: int
    life: int = 0
    until: str | None = None  # path of a file; the worker ends once the file exists
    grace: float = 25.0  # maximum duration of leaving, seconds
    fault: int = 0  # number of the round, from 1, whose confirmation fails on this worker only; 0: none
    inside: str = ""  # "DDP" or "FSDP2": the worker is a site of two processes; "": it is one process
    process: int = 0  # rank of this process in its site
    environment: dict[str, str] = field(default_factory=dict)


class Log:
    """A file of JSON lines, each written immediately."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, **said: Any) -> None:
        os.write(self._file, (json.dumps({"t": time.time(), **said}) + "\n").encode())


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT)
    return nn.Sequential(*layers).double()


def inside(model: nn.Module, kind: str, mesh: Any = None) -> nn.Module:
    """Return the model, wrapped in DDP or FSDP2 (`kind`), so that the processes of a site train it together.

    `mesh` is the device mesh of the site; None: a mesh of all processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if kind:
        mesh = mesh or init_device_mesh("cpu", (PROCESSES,))
    if kind == "DDP":
        return nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group())
    if kind == "FSDP2":
        fully_shard(model, mesh=mesh)
    return model


def batch(seed: int, worker: str, step: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Return a batch of inputs of 16 numbers each, and of noisy values of a fixed function of them.

    The batch depends on the arguments only.
    """
    word = int.from_bytes(hashlib.sha256(f"{seed} {worker} {step}".encode()).digest()[:7], "little")
    rng = torch.Generator().manual_seed(word)
    fixed = torch.Generator().manual_seed(99)
    mix_in, mix_out = torch.randn(IN, 24, generator=fixed) / 2, torch.randn(24, OUT, generator=fixed) / 4
    x = torch.randn(size, IN, generator=rng)
    y = torch.sin(x @ mix_in) @ mix_out + 0.1 * torch.randn(size, OUT, generator=rng)
    return x.double(), y.double()


def compression() -> Any:
    from packsaddle import Compression, TopK

    return Compression(TopK(1 / 8, values="int8"), "direct", dense_below=10, compare_every=1)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def digest(vector: Tensor) -> str:
    return hashlib.sha256(vector.numpy().tobytes()).hexdigest()[:16]


def work(spec: Spec) -> None:
    """Run one worker until it ends."""
    os.environ.update(spec.environment)
    os.environ["RUST_LOG"] = "error"
    torch.set_num_threads(1)
    errors = os.open(spec.log.replace(".jsonl", ".err"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(errors, 2)
    os.dup2(errors, 1)
    import logging

    logging.getLogger("torchft").setLevel(logging.CRITICAL)
    log = Log(spec.log)
    if spec.inside:
        store = f"file://{spec.log.rsplit('-', 1)[0]}.store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=spec.process, world_size=PROCESSES)
    try:
        Worker(spec, log).train()
        log.write(event="end")
    except SystemExit as leaving:
        log.write(event="left", code=leaving.code)
    except BaseException as error:
        log.write(event="error", error=f"{type(error).__name__}: {error}"[:500])
        raise
    os._exit(0)


class Worker:
    """A worker that trains with packsaddle's local updates, and logs its local updates and messages."""

    def __init__(self, spec: Spec, log: Log) -> None:
        import packsaddle
        from packsaddle.comm import connect

        self.spec, self.log = spec, log
        self.model = inside(network(), spec.inside)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.optimizer.register_step_post_hook(self._stepped)  # runs before LocalUpdates' hook
        times = {"timeout": TIMEOUT, "quorum_timeout": 60.0, "connect_timeout": 20.0}
        manager = connect(spec.lighthouse, name=spec.name, site=bool(spec.inside), **times)
        elastic = packsaddle.Elastic(manager, patience=90.0, grace=spec.grace)
        self.local = packsaddle.LocalUpdates(self.optimizer, compression(), every=spec.every, workers=elastic)
        if spec.fault:
            self._break(spec.fault)
        rng = torch.Generator().manual_seed(7)
        d = len(self.parameters())
        self.directions = torch.randn(DIRECTIONS, d, generator=rng, dtype=torch.float64)
        self.moved = torch.zeros(d, dtype=torch.float64)

    def _break(self, number: int) -> None:
        """Make the confirmation of round `number` raise on this worker, after its collective has completed."""
        channel, gather, seen = self.local._workers.channel, self.local._workers.channel.gather, [0]

        def gathered(parts: Any, **how: Any) -> Any:
            found = gather(parts, **how)
            seen[0] += "confirmed" in parts
            if "confirmed" in parts and seen[0] == number:
                raise RuntimeError("broken by the benchmark")
            return found

        channel.gather = gathered  # type: ignore[method-assign]

    def _stepped(self, *_: Any) -> None:
        self.moved += self.before - self.parameters()

    def parameters(self) -> Tensor:
        """Return this process's part of the parameters, float64[d]."""
        return flat([p.to_local() if hasattr(p, "to_local") else p for p in self.model.parameters()]).double()

    def anchor(self) -> Tensor:
        return flat(list(self.local.anchor().values()))

    def along(self, vector: Tensor) -> list[float]:
        return (self.directions @ vector.double()).tolist()

    def train(self) -> None:
        local, spec = self.local, self.spec
        local.join()
        update, memory = pending(local)
        self.say("join", None, None)
        step = 0
        while not self.over():
            x, y = batch(spec.seed, f"{spec.name} {spec.life} {spec.process}", step)
            self.optimizer.zero_grad()
            nn.functional.mse_loss(self.model(x), y).backward()
            self.before = self.parameters()
            try:
                self.optimizer.step()
            except SystemExit:
                self.say("leave", None, None)
                raise
            time.sleep(spec.step)
            step += 1
            if local.exchanging:
                now, kept = pending(local)
                self.say("round", self.moved - (now - update), memory - kept)
                update, memory = now, kept
                self.moved.zero_()
        local.flush()
        now, kept = pending(local)
        self.say("round", self.moved - (now - update), memory - kept)

    def over(self) -> bool:
        """Return True if training should end; identical on all processes of a site.

        They exchange whether the file `until` exists, since each process checks at another moment.
        """
        is_over = torch.tensor([self.spec.until is not None and Path(self.spec.until).exists()], dtype=torch.int32)
        if self.spec.inside:
            torch.distributed.all_reduce(is_over)
        if is_over:
            return True
        if self.spec.rounds is not None:
            return self.local.rounds >= self.spec.rounds
        return self.local.position >= (self.spec.position or 0)

    def say(self, event: str, sent: Tensor | None, freed: Tensor | None) -> None:
        """Log a round. `sent` is the local update that was sent, and `freed` the change of the error memory, times the
        worker's part of the mean for which each was made."""
        local, membership = self.local, self.local._workers.member
        anchor = self.anchor()
        self.log.write(
            event=event,
            round=local.rounds,
            history=membership.roster.history,
            past=list(membership.roster.past)[-2:-1],
            run=membership.roster.run,
            process=self.spec.process,
            included=membership.account.included,
            worker=membership.worker,
            here=sorted(membership.roster.present),
            sends=membership.account.included == membership.account.attempts,
            weight=membership.account.last_weight,
            hash=digest(anchor),
            anchor=self.along(anchor),
            sent=None if sent is None else self.along(sent),
            freed=None if freed is None else self.along(freed),
            pending=self.along(local.pending()),
            workers=local.workers,
            position=local.position,
            steps=local.steps,
        )


def shine(pipe: Any, seconds: float, bind: str, minimum: int) -> None:
    """Run a torchft lighthouse for at most `seconds`, and send its port through `pipe`."""
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
        """Start a worker. If it is a site, its processes NAME.0 and NAME.1 are started."""
        self.lives[name] = self.lives.get(name, -1) + 1
        is_site = bool(more.get("inside", self.first.inside))
        for process in range(PROCESSES if is_site else 1):
            member = f".{process}" if is_site else ""
            log = self.folder / f"{name}-{self.lives[name]}{'-' * is_site}{member[1:]}.jsonl"
            self.logs.append(log)
            spec = replace(self.first, name=name, log=str(log), life=self.lives[name], process=process, **more)
            self.processes[name + member] = CONTEXT.Process(target=work, args=(spec,), daemon=True)
            self.processes[name + member].start()

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


def pending(local: Any) -> tuple[Tensor, Tensor]:
    """Return what a worker has not sent, float64[d] each: its local update, and its error memory times the part of the
    worker in the mean for which the memory was made."""
    memories = [(part.unsent(), part.made or 0.0) for part in local._fragments]
    whole = local._whole.joined(memory for memory, _ in memories).double()
    return local.pending().double() - whole, local._whole.joined(made * memory for memory, made in memories).double()


def account(logs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Compare the workers' logs of the same rounds, and return the differences that were found.

    Anchors must be identical, and the change of the anchor must be the mean of the workers' messages.
    """
    wrong: list[str] = []
    rounds: dict[tuple[int, int], list[dict[str, Any]]] = {}  # keys: hash of the run's history, rank in the site
    for lines in logs:
        for line in lines:
            if line["event"] in ("round", "join"):
                rounds.setdefault((line["history"], line["process"]), []).append(line)
    anchors = {key: lines[0]["anchor"] for key, lines in rounds.items()}
    checked = 0
    for (_, process), lines in rounds.items():
        if len({line["hash"] for line in lines}) > 1:
            wrong.append(f"anchors differ after round {lines[0]['round']}")
        before = [anchors[p, process] for line in lines for p in line["past"] if (p, process) in anchors]
        sent = {line["worker"]: line for line in lines if line["sent"] is not None}
        joined = {line["worker"] for line in lines if line["sent"] is None}
        here = set(lines[0]["here"])
        if not before or here - joined - sent.keys() or not sent:
            continue  # not all workers of this round have logged it
        total = sum(line["weight"] for line in sent.values() if line["sends"])
        for i in range(DIRECTIONS):
            mean = sum(line["weight"] * line["sent"][i] for line in sent.values() if line["sends"]) / (total or 1.0)
            mean += sum(line["freed"][i] for line in sent.values() if line["sends"])
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


def cut(folder: Path) -> dict[str, Any]:
    """Run three workers on three hosts and a lighthouse on a fourth; disconnect the last worker for 15 seconds."""
    import threading

    from lab.race.hosts import Hosts

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
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "packsaddle", "torchft", "torchft.local_sgd"])
    # Exit on SIGTERM by an exception, so that the contexts end the processes they have started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = Path(tempfile.mkdtemp(prefix="elastic-"))
    found = cut(folder)
    if found["wrong"]:
        print(f"see {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    line = json.dumps(found)
    print(line, flush=True)
    if arguments.out is not None:
        arguments.out.write_text(line + "\n")
    sys.exit(bool(found["wrong"]))


if __name__ == "__main__":
    main()
