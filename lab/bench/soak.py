"""Half an hour of training on four hosts: is memory constant, are workers equal, does the ledger match the interfaces?

python -m lab.bench.soak [--minutes 30] [--workers 4] [--rate 1000] [--pause 0] [--out soak.json]
(root and iproute2 needed)

Every host is a network namespace whose link has --rate Mbit/s. Each worker trains a network of half a million
parameters by CompressedSGD with TopK 10%, momentum and all guards, saves a checkpoint every 200 steps, and has a
non-finite gradient every 97 steps. Prints a line per worker: resident memory after a tenth of the time and at the end,
bytes in the ledger and at the interface, and whether all parameters are bitwise identical.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lab.bench.hosts import Hosts, available
from packsaddle import CompressedSGD, Compression, TopK, save_checkpoint

_PORT = 29_477


def main() -> None:
    """Run the workers, or one worker."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1000.0)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds to rest after a step")
    parser.add_argument("--exchange", default="direct")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=3, metavar=("RANK", "INTERFACE", "ADDRESS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        rank, interface, address = arguments.worker
        print(json.dumps(soak(int(rank), interface, address, arguments)))
        return
    if problem := available():
        parser.error(problem)
    with Hosts(arguments.workers, arguments.rate) as hosts:
        own = ["--minutes", str(arguments.minutes), "--workers", str(arguments.workers)]
        own += ["--pause", str(arguments.pause)]
        command = [sys.executable, __file__, *own, "--exchange", arguments.exchange, "--worker"]
        commands = [[*command, str(rank), hosts.interface, hosts.address(0)] for rank in range(arguments.workers)]
        printed = hosts.run(commands, env={"GLOO_SOCKET_IFNAME": hosts.interface, "OMP_NUM_THREADS": "1"})
    found = [json.loads(line) for line in printed]
    for rank, worker in enumerate(found):
        growth, ratio = worker["end_rss"] / worker["early_rss"] - 1, worker["seen_sent"] / worker["counted_sent"]
        print(
            f"worker {rank}: {worker['steps']:,} steps, {worker['skipped']} left out; "
            f"memory {worker['early_rss']:.1f} MiB then {worker['end_rss']:.1f} MiB ({100 * growth:+.2f}%); "
            f"sent {worker['counted_sent']:,} counted, {worker['seen_sent']:,} on the interface ({ratio:.3f})"
        )
    print(f"parameters equal: {len({worker['digest'] for worker in found}) == 1}")
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"settings": [*own, "--rate", str(arguments.rate)], "workers": found}, indent=1)
        )


def soak(rank: int, interface: str, address: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train for the given time; return the worker's memory, bytes and digest of the parameters."""
    workers = arguments.workers
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://{address}:{_PORT}", rank=rank, world_size=workers)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 768), nn.ReLU(), nn.Linear(768, 64))
    opt = CompressedSGD(
        model.named_parameters(),
        0.02,
        Compression(TopK(0.1), exchange=arguments.exchange, monitor_every=25, compare_every=50),
        noise=1e-4,
        momentum=0.9,
    )
    rng = torch.Generator().manual_seed(rank)
    before, begin, early = _counter(interface), time.monotonic(), 0.0
    counted = opt.ledger.total.sent
    with tempfile.TemporaryDirectory() as folder:
        for step in range(1, 10**9):
            x = torch.randn(16, 64, generator=rng)
            opt.zero_grad()
            loss = nn.functional.mse_loss(model(x), x)
            loss.backward()
            if step % 97 == 0 and step // 97 % workers == rank:
                next(model.parameters()).grad.view(-1)[step % 1000] = float("nan")  # type: ignore[union-attr]
            # Worker 0's clock decides; its signal is sent with the gradients.
            elapsed = time.monotonic() - begin
            over = rank == 0 and elapsed > 60 * arguments.minutes
            opt.step(scalars=torch.tensor([float(over)]))
            if step % 200 == 0:
                save_checkpoint(folder, {"model": model, "optimizer": opt}, step=step)
            if not early and elapsed > 6 * arguments.minutes:
                early = _resident()
            if float(opt.scalars) > 0:
                break
            time.sleep(arguments.pause)
    sent = opt.ledger.total.sent - counted
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    found = {
        "steps": opt.steps,
        "skipped": opt.skipped,
        "loss": float(loss),
        "early_rss": early,
        "end_rss": _resident(),
        "counted_sent": sent,
        "seen_sent": _counter(interface) - before,
        "digest": digest,
    }
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return found


def _counter(interface: str) -> int:
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


def _resident() -> float:
    """Return this process's resident memory, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
