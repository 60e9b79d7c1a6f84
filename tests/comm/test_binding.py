"""Servers that listen at one address: gloo's of one machine's workers at localhost, and those of elastic workers."""

import importlib.util
import os
import socket
from pathlib import Path

import pytest
import torch
from listeners import are_local, listeners

from packsaddle.comm import connect, launch, managed, process_group
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
    store = managed._bound_store(address)
    assert answers("127.0.0.1" if address == "::" else address, store.port)
    assert answers("127.0.0.3", store.port) == other
    store.set("a", "b")
    assert store.get("a") == b"b"


def in_a_worker() -> set[tuple[str, int]]:
    with process_group() as group:
        group.all_reduce(torch.zeros(3))
        return listeners(os.getpid())


def test_the_workers_of_one_machine_cannot_be_reached_from_another() -> None:
    assert are_local(launch(in_a_worker, (), 2)), "gloo's sockets"


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
