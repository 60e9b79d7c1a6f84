"""Hosts with a slow network between them, on one machine: network namespaces with links of a chosen rate.

Each host is a network namespace; its `eth0` is one end of a veth pair whose other end is a port of a bridge. The bridge
is in a separate namespace, isolated from the machine's network. A token bucket (tbf) at both ends of each pair limits
the rate of each direction. Latency cannot be added in this way.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import count as counting
from pathlib import Path
from types import FrameType
from typing import Self

_serial = counting()
_POLL = 0.1
_GRACE = 10.0  # after one host has failed, seconds until the remaining hosts are ended
_EXCEPTION = re.compile(r"^(?:\[rank\d+\]:\s*)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit|what\(\)):?\s.*)")


class HostFailedError(RuntimeError):
    """A command on a host failed; the message names the host and has the last error that it printed."""


def available() -> str | None:
    """Return None if this process can create hosts, otherwise one line that names the missing requirement."""
    if not sys.platform.startswith("linux"):
        return f"needs Linux's network namespaces, and this is {sys.platform}"
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        return f"needs {' and '.join(missing)} (iproute2)"
    if os.geteuid() != 0:
        return f"needs root, to make network namespaces; this is user {os.geteuid()}"
    try:
        with Hosts(1, 1000.0):
            return None
    except (OSError, RuntimeError) as error:
        return f"cannot make network namespaces: {error}"


class Hosts:
    """A context in which `count` hosts exist, connected by links of `rate_mbit` Mbit/s.

    `up_mbit` is the rate at which a host sends; None: `rate_mbit` in both directions. On exit, also by an exception,
    Ctrl-C or SIGTERM, all processes on the hosts are ended and the hosts are removed. Raises ValueError for invalid
    arguments, and RuntimeError with the reason if hosts cannot be created (see `available`).
    """

    interface = "eth0"

    def __init__(self, count: int, rate_mbit: float, up_mbit: float | None = None) -> None:
        if not 1 <= count <= 64:
            raise ValueError(f"hosts must be 1 to 64, got {count}")
        self.count = count
        self.down_mbit = rate_mbit
        self.up_mbit = rate_mbit if up_mbit is None else up_mbit
        for rate in (self.down_mbit, self.up_mbit):
            _check_rate(rate)
        self.name = f"packsaddle-{os.getpid()}-{next(_serial)}"
        self._made = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as made:
            made.enter_context(_TermRaises())
            bridge = self._bridge = self._namespace(made, "bridge")
            _ip("-n", bridge, "link", "add", "bridge", "type", "bridge")
            _ip("-n", bridge, "link", "set", "bridge", "up")
            for host in range(self.count):
                self._connect(self._namespace(made, str(host)), bridge, host)
            self._made = made.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._made.close()

    def address(self, host: int) -> str:
        """Return the IP address of a host in the hosts' network."""
        return f"10.0.0.{host + 1}"

    def run(self, commands: Sequence[Sequence[str]], *, env: dict[str, str] | None = None) -> list[str]:
        """Run commands[i] on host i, concurrently, and return their outputs.

        `env` is added to the environment. If a command fails, the rest are ended and HostFailedError is raised. Raises
        ValueError unless there is one command for each host.
        """
        if len(commands) != self.count:
            raise ValueError(f"commands must be one for each of {self.count} hosts, got {len(commands)}")
        with ExitStack() as cleanup:
            folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="packsaddle-hosts-")))
            processes = []
            for host, command in enumerate(commands):
                process = self._start(host, command, folder, {**os.environ, **(env or {})})
                cleanup.callback(self._end, host, process)
                processes.append(process)
            if failed := _wait(processes):
                reasons = (f"host {host} failed: {_reason(folder / f'{host}.err')}" for host in failed)
                raise HostFailedError("; ".join(reasons))
            return [(folder / f"{host}.out").read_text() for host in range(len(commands))]

    def plug(self, host: int, *, connected: bool) -> None:
        """Disconnect a host's link at the bridge, or connect it again.

        A disconnected host has no carrier, and packets in both directions are lost. Its addresses do not change.
        """
        _ip("-n", self._bridge, "link", "set", f"port{host}", "up" if connected else "down")

    def torchrun(self, arguments: Sequence[str]) -> list[str]:
        """Run torchrun with one process on each host, in one common process group, and return the hosts' outputs.

        `arguments` are a script or "-m module", followed by its own arguments. Raises HostFailedError if a host fails.
        """
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(self.count), "--nproc-per-node", "1"]
        meeting = ["--master-addr", self.address(0), "--master-port", "29500"]
        commands = [[*launcher, *meeting, "--node-rank", str(host), *arguments] for host in range(self.count)]
        return self.run(commands, env={"GLOO_SOCKET_IFNAME": self.interface})

    def _namespace(self, made: ExitStack, suffix: str) -> str:
        name = f"{self.name}-{suffix}"
        made.callback(_remove, name)  # before creation, so that an interrupt leaves nothing behind
        _ip("netns", "add", name)
        return name

    def _connect(self, host: str, bridge: str, number: int) -> None:
        port = f"port{number}"
        peer = ["type", "veth", "peer", "name", port, "netns", bridge]
        _ip("link", "add", self.interface, "netns", host, *peer)
        _ip("-n", bridge, "link", "set", port, "master", "bridge", "up")
        _ip("-n", host, "addr", "add", f"{self.address(number)}/24", "dev", self.interface)
        for link in ("lo", self.interface):
            _ip("-n", host, "link", "set", link, "up")
        for (namespace, link), rate in self._ends(number):
            _call("tc", "-n", namespace, "qdisc", "add", "dev", link, "root", "tbf", *_bucket(rate))

    def _ends(self, host: int) -> tuple[tuple[tuple[str, str], float], tuple[tuple[str, str], float]]:
        """Return ((namespace, interface), outgoing rate in Mbit/s) for both ends of a host's link."""
        return ((f"{self.name}-{host}", self.interface), self.up_mbit), ((self._bridge, f"port{host}"), self.down_mbit)

    def _start(self, host: int, command: Sequence[str], folder: Path, env: dict[str, str]) -> "subprocess.Popen[bytes]":
        inside = ["ip", "netns", "exec", f"{self.name}-{host}", *command]
        with (folder / f"{host}.out").open("wb") as out, (folder / f"{host}.err").open("wb") as err:
            return subprocess.Popen(inside, stdout=out, stderr=err, env=env, start_new_session=True)

    def _end(self, host: int, process: "subprocess.Popen[bytes]") -> None:
        """End a host's processes: its command by SIGTERM, then all remaining processes in its namespace."""
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
        _kill_inside(f"{self.name}-{host}")
        process.wait()


