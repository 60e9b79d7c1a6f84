"""A disconnected link between two hosts: training continues, or ends with an error that names the lost worker.

python -m lab.bench.network_faults brief|cut [--timeout 12] [--brief 3] [--steps 300]     (root and iproute2 needed)

Every host is a network namespace. It trains a network of 120,000 parameters by CompressedSGD with TopK 10%; after a
third of the steps the link of the last host is disconnected for --brief seconds, or for good. Prints the workers'
results by rank as JSON, for a test to judge: the digest of the weights, or the error.
"""

import argparse
import hashlib
import itertools
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lab.race.hosts import Hosts
from packsaddle import CompressedSGD, Compression, TopK, simulate
from packsaddle.comm import PeerLostError, process_group

_HOSTS = 2
_PORT = 29_478


def main() -> None:
    """Run a case of a disconnected link on all hosts, or, in a process started by it, one worker of the case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("brief", "cut"))
    parser.add_argument("--timeout", type=float, default=12.0)
    parser.add_argument("--brief", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--worker", metavar="FOLDER", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work(arguments.worker, arguments)), flush=True)
        os._exit(0)  # like packsaddle's command, since gloo's threads would wait for the disconnected network
    print(json.dumps(run(arguments)))


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Train on all hosts and disconnect the last one; return the workers' results by rank."""
    with Hosts(_HOSTS, 100.0) as hosts, tempfile.TemporaryDirectory() as name:
        folder, over = Path(name), threading.Event()
        (folder / "step").write_text("0")

        def disturb() -> None:
            while int((folder / "step").read_text() or 0) < arguments.steps // 3:
                if over.wait(0.01):
                    return
            hosts.plug(_HOSTS - 1, connected=False)
            if arguments.case == "brief":
                time.sleep(arguments.brief)
                hosts.plug(_HOSTS - 1, connected=True)

        # Each host runs this script as one worker.
        own = [arguments.case, "--timeout", str(arguments.timeout), "--steps", str(arguments.steps)]
        place = [f"MASTER_ADDR={hosts.address(0)}", f"MASTER_PORT={_PORT}", f"GLOO_SOCKET_IFNAME={hosts.interface}"]
        settings = [*place, f"WORLD_SIZE={_HOSTS}", "OMP_NUM_THREADS=1"]
        command = [sys.executable, __file__, *own, "--worker", str(folder)]
        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            printed = hosts.run([["env", f"RANK={rank}", *settings, *command] for rank in range(_HOSTS)])
        finally:
            over.set()
            thread.join()
    return [json.loads(text.splitlines()[-1]) for text in printed]


def work(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train in the launcher's world; return the digest of the weights, or the error."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    # Train alone first, so that the time of imports and compilation is not limited by the exchange's timeout.
    simulate(lambda _: train(rank, 2), 1)
    (folder / f"{rank}.ready").touch()
    while len(list(folder.glob("*.ready"))) < _HOSTS:
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
    except Exception as error:  # an unexpected error is printed, for the test to judge
        said = {"error": f"{type(error).__name__}: {error}"}
    late = times[arguments.steps // 3 :]  # the times of the steps after the disturbance
    return {**said, "longest": max((later - sooner for sooner, later in itertools.pairwise(late)), default=0.0)}


def train(rank: int, steps: int, after: Callable[[int], None] = lambda step: None) -> str:
    """Train, calling after(step) after each step, and return the digest of the final weights."""
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


if __name__ == "__main__":
    main()
