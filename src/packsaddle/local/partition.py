"""The partition of a model into fragments: consecutive parameters of about equal total size.

Replicated DTensors are in fragments apart from sharded ones. Replicated parameters must stay identical on all shards,
so the choice of their coordinates must not depend on values of one shard.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from packsaddle.comm.communicator import Communicator
from packsaddle.comm.sharding import is_replicated, local_part
from packsaddle.feedback.slices import places
from packsaddle.local.fragment import Fragment
from packsaddle.local.options import LocalOptions


def partition(
    parameters: Mapping[str, Tensor],
    options: LocalOptions,
    channel: Communicator,
    device: torch.device,
    agree: Callable[[Tensor], Tensor],
) -> list[Fragment]:
    """Cut the parameters into fragments by their order, each due `every` / `fragments` steps before the next.

    Anchors and memories are on `device`. Raises ValueError for more fragments than parameters.
    """
    by_name = {p.name: p for p in places(parameters.items(), options.compression.dense_below, local_part)}
    names = list(parameters)
    make = partial(
        Fragment,
        parameters=parameters,
        device=device,
        every=options.every,
        compression=options.compression,
        channel=channel,
        d=sum(place.size for place in by_name.values() if not place.dense),
        seed=options.seed,
        keep=options.keep_unsent,
        agree=agree,
    )
    # A fragment is one vector with one choice of coordinates: replicated parameters have their own.
    found = []
    for i, members in enumerate(balanced(names, [by_name[name].size for name in names], options.overlap.fragments)):
        for replicated in (False, True):
            mine = [by_name[n] for n in members if is_replicated(parameters[n]) == replicated]
            if mine:
                found.append(make(mine, offset=i * options.every // options.overlap.fragments))
    return found


def balanced(names: Sequence[str], sizes: Sequence[int], parts: int) -> list[list[str]]:
    """Cut a list in consecutive parts of about equal total size, none of them empty."""
    if parts > len(names):
        raise ValueError(f"fragments must be at most the number of parameters, {len(names)}, got {parts}")
    total, done, found = sum(sizes), 0, [list[str]() for _ in range(parts)]
    at = 0
    for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
        middle = (done + size / 2) / total if total else 0.0
        left = len(names) - i
        while at < parts - 1 and found[at] and (middle >= (at + 1) / parts or left <= parts - 1 - at):
            at += 1
        found[at].append(name)
        done += size
    return found
