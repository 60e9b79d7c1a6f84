"""Groups without a backend for the device: overlap hides that gloo exchanges by way of the host."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from device_trainings import EVERY, STEPS, Training, batch, local, network, step
from pretended_device import FAULTS, Device, Kind, start
from torch.nn.parallel import DistributedDataParallel

import packsaddle as ps
from packsaddle.comm.group import TorchGroup
from packsaddle.hooks.ddp_hook import DDPHook


def _here(kind: Kind) -> torch.device:
    where = torch.device(kind, 0 if kind == "mps" else dist.get_rank())
    torch.accelerator.set_device_index(where)
    return where


def _held(kind: Kind, delay: int, fragments: int, library: Path) -> tuple[list[bool], list[str]]:
    """Hold each exchange in the background until the last step before its end is done; return for each whether that
    step was reached meanwhile, and the faults."""
    device = start(kind, library, devices=1 if kind == "mps" else 2)
    where, turn, done, reached = _here(kind), threading.Condition(), 0, []
    gather = TorchGroup._all_gather

    def held(group: TorchGroup, tensor: torch.Tensor) -> list[torch.Tensor]:
        if threading.current_thread().name == "packsaddle" and tensor.device.type == "cpu" and len(tensor) > 100:
            last = EVERY // fragments * (len(reached) + 1) + delay - 1
            with turn:
                reached.append(turn.wait_for(lambda: done >= last, timeout=20))
        return gather(group, tensor)

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 64), torch.nn.Linear(64, 24)).to(where)  # two fragments of one size
    batches = [batch(i, dist.get_rank(), where) for i in range(2 * STEPS)]  # the host waits here
    training = local(ps.Rounded("int4"), overlap=ps.Overlap(delay, fragments=fragments))(model)
    with mock.patch.object(TorchGroup, "_all_gather", held), device.record() as log:
        for i in range(len(batches)):
            step(training, *batches[i])
            with turn:
                done = i + 1
                turn.notify_all()
        done = 1000
        assert training.local is not None
        training.local.flush()
    return reached, log.lines(*FAULTS)


@pytest.mark.parametrize(("kind", "delay", "fragments"), [("cuda", 2, 1), ("cuda", 3, 2), ("xpu", 2, 1), ("mps", 2, 1)])
def test_overlap_hides_an_exchange_over_gloo(
    kind: Kind, delay: int, fragments: int, in_child: Callable[..., list[Any]], library: Path
) -> None:
    """Steps continue, and no memory is used again by a second fragment's exchange before the first one's is applied."""
    for reached, faults in in_child(_held, kind, delay, fragments, library, workers=2):
        assert len(reached) > 3 * fragments
        assert all(reached)
        assert not faults


def _on_cuda(backend: str, folder: Path, library: Path) -> tuple[torch.device, Device]:
    """Join a group with this backend for CUDA."""
    device, rank = start("cuda", library, devices=2), dist.get_rank()
    dist.destroy_process_group()
    dist.init_process_group(backend, init_method=f"file://{folder}/group", rank=rank, world_size=2)
    return _here("cuda"), device


def _hooked(folder: Path, library: Path) -> tuple[bool, list[str]]:
    """Hold the first bucket's exchange until the backward pass has computed the second one; return whether it did so
    meanwhile, and the faults."""
    where, device = _on_cuda("gloo", folder, library)
    net = DistributedDataParallel(network(where), device_ids=[where.index], bucket_cap_mb=0.005)
    hook, turn, reached, first = ps.register_ddp_hook(net, ps.Rounded("int4")), threading.Condition(), [], 0
    call, gather = DDPHook.__call__, TorchGroup._all_gather

    def called(self: DDPHook, bucket: Any) -> Any:
        future = call(self, bucket)
        with turn:
            turn.notify_all()
        return future

    def held(group: TorchGroup, tensor: torch.Tensor) -> list[torch.Tensor]:
        if first and not reached and tensor.device.type == "cpu":
            with turn:
                reached.append(turn.wait_for(lambda: hook.calls > first, timeout=20))
        return gather(group, tensor)

    replaced = mock.patch.object(TorchGroup, "_all_gather", held), mock.patch.object(DDPHook, "__call__", called)
    with replaced[0], replaced[1], device.record() as log:
        for i in range(4):
            first = hook.calls + 1 if i == 2 else 0  # DistributedDataParallel has made its final buckets
            step(Training(net, [torch.optim.SGD(net.parameters(), 0.1)]), *batch(i, dist.get_rank(), where))
    return reached == [True], log.lines(*FAULTS)


def test_the_hook_hides_an_exchange_over_gloo(
    in_child: Callable[..., list[Any]], library: Path, tmp_path: Path
) -> None:
    assert in_child(_hooked, tmp_path, library, workers=2) == [(True, []), (True, [])]
