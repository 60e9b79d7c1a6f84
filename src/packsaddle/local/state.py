"""Values of `LocalUpdates` that must be equal on all workers, or at saving and loading of a state."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.group import Group
from packsaddle.feedback.state import ANY, Rule
from packsaddle.local.fragment import Fragment
from packsaddle.local.options import Elastic, LocalOptions
from packsaddle.numerics.kernels import compiler


def agreement(
    options: LocalOptions,
    fragments: Sequence[Fragment],
    outer: Optimizer | None,
    parameters: Mapping[str, Tensor],
    untrained: Iterable[tuple[str, Tensor]],
) -> dict[str, object]:
    """Return the arguments and tensor shapes that must be equal on all workers, as a dict by name."""
    same = options.agreement()
    same["kernels"] = compiler(fragments[0].anchor.flat.device)
    same["outer"] = None if outer is None else (type(outer).__name__, outer.defaults)
    for kind, tensors in (("params", parameters.items()), ("untrained", untrained)):
        for i, (name, p) in enumerate(tensors):
            same[f"{kind}[{i}]"] = f"{name} {list(p.shape)} {p.dtype}"
    return same


def identity(options: LocalOptions, fragments: Sequence[Fragment], group: Group) -> dict[str, Any]:
    """Return the settings that must be equal when a state is saved and when it is loaded, as a dict by name."""
    same: dict[str, Any] = {"seed": options.seed, "every": options.every, "delay": options.overlap.delay}
    same |= {"fragments": len(fragments), "keep_unsent": options.keep_unsent}
    same |= {"outer": options.outer is not None, "escape": options.escape is not None}
    if isinstance(options.workers, Elastic):
        return same | {"elastic": True}
    if options.workers.sample < 1:
        same["sample"] = options.workers.sample
    return same | {"rank": group.rank, "workers": group.size}


def rules(*, keep_unsent: bool) -> list[Rule]:
    """Return rules for the entries of the saved state: shared by all workers or not, and how to convert them.

    With `keep_unsent`, a worker continues at a - e. An owner's residual that is added to e changes this point but not
    the parameters, so it is also added to "owed" (see `Anchor.owed`).
    """
    part = ("fragments", ANY)
    error, owed = (*part, "error", ANY), (*part, "owed", ANY)
    return [
        Rule(error, "error"),
        Rule(owed, "error", like=error),
        Rule((*part, "owner_error", ANY), "owner", into=[error, owed] if keep_unsent else [error]),
        Rule((*part, "exchange", "start", ANY), "error"),
        Rule((*part, "exchange", "invalid"), "constant", value=False),  # the next round checks the parameters
        *(Rule((*part, name), "own") for name in ("owner_error", "owed", "aggregator", "contraction", "clipped")),
        *(Rule((*part, name), "shared") for name in ("rounds", "anchor", "exchange")),
        *(Rule(("identity", name), "constant") for name in ("rank", "workers")),
        *(Rule((name,), "own") for name in ("skips", "ledger", "uncompressed", "membership")),
        *(Rule((name,), "shared") for name in ("format", "identity", "steps", "outer", "escape")),
        *(Rule((name,), "shared") for name in ("resets", "drifts")),
    ]
