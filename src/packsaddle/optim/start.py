"""The start of local updates: the tensors of the optimizer and of the model, set to rank 0's on every worker."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from packsaddle.comm.communicator import Communicator
from packsaddle.comm.sharding import local_part
from packsaddle.optim.inner_optimizer import named_parameters
from packsaddle.optim.stages.drift import fingerprint


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that checkpoints have, by name; others, such as caches, may differ in shape."""
    passing = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    return {name: b.detach() for name, b in model.named_buffers() if name not in passing}


def untrained_tensors(optimizer: Optimizer, model: nn.Module | None) -> list[tuple[str, Tensor]]:
    """Return the frozen parameters of the optimizer, and those and the persistent buffers of a model, with names."""
    named = list(named_parameters(optimizer).items())
    if model is not None:
        known = {id(p) for _, p in named}
        named += [(name, p) for name, p in model.named_parameters() if id(p) not in known]
        named += persistent_buffers(model).items()
    return [(name, t) for name, t in named if not t.requires_grad]


@torch.no_grad()
def share_start(channel: Communicator, trained: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Set tensors to rank 0's, in place; collective.

    Of the others, a pretrained model around adapters for example, only those that differ are sent: 8 bytes of each are
    compared first.
    """
    sent = [local_part(p) for p in trained]
    if others and channel.group.size > 1:
        parts = [local_part(p) for p in others]
        prints = torch.stack([fingerprint(part).cpu() for part in parts]).to(sent[0].device)
        gathered = [p["prints"] for p in channel.gather({"prints": prints}, fixed_size=True, purpose="start")]
        differs = torch.stack([row != gathered[0] for row in gathered]).any(0).tolist()
        sent += [part for part, differ in zip(parts, differs, strict=True) if differ]
    for part in sent:
        channel.broadcast(part, "start")
