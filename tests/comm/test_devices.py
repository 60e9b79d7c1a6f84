"""Groups whose backends do not exchange a device's tensors where they are: which do, and staging by the host."""

import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from packsaddle import CompressedSGD, LocalUpdates, Rounded, TopK
from packsaddle.comm.group import TorchGroup, accepts, carries, stages
from packsaddle.comm.launching import direct_backend
from packsaddle.feedback.background import Background
from packsaddle.numerics.devices import to_host

Gloo = Callable[..., list[Any]]


@pytest.mark.parametrize(
    ("config", "kind", "is_direct", "is_accepted"),
    [
        ("cpu:gloo,cuda:gloo", "cpu", True, True),
        ("cpu:gloo,cuda:gloo", "cuda", False, True),  # gloo copies to the host itself, and blocks it
        ("cpu:gloo,cuda:nccl", "cuda", True, True),
        ("cuda:nccl", "cpu", False, False),  # as with offload=True
        ("cpu:gloo,cuda:gloo", "mps", False, True),
        ("cpu:gloo,mps:gloo", "mps", False, True),
        ("cpu:gloo,xpu:xccl", "xpu", True, True),
        ("xpu:xccl", "mps", False, False),
    ],
)
def test_which_groups_carry_which_devices(
    config: str, kind: str, is_direct: bool, is_accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    group, device = object(), torch.device(kind)
    assert carries(group, device) == is_direct  # type: ignore[arg-type]
    assert accepts(group, device) == is_accepted  # type: ignore[arg-type]
    assert stages(group, device) == (kind != "cpu" and not is_direct)  # type: ignore[arg-type]


class Staged(TorchGroup):
    def stages(self, device: torch.device) -> bool:
        return True


def exchanged() -> tuple[list[list[float]], list[list[float]], int]:
    """The results of the four collectives, of a plain group and a staged one, and how often that copied to the host."""
    found, copies = [], []

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        copies.append(tensor)
        return to_host(tensor).clone()

    for group in (TorchGroup(), Staged()):
        mine = torch.arange(3.0) + 10 * group.rank
        total, root = mine.clone(), mine.clone()
        outgoing = [mine[:2], mine[2:], mine]  # to ranks 0, 1 and 2
        with mock.patch("packsaddle.comm.group.to_host", counted):
            group.all_reduce(total)
            group.broadcast(root)
            received = group.all_to_all(outgoing, [[2, 1, 3][group.rank]] * 3)
            gathered = group.all_gather(mine)
        found.append([t.tolist() for t in (total, root, *gathered, *received)])
    return found[0], found[1], len(copies)


def test_staging_changes_no_result(gloo: Gloo) -> None:
    for plain, staged, copies in gloo(exchanged, 3):
        assert staged == plain
        assert copies == 4  # one of each collective


def offloaded() -> tuple[bool, str, list[float]]:
    """Train with offload=True in a group that claims to have NCCL alone."""
    real, world = dist.get_backend_config, dist.group.WORLD
    model = torch.nn.Linear(40, 40)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with mock.patch.object(dist, "get_backend_config", lambda g=None: "cuda:nccl" if g in (None, world) else real(g)):
        local = LocalUpdates(optimizer, Rounded("int8"), every=2, offload=True)
        for i in range(4):
            optimizer.zero_grad()
            rng = torch.Generator().manual_seed(2 * i + dist.get_rank())
            model(torch.randn(2, 40, generator=rng)).square().sum().backward()
            optimizer.step()
        local.flush()
    group = local._workers.channel.group.process_group  # type: ignore[attr-defined]
    return group is world, real(group), model.weight[0].tolist()


def test_offloaded_vectors_are_exchanged_by_gloo_where_there_is_nccl_alone(gloo: Gloo) -> None:
    (is_world, config, weights), (_, _, others) = gloo(offloaded, 2)
    assert not is_world
    assert config.startswith("cpu:gloo")
    assert weights == others


class Stream:
    """A stream of a device that does not exist: it records what is done in which thread."""

    def __init__(self) -> None:
        self.trace: list[str] = []

    def note(self, what: str) -> None:
        self.trace.append(f"{what} in {threading.current_thread().name}")

    def __enter__(self) -> None:
        self.note("enter")

    def __exit__(self, *_: object) -> None:
        self.note("exit")

    def wait_event(self, event: object) -> None:
        self.note(f"wait for {event}")

    def record_event(self) -> str:
        return "an event"


@pytest.mark.parametrize("blocks", [False, True])
def test_a_stream_in_the_background(blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work begins after what was launched before; in a thread if collectives block the host."""
    stream = Stream()
    monkeypatch.setattr("packsaddle.feedback.background.new_stream", lambda device: stream)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: Stream())
    monkeypatch.setattr("packsaddle.feedback.background.Future", lambda devices: torch.futures.Future())
    behind = Background(torch.device("cpu"), blocks=blocks)
    promise = behind.promise()
    behind.submit(lambda: stream.note("work"), [(promise, torch.zeros(1))])
    promise.future.wait()
    where = "packsaddle" if blocks else "MainThread"
    assert stream.trace[:3] == [f"{what} in {where}" for what in ("enter", "wait for an event", "work")]


def test_the_backend_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert direct_backend(1) is None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(dist, "is_backend_available", lambda name: name == "nccl")
    assert [direct_backend(n) for n in (2, 3)] == ["cuda:nccl", None]
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    assert direct_backend(1) is None


@pytest.mark.parametrize("front", ["CompressedSGD", "LocalUpdates"])
def test_a_captured_step_raises(front: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay of a CUDA graph runs kernels alone, so it would exchange nothing."""
    model = torch.nn.Linear(40, 40)
    model(torch.ones(2, 40)).sum().backward()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    call: Callable[[], object] = sgd.step
    device = torch.device("cpu")
    monkeypatch.setattr("packsaddle.numerics.devices.has_graphs", lambda found: found == device)
    monkeypatch.setattr("packsaddle.local.updates.has_graphs", lambda found: found == device)
    if front == "CompressedSGD":
        call = CompressedSGD(model.parameters(), 0.1, TopK(0.1)).step
    else:
        local = LocalUpdates(sgd, every=2)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="captured in a CUDA graph, whose replays would never exchange anything"):
        call()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    call()
    if front == "LocalUpdates":
        local.flush()
