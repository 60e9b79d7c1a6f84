"""Disconnected or slow links and dead hosts: does training continue, or end with an error that names the lost worker?

python -m lab.bench.network_faults [--hosts 3] [--rate 100] [--timeout 12] [--steps 300] [--cases brief,cut]
                                    [--brief 3] [--out network_faults.json]
(root and iproute2 needed)

Every host is a network namespace whose link has --rate Mbit/s. In each case every host trains a network of 120,000
parameters by CompressedSGD with TopK 10%, and after a third of the steps the network or a host is disturbed. If it
recovers within the timeout of the collectives, the final weights must be bitwise identical with an undisturbed run's;
if not, each remaining worker must end within the timeout and --patience seconds (the roll call needs at most 11), by a
PeerLostError that names the rank or the lost rendezvous. Both are valid for a link that recovers just before the
timeout, since TCP retries at doubling intervals. Prints a line per case; the exit code is 1 if one fails.
"""

import argparse
import hashlib
import itertools
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lab.bench.hosts import Hosts, available
from packsaddle import CompressedSGD, Compression, TopK, simulate
from packsaddle.comm import PeerLostError, process_group

_PORT = 29_478
_NAMED, _ALONE = "names it", "none other answers"
_GONE, _LATE = "reaches nobody", "all answer, one was late"
_EXPECTED = {False: (_NAMED, _ALONE, _GONE), None: (_NAMED, _ALONE, _GONE, _LATE)}  # by `goes_on`


@dataclass(frozen=True)
class Case:
    """A disturbance of a host, and the expected result."""

    about: str
    disturb: Callable[[Hosts, int, Path, argparse.Namespace], None]
    victim: int = -1  # index of the disturbed host; -1: the last
    goes_on: bool | None = True  # training must continue; None: may continue or end
    dies: bool = False  # the victim ends, without a result


def _pull_for(share: float) -> Callable[[Hosts, int, Path, argparse.Namespace], None]:
    """Disconnect a host for a fraction of the timeout, or for 0, --brief seconds."""

    def pull(hosts: Hosts, victim: int, folder: Path, arguments: argparse.Namespace) -> None:
        hosts.plug(victim, connected=False)
        time.sleep(share * arguments.timeout or arguments.brief)
        hosts.plug(victim, connected=True)

    return pull


def _cut(hosts: Hosts, victim: int, folder: Path, arguments: argparse.Namespace) -> None:
    hosts.plug(victim, connected=False)


def _slow(hosts: Hosts, victim: int, folder: Path, arguments: argparse.Namespace) -> None:
    hosts.throttle(victim, arguments.rate / 10)


def _kill(hosts: Hosts, victim: int, folder: Path, arguments: argparse.Namespace) -> None:
    os.kill(int((folder / f"{victim}.pid").read_text()), signal.SIGKILL)


CASES = {
    "undisturbed": Case("nothing", lambda *_: None),
    "brief": Case("a cable pulled for --brief seconds", _pull_for(0)),
    "half": Case("a cable pulled for half the timeout", _pull_for(0.5), goes_on=None),
    "late": Case("a cable pulled for 0.9 of the timeout", _pull_for(0.9), goes_on=None),
    "slow": Case("a link at a tenth of the rate", _slow),
    "cut": Case("a cable pulled for good", _cut, goes_on=False),
    "cut-first": Case("the cable of rank 0 pulled for good", _cut, victim=0, goes_on=False),
    "kill": Case("a worker killed", _kill, goes_on=False, dies=True),
    "kill-first": Case("rank 0 killed", _kill, victim=0, goes_on=False, dies=True),
}


def main() -> None:
    """Run the cases, or one worker of a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--timeout", type=float, default=12.0)
    parser.add_argument("--brief", type=float, default=3.0)
    parser.add_argument("--patience", type=float, default=15.0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--cases", default=",".join(CASES), help="with commas between: %(default)s")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", metavar="FOLDER", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work(arguments.worker, arguments)), flush=True)
        os._exit(0)  # as packsaddle's command does: gloo's threads wait for a disconnected network
    names = arguments.cases.split(",")
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"--cases must be of {', '.join(CASES)}, got {unknown[0]!r}")
    if problem := available():
        parser.error(problem)
    found = {}
    print("| case | workers left | longest step | end after | weights | as it must be |\n|---|---|---|---|---|---|")
    for name in names:
        found[name] = run(CASES[name], arguments)
        found[name]["good"] = judge(found[name], CASES[name], found.get("undisturbed"), arguments)
        print(row(name, found[name], found.get("undisturbed")), flush=True)
    if arguments.out:
        settings = {k: v for k, v in vars(arguments).items() if k not in ("out", "worker")}
        arguments.out.write_text(json.dumps({"settings": settings, "cases": found}, indent=1))
    sys.exit(0 if all(case["good"] for case in found.values()) else 1)


def run(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train on all hosts and disturb one; return the workers' results by rank, None for a dead one.

    Each result has "after", the seconds from the disturbance to the end of the process.
    """
    victim = case.victim % arguments.hosts
    with Hosts(arguments.hosts, arguments.rate) as hosts, tempfile.TemporaryDirectory() as name:
        folder, disturbed, over = Path(name), [0.0], threading.Event()

        def disturb() -> None:
            while _step(folder) < arguments.steps // 3:
                if over.wait(0.01):
                    return
            disturbed[0] = time.time()
            case.disturb(hosts, victim, folder, arguments)

        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            printed = hosts.run(_commands(hosts, folder, arguments))
        finally:
            over.set()
            thread.join()
    workers = []
    for text in printed:
        *said, end = text.splitlines()  # empty for a dead worker
        workers.append({**json.loads(said[-1]), "after": float(end) - disturbed[0]} if said else None)
    return {"about": case.about, "victim": victim, "workers": workers}


