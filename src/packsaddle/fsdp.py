"""Compressed exchange between replicas of a model that FSDP2 shards: dense inside a machine, compressed between them.

`fully_shard` on a mesh of one machine reduces gradients there and then calls a hook with this worker's shard; the hook
averages it over the workers that have the same shard on other machines.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from packsaddle.agree import check_agreement
from packsaddle.allocation import Allocation
from packsaddle.channel import Channel
from packsaddle.choose import choose
from packsaddle.compress import Compressor, LowRank, TopK
from packsaddle.exchange import ProcessGroup, resolve
from packsaddle.exchanger import Exchanger, Rules, Schedule
from packsaddle.finite import spoil
from packsaddle.ledger import Ledger
from packsaddle.noise import Perturbation
from packsaddle.sections import Place, Section
from packsaddle.seeds import as_seed, mix
from packsaddle.sharded import shard_rank, sharded_modules
from packsaddle.state import check_identity


class FSDPHook:
    """What `register_fsdp_hook` returns. Every sharded module has a section of its own, with its error memory."""

    def __init__(self, channel: Channel, rules: Rules, noise: float | Callable[[int], float], shard: int) -> None:
        self.channel = channel
        self._rules, self._shard = rules, shard
        self._perturbation = Perturbation(noise)
        self._exchangers: dict[str, Exchanger] = {}
        self._seeds: dict[str, int] = {}
        self._loose: dict[str, Tensor] = {}  # errors that were loaded, until their modules come
        self._seen: set[str] = set()  # modules that have come in this backward pass
        self._steps = 0

    @torch.no_grad()
    def take(self, name: str, index: int, gradient: Tensor) -> None:
        """Average a module's shard, float[n], over the replicas, in place; called by FSDP in the backward pass."""
        if name in self._seen:  # that pass is over, and a new one has begun
            self._steps += 1
            self._seen = set()
        self._seen.add(name)
        self.channel.step = self._steps
        exchanger = self._exchanger(name, index, gradient)
        xi = self._perturbation.at(seed=self._seeds[name], step=self._steps)
        bad = exchanger.exchange(self.channel, {name: gradient}, xi, self._steps) > 0
        exchanger.settle(taken=not bad)
        spoil(gradient, bad, float("nan"))

    def _exchanger(self, name: str, index: int, gradient: Tensor) -> Exchanger:
        if name not in self._exchangers:
            place = Place(name, torch.empty_like(gradient, device="meta"), dense=False, start=0)  # a shape alone
            self._seeds[name] = seed = mix(self._rules.seed, index, self._shard)  # replicas of a shard have the same
            rules = replace(self._rules, seed=seed)
            self._exchangers[name] = Exchanger(
                Section([place], self._loose, gradient.device), rules, Allocation(len(gradient))
            )
        if self._exchangers[name].section.n != len(gradient):
            raise RuntimeError(
                f"{name or 'the model'} came with {len(gradient)} coordinates, and with "
                f"{self._exchangers[name].section.n} before: parameters were frozen or unfrozen, or had no gradient"
            )
        return self._exchangers[name]

    @property
    def ledger(self) -> Ledger:
        """The bytes this worker exchanged with its replicas, by step and purpose; FSDP's own are not in it."""
        return self.channel.ledger

    @property
    def steps(self) -> int:
        """How many backward passes have been exchanged."""
        return self._steps + bool(self._seen)

    def memory(self) -> dict[str, Tensor]:
        """Return this worker's e^(i) by module, float[n], with its share of what the exchange holds back."""
        found, size = dict(self._loose), self.channel.group.size
        return found | {name: exchanger.error(size) for name, exchanger in self._exchangers.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return this worker's state, tensors and plain types; each worker has its own."""
        return {"steps": self.steps, "pending": self.memory(), "ledger": self.ledger.state_dict(), **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`. Raises ValueError, changing nothing, if another worker or seed made it."""
        check_identity(state, self._identity())
        self._exchangers, self._seeds, self._seen = {}, {}, set()
        self._loose = {name: error.clone() for name, error in state["pending"].items()}
        self._steps = state["steps"]
        self.ledger.load_state_dict(state["ledger"])

    def _identity(self) -> dict[str, int]:
        group = self.channel.group
        return {"seed": self._rules.seed, "replica": group.rank, "replicas": group.size, "shard": self._shard}


def register_fsdp_hook(
    model: nn.Module,
    replicas: ProcessGroup,
    compressor: Compressor | Schedule = TopK(0.1),  # noqa: B008 -- immutable
    *,
    noise: float | Callable[[int], float] = 0.0,
    error_feedback: bool = True,
    start_step: int = 0,
    seed: int = 0,
    exchange: str = "direct",
    back: Compressor | None = None,
) -> FSDPHook:
    """Average the gradients of a model that `fully_shard` shards over its replicas, compressed; collective.

    Args:
        model: sharded by `torch.distributed.fsdp.fully_shard` on a mesh of one dimension, that of one machine, say.
        replicas: the workers with the same shard on other machines: mesh["replicate"].get_group() of a mesh of two.
        compressor: C for each sharded module's flat shard, all of it; or a function of the step that gives it.
        noise, error_feedback, start_step, seed, exchange, back: as in `register_ddp_hook`.

    With a GradScaler on top nothing is agreed on between shards: a NaN stays in the module where it came up. Every
    sharded module must take part in every backward pass that exchanges. Raises ValueError or TypeError for what is bad.
    """
    modules = sharded_modules(model)
    if not modules:
        raise TypeError(f"model must have been sharded by fully_shard, got {type(model).__name__}")
    rules = Rules(compressor, exchange, back, "bucket", error_feedback, start_step, as_seed(seed))
    first = rules.at(start_step)
    if isinstance(first, LowRank) or getattr(first, "per_tensor", False):
        raise ValueError(
            f"compressor must act on flat shards, in which tensors are cut, and {first!r} needs whole ones"
        )
    channel = Channel(resolve(replicas), Ledger())
    hook = FSDPHook(channel, rules, noise, shard_rank(model))
    same = {"rules": rules, "noise": noise, "modules": [name for name, _ in modules], "shard": shard_rank(model)}
    check_agreement(channel, same, next(model.parameters()).device)
    sizes = [p.to_local().numel() for p in model.parameters() if hasattr(p, "to_local") and p.requires_grad]
    choose(first, exchange, d=sum(sizes), dense=1, workers=channel.group.size, back=back)
    for index, (name, module) in enumerate(modules):
        if hasattr(module, "set_reduce_scatter_unused_params"):  # so that a shard has one layout, whatever took part
            module.set_reduce_scatter_unused_params(True)
        module.set_all_reduce_hook(partial(hook.take, name, index))
    return hook
