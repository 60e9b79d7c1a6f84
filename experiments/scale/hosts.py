"""Hosts on one machine: network namespaces on a switch, every cable of a given rate in both directions. Needs root."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

INTERFACE = "veth0"


@dataclass(frozen=True)
class Host:
    name: str  # of its namespace
    address: str


def everywhere(world: Sequence[Host], arguments: Sequence[str], timeout: float = 1200.0) -> None:
    """Run a Python script on every host, in the environment that torchrun would set, and wait for all of them."""
    processes = []
    for rank, host in enumerate(world):
        place = {"RANK": rank, "WORLD_SIZE": len(world), "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "OMP_NUM_THREADS": 1}
        meet = {"MASTER_ADDR": world[0].address, "MASTER_PORT": 29533, "GLOO_SOCKET_IFNAME": INTERFACE}
        environment = {**os.environ, **{name: str(value) for name, value in {**place, **meet}.items()}}
        command = ["ip", "netns", "exec", host.name, sys.executable, *arguments]
        processes.append(subprocess.Popen(command, env=environment))
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        raise subprocess.SubprocessError(f"exit codes {codes}")


@contextmanager
def hosts(count: int, bits: float) -> Iterator[list[Host]]:
    """Join `count` hosts, 10.98.0.1 and on, by cables of `bits` a second; all is taken down in the end.

    The bucket of each token bucket filter holds two milliseconds (and five frames). What it holds passes at once, and
    the usual 64 kB would be whole messages of a slow link; a smaller one runs over while the kernel looks away.
    """
    prefix = f"scale{os.getpid()}"
    switch, names = f"{prefix}-switch", [f"{prefix}-{i}" for i in range(count)]
    shape = ["tbf", "rate", f"{bits:.0f}bit", "burst", str(max(8000, round(bits / 8 / 500))), "latency", "50ms"]
    try:
        for name in (switch, *names):
            run("ip", "netns", "add", name)
        run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", switch, "link", "set", "bridge", "up")
        for i, name in enumerate(names):
            run("ip", "-n", switch, "link", "add", f"port{i}", "type", "veth", "peer", INTERFACE, "netns", name)
            run("ip", "-n", switch, "link", "set", f"port{i}", "master", "bridge", "up")
            run("ip", "-n", name, "addr", "add", f"10.98.0.{i + 1}/24", "dev", INTERFACE)
            run("ip", "-n", name, "link", "set", INTERFACE, "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
            for namespace, end in ((name, INTERFACE), (switch, f"port{i}")):
                run("tc", "-n", namespace, "qdisc", "add", "dev", end, "root", *shape)
        yield [Host(name, f"10.98.0.{i + 1}") for i, name in enumerate(names)]
    finally:
        for name in (switch, *names):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
