"""Hosts with slow links between them: real network namespaces (root and iproute2 needed, else skipped)."""

import signal
import subprocess
import sys

import pytest

from lab.race.hosts import HostFailedError, Hosts

real = pytest.mark.usefixtures("hosts_here")

TRANSFER = """
import socket, sys, time
server = sys.argv[1] == "receive"
if server:
    with socket.create_server((sys.argv[2], 5000)) as listener:
        with listener.accept()[0] as link:
            begin, received = time.perf_counter(), 0
            while part := link.recv(1 << 16):
                received += len(part)
            print(received, time.perf_counter() - begin)
else:
    while True:
        try:
            link = socket.create_connection((sys.argv[2], 5000))
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    with link:
        link.sendall(bytes(int(sys.argv[3])))
"""
HOLD = """
from lab.race.hosts import Hosts
with Hosts(2, 100.0) as hosts:
    print(hosts.name, flush=True)
    hosts.run([["sleep", "1000"]] * 2)
"""


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


@real
def test_a_link_keeps_to_its_rate() -> None:
    rate, size = 200.0, 5_000_000
    with Hosts(2, rate) as hosts:
        python = [sys.executable, "-c", TRANSFER]
        receive, send = [*python, "receive", hosts.address(0)], [*python, "send", hosts.address(0), str(size)]
        received, seconds = hosts.run([receive, send])[0].split()
        counted = hosts.run([["true"], ["cat", f"/sys/class/net/{hosts.interface}/statistics/tx_bytes"]])[1]
        links = hosts.run([["ip", "-o", "link"]] * 2)
    # A link to each other, and to nobody else.
    names = [{line.split()[1].rstrip(":").split("@")[0] for line in out.splitlines()} for out in links]
    assert names == [{"lo", hosts.interface}] * 2
    assert int(received) == size
    # The buckets at both ends are full at the start, and what is in them passes at once.
    burst = 2 * 70_000
    assert (size - burst) * 8e-6 / float(seconds) <= 1.1 * rate
    assert size <= int(counted) <= 1.1 * size


@real
def test_a_failing_command_says_why_and_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lab.race.hosts._GRACE", 0.3)
    with Hosts(2, 100.0) as hosts:
        bad = [sys.executable, "-c", "raise ValueError('no such gradient')"]
        with pytest.raises(HostFailedError, match=r"^host 1 failed: ValueError: no such gradient$"):
            hosts.run([["sleep", "1000"], bad])
        assert hosts.run([["echo", "still here"]] * 2) == ["still here\n"] * 2
        assert subprocess.run(["ip", "netns", "pids", f"{hosts.name}-0"], capture_output=True).stdout == b""
    assert hosts.name not in namespaces()


@real
def test_nothing_is_left_after_a_signal() -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            name = process.stdout.readline().decode().strip()
            assert f"{name}-1" in namespaces()
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode != 0
    assert name not in namespaces()