def _check_rate(rate_mbit: float) -> None:
    if not 0.1 <= rate_mbit <= 100_000:
        raise ValueError(f"rate must be 0.1 to 100,000 Mbit/s, got {rate_mbit}")


def _bucket(rate_mbit: float) -> list[str]:
    """Return the arguments of the token bucket filter (tbf) that limits a link to a rate in Mbit/s."""
    # The bucket holds the bytes of two milliseconds. That is enough for tbf's timer to reach the rate. A larger bucket,
    # which fills while workers compute, would let short messages pass without delay.
    burst = max(4096, round(rate_mbit * 1e6 / 8 * 0.002))
    # The queue must be longer than TCP's large segments: otherwise dense exchanges lose packets, and thus time.
    queue = burst + max(256 * 1024, round(rate_mbit * 1e6 / 8 * 0.05))
    return ["rate", f"{round(rate_mbit * 1000)}kbit", "burst", f"{burst}b", "limit", f"{queue}b"]


class _TermRaises:
    """A context in which SIGTERM raises SystemExit, so that contexts inside it exit in order, as after Ctrl-C."""

    def __enter__(self) -> None:
        self._main = threading.current_thread() is threading.main_thread()  # only the main thread can set handlers
        if self._main:
            self._before = signal.signal(signal.SIGTERM, self._leave)

    def __exit__(self, *_: object) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._before)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)


def _wait(processes: "Sequence[subprocess.Popen[bytes]]") -> list[int]:
    """Wait until all processes have ended, but at most _GRACE seconds after the first failure.

    Returns the indices of the failed processes, in the order of their failures.
    """
    failed: list[int] = []
    deadline = float("inf")
    while True:
        codes = [p.poll() for p in processes]
        failed += [i for i, code in enumerate(codes) if code and i not in failed]
        if None not in codes or time.monotonic() > deadline:
            return failed
        if failed:
            deadline = min(deadline, time.monotonic() + _GRACE)
        time.sleep(_POLL)


def _reason(stderr: Path) -> str:
    """Return the last exception in a command's error output, except torchrun's own.

    If there is none, returns the last line that contains words.
    """
    lines = [line.strip() for line in stderr.read_text(errors="replace").splitlines() if re.search(r"\w", line)]
    found = [match[1] for line in lines if (match := _EXCEPTION.match(line)) and "ChildFailedError" not in line]
    return found[-1] if found else lines[-1] if lines else "it printed no error"


def _remove(namespace: str) -> None:
    _kill_inside(namespace)
    subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


def _kill_inside(namespace: str) -> None:
    found = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    for pid in found.stdout.split():
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            continue


def _ip(*arguments: str) -> None:
    _call("ip", *arguments)


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
