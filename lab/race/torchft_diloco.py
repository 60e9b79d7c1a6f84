"""torchft's DiLoCo as a contender, with AdamW or SGD as the inner optimizer, on torchft's own Manager and gloo.

Each worker is one replica; worker 0 runs the lighthouse. DiLoCo's outer optimizer is the published one (Douillard et
al. 2023): SGD of rate 0.7 with Nesterov momentum 0.9 on the mean local update, all-reduced in float32.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from packsaddle.comm import Group, connect, resolve
from packsaddle.errors import require

outer = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)  # makes the outer optimizer from the anchor
_JOIN_MS = 30_000  # milliseconds that the lighthouse waits for late workers


def attach(model: nn.Module, optimizer: torch.optim.Optimizer, every: int) -> Callable[[], None]:
    """Add DiLoCo rounds, one every `every` steps, to `optimizer`; collective.

    Returns a function that ends torchft's background services. Raises MissingExtraError without torchft.
    """
    os.environ.setdefault("RUST_LOG", "warn")  # by default torchft's servers log several lines per round
    torchft: Any = require("torchft.local_sgd", "torchft", "diloco-N")
    group = resolve(None)
    lighthouse, place = _lighthouse(group)
    manager = connect(place, name=f"worker-{group.rank}", min_workers=group.size)
    rounds = torchft.DiLoCo(manager, [model], optimizer, outer(model.parameters()), sync_every=every, pin_memory=False)
    rounds.__enter__()

    def end() -> None:
        rounds.__exit__(None, None, None)
        group.all_reduce(torch.zeros(1))  # no worker may leave while another one needs its Manager
        manager.shutdown(wait=False)
        if lighthouse is not None:
            lighthouse.shutdown()

    return end


def _lighthouse(group: Group) -> tuple[Any, str]:
    """Start the lighthouse on worker 0, on the host of MASTER_ADDR.

    Returns the lighthouse (None on all workers except worker 0) and its address.
    """
    server, port = None, torch.zeros(1, dtype=torch.int64)
    if group.rank == 0:
        coordination: Any = require("torchft.coordination", "torchft", "diloco-N")
        server = coordination.LighthouseServer(bind="0.0.0.0:0", min_replicas=group.size, join_timeout_ms=_JOIN_MS)
        port[0] = int(server.address().rsplit(":", 1)[1])
    group.broadcast(port)
    return server, f"http://{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{int(port)}"
