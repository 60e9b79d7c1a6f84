"""Servers listen at one address: that of one machine's workers at localhost, and no other address reaches them."""

import importlib.util
import os
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from forked_python import environment, python
from listeners import are_local, listeners

from packsaddle.comm import connect
from packsaddle.comm.launching import bound_store, launch, process_group
from packsaddle.errors import ConfigError

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads the sockets of Linux"),
]
needs_torchft = pytest.mark.skipif(importlib.util.find_spec("torchft") is None, reason="torchft is not installed")


def answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=2).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(("address", "other"), [("127.0.0.1", False), ("127.0.0.2", False), ("::", True)])
def test_a_store_listens_at_its_address_alone(address: str, other: bool) -> None:
    store = bound_store(address)
    assert answers("127.0.0.1" if address == "::" else address, store.port)
    assert answers("127.0.0.3", store.port) == other
    store.set("a", "b")
    assert store.get("a") == b"b"


def in_a_worker(launcher: int) -> list[set[tuple[str, int]]]:
    with process_group() as group:
        group.all_reduce(torch.zeros(3))
        return [listeners(os.getpid()), listeners(launcher)]


def test_the_workers_of_one_machine_cannot_be_reached_from_another() -> None:
    before = listeners(os.getpid())
    worker, launcher = launch(in_a_worker, (os.getpid(),), 2)
    assert are_local(worker), "gloo's sockets"
    assert are_local(launcher - before), "the launcher's store"


RANK_0 = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parents[1] / "support")!r})
from listeners import listeners
from packsaddle.comm.launching import process_group
with process_group() as group:
    print(*sorted({{address for address, port in listeners(os.getpid()) if port == int(os.environ["MASTER_PORT"])}}))
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@pytest.mark.parametrize(("bind", "expected"), [(None, "127.0.0.1"), ("::", "::"), ("203.0.113.9", "")])
def test_rank_0_of_another_launcher_listens_at_its_address(bind: str | None, expected: str) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "1", "RANK": "0"}
    chosen = {} if bind is None else {"PACKSADDLE_BIND": bind}
    command, env = [python(), "-c", RANK_0], environment(**place, **chosen)
    found = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert found.stdout.strip() == expected, found.stderr
    if not expected:
        said = "ConfigError: the process group cannot be initialized: this machine cannot listen at 203.0.113.9; name"
        assert said in found.stderr
        assert "in PACKSADDLE_BIND, or :: for all" in found.stderr


@needs_torchft
def test_an_elastic_worker_listens_on_the_way_to_the_lighthouse() -> None:
    from torchft.coordination import LighthouseServer

    lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=100)
    port = lighthouse.address().rsplit(":", 1)[1]
    before = listeners(os.getpid())
    manager = connect(f"http://127.0.0.1:{port}", timeout=5)
    try:
        servers = listeners(os.getpid()) - before
        assert len(servers) >= 3, "a store, a manager and the server of the state"
        assert are_local(servers)
    finally:
        manager.shutdown(wait=False)
        lighthouse.shutdown()
    with (
        socket.create_server(("127.0.0.1", 0)) as no_lighthouse,
        pytest.raises(ConfigError, match=r"bind must be an address of this machine, got '203.0.113.9'"),
    ):
        connect(f"http://127.0.0.1:{no_lighthouse.getsockname()[1]}", bind="203.0.113.9")