def _commands(hosts: Hosts, folder: Path, arguments: argparse.Namespace) -> Sequence[Sequence[str]]:
    """Return the command of each host: a worker, then the time at which its process ended."""
    own = ["--hosts", str(arguments.hosts), "--timeout", str(arguments.timeout), "--steps", str(arguments.steps)]
    meeting = [f"MASTER_ADDR={hosts.address(0)}", f"MASTER_PORT={_PORT}", f"WORLD_SIZE={arguments.hosts}"]
    settings = [*meeting, f"GLOO_SOCKET_IFNAME={hosts.interface}", "OMP_NUM_THREADS=1"]
    command = [sys.executable, __file__, *own, "--worker", str(folder)]
    timed = ["sh", "-c", '"$@"; date +%s.%N', "sh"]
    return [[*timed, "env", f"RANK={rank}", *settings, *command] for rank in range(arguments.hosts)]


def _step(folder: Path) -> int:
    try:
        return int((folder / "step").read_text() or 0)
    except FileNotFoundError:
        return 0


def work(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train in the launcher's world; return the digest of the weights, or the error."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    simulate(lambda _: train(rank, 2), 1)  # alone, so that compiling and importing are not within the timeout
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    while len(list(folder.glob("*.pid"))) < arguments.hosts:
        time.sleep(0.01)
    times = [time.monotonic()]

    def after(step: int) -> None:
        times.append(time.monotonic())
        if rank == 0:
            (folder / "step").write_text(str(step))

    said: dict[str, Any] = {}
    try:
        with process_group(timedelta(seconds=arguments.timeout)):
            times[0] = time.monotonic()
            said["digest"] = train(rank, arguments.steps, after)
    except PeerLostError as error:
        said = {"lost": str(error)}
    except Exception as error:  # an unexpected error, to be printed
        said = {"error": f"{type(error).__name__}: {error}"}
    late = times[arguments.steps // 3 :]  # from the disturbance on
    longest = max((later - sooner for sooner, later in itertools.pairwise(late)), default=0.0)
    return {**said, "steps": len(times) - 1, "seconds": times[-1] - times[0], "longest": longest}


def train(rank: int, steps: int, after: Callable[[int], None] = lambda step: None) -> str:
    """Train, with after(step) after each step, and return the digest of the weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 300), nn.ReLU(), nn.Linear(300, 64))
    opt = CompressedSGD(
        model.named_parameters(), 0.02, Compression(TopK(0.1), exchange="direct"), noise=1e-4, momentum=0.9
    )
    rng = torch.Generator().manual_seed(rank)
    for step in range(1, steps + 1):
        x = torch.randn(16, 64, generator=rng)
        opt.zero_grad()
        torch.autograd.backward(nn.functional.mse_loss(model(x), x))
        opt.step()
        after(step)
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


def judge(found: dict[str, Any], case: Case, undisturbed: dict[str, Any] | None, arguments: argparse.Namespace) -> bool:
    """Return True if a case has the expected result."""
    workers = [worker for worker in found["workers"] if worker]
    if len(workers) < arguments.hosts - case.dies:
        return False
    digests = {worker.get("digest") for worker in workers}
    goes_on = digests != {None} if case.goes_on is None else case.goes_on
    if goes_on:
        same = undisturbed is None or digests == {undisturbed["workers"][0].get("digest")}
        return len(digests) == 1 and None not in digests and same
    in_time = all(worker["after"] < arguments.timeout + arguments.patience for worker in workers)
    told = all(_what(worker.get("lost", ""), found["victim"]) in _EXPECTED[case.goes_on] for worker in workers)
    return in_time and told


def _what(message: str, victim: int) -> str:
    """Return in short which worker a message names as lost, or the whole message."""
    shorts = {
        f"lost rank {victim} (": _NAMED,
        "lost the others and rank 0's store": _GONE,
        f"or rank {victim} itself is cut off": _ALONE,
        "answer now: one was late": _LATE,
    }
    return next((short for sign, short in shorts.items() if sign in message), message)


def row(name: str, found: dict[str, Any], undisturbed: dict[str, Any] | None) -> str:
    """Return a line of the table."""
    workers = {rank: worker for rank, worker in enumerate(found["workers"]) if worker}
    digests = {worker.get("digest") for worker in workers.values()}
    weights = "-" if digests == {None} else "one" if len(digests) == 1 else "several"
    if undisturbed is not None and weights == "one":
        weights = "equal" if digests == {undisturbed["workers"][0].get("digest")} else "OTHER"
    ends = " / ".join(f"{rank}: {_how(worker, found['victim'])}" for rank, worker in workers.items())
    longest = max(worker["longest"] for worker in workers.values())
    after = max(worker["after"] for worker in workers.values())
    judged = "yes" if found["good"] else "NO"
    return f"| {name}: {found['about']} | {ends} | {longest:.2f} s | {after:.1f} s | {weights} | {judged} |"


def _how(worker: dict[str, Any], victim: int) -> str:
    if "digest" in worker:
        return "done"
    return _what(worker["lost"], victim) if "lost" in worker else str(worker["error"])


if __name__ == "__main__":
    main()
