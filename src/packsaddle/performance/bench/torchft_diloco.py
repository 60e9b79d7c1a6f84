"""torchft's DiLoCo as a contender: AdamW or SGD inside, Nesterov momentum outside, on torchft's own Manager and gloo.

Each worker is one replica; worker 0 runs the lighthouse. DiLoCo's outer optimizer is the published one (Douillard et
al. 2023): SGD of rate 0.7 with Nesterov momentum 0.9 on the mean of the workers' changes, all-reduced in float32.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from packsaddle.comm.managed import connect
from packsaddle.errors import require

_JOIN_MS = 30_000  # how long the lighthouse waits for workers that are late


def attach(model: nn.Module, optimizer: torch.optim.Optimizer, every: int) -> Callable[[], None]:
    """Have `optimizer` take part in DiLoCo rounds of `every` steps; collective. Returns what ends it.

    Raises MissingExtraError without torchft.
    """
    os.environ.setdefault("RUST_LOG", "warn")  # else its servers say several lines in every round
    torchft: Any = require("torchft.local_sgd", "torchft", "diloco-N")
    lighthouse, place = _lighthouse(dist.get_rank(), dist.get_world_size())
    manager = connect(place, name=f"worker-{dist.get_rank()}", min_workers=dist.get_world_size())
    outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    rounds = torchft.DiLoCo(manager, [model], optimizer, outer, sync_every=every, pin_memory=False)
    rounds.__enter__()

    def end() -> None:
        rounds.__exit__(None, None, None)
        dist.barrier()  # no worker leaves while another still needs its Manager
        manager.shutdown(wait=False)
        if lighthouse is not None:
            lighthouse.shutdown()

    return end


def _lighthouse(rank: int, workers: int) -> tuple[Any, str]:
    """Start the lighthouse on worker 0, which other workers reach as they reach the master; return it and its place."""
    server, told = None, [""]
    if rank == 0:
        coordination: Any = require("torchft.coordination", "torchft", "diloco-N")
        server = coordination.LighthouseServer(bind="0.0.0.0:0", min_replicas=workers, join_timeout_ms=_JOIN_MS)
        port = server.address().rsplit(":", 1)[1]
        told = [f"http://{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{port}"]
    dist.broadcast_object_list(told, src=0)
    return server, told[0]
