"""Two lines in a script that has DistributedDataParallel: compressed, perturbed exchange, with any optimizer."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from packsaddle.afterstep import EscapeAfterStep
from packsaddle.agree import check_agreement
from packsaddle.channel import Channel
from packsaddle.choose import choose, warn_of_nothing
from packsaddle.compress import Compressor, TopK
from packsaddle.ddphook import DDPHook
from packsaddle.escape import Escape
from packsaddle.exchange import group_beside, on_buckets, resolve
from packsaddle.exchanger import Rules, Schedule, Scope
from packsaddle.ledger import Ledger
from packsaddle.monitor import Every
from packsaddle.rates import Rates
from packsaddle.sections import Place, places
from packsaddle.seeds import as_seed
from packsaddle.sharded import is_sharded


def register_ddp_hook(
    model: DistributedDataParallel,
    compressor: Compressor | Schedule = TopK(0.1),  # noqa: B008 -- immutable
    *,
    noise: float | Callable[[int], float] = 0.0,
    escape: Escape | None = None,
    error_feedback: bool = True,
    start_step: int = 0,
    seed: int = 0,
    dense_below: int = 1024,
    exchange: str = "direct",
    back: Compressor | None = None,
    scope: Scope = "bucket",
    optimizer: Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
    monitor_every: int = 0,
    max_skipped: int | None = 20,
    compare_every: int = 100,
) -> DDPHook:
    """Let DistributedDataParallel exchange its gradients compressed, perturbed and with error feedback; collective.

    Every worker's p.grad after a backward pass is the mean of what all workers sent, and any optimizer may use it. With
    plain SGD and scope="model" the run is that of `CompressedSGD` (with lazy_noise=False), step by step.

    Args:
        model: what DistributedDataParallel made, on which no hook has been registered yet.
        compressor: C, or a function of the step that gives it (see `RatioRamp`).
        noise: r, the standard deviation of each coordinate of xi_t in the units of a gradient, or a function of the
            step that gives it (see `Ramp`).
        escape: the escape check of lines 4-8, made after each step of `optimizer`, which must be plain SGD.
        error_feedback: keep what was not sent and add it to the next gradient.
        start_step: steps to exchange uncompressed first.
        seed, dense_below, exchange, back: as in `CompressedSGD`.
        scope: what is compressed as one vector: each of DDP's buckets, while the backward pass goes on, or all of the
            model at its end, as Algorithm 1 has it.
        optimizer: what steps, to be kept from stepping where an exchange was not taken. If it is plain SGD the error
            memory follows its learning rates, so that y = x - eta e does not jump; with any other it stays as it is.
        scaler: the GradScaler whose scale is in the gradients; the error memory is then kept without it.
        monitor_every: measure `contraction` every so many steps; 0 never does.
        max_skipped: raise NonFiniteError in the backward pass after more than so many exchanges in a row that were not
            taken; None never does, and lets `optimizer` have their NaNs.
        compare_every: every so many steps workers compare fingerprints of the parameters, 8 bytes each; where one
            differs, the backward pass raises DriftError on all, with the first of them and the workers. 0 never does.

    Where a worker's gradient is not finite the exchange is not taken: error memories, noise and step count stay as they
    were, and every worker finds a NaN in its gradients, so that scalers skip the step on all of them together. It is
    logged by the worker whose it was, with the name of the parameter (on a CPU), and entered in `hook.skips`.
    If gradients are computed and the hook is never called (the model is run past DistributedDataParallel, as
    `model.module(x)`), the next forward pass raises RuntimeError.

    Raises TypeError or ValueError for bad arguments, also if workers differ in them, RuntimeError for a second hook.
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(
            f"model must be a DistributedDataParallel, got {type(model).__name__}: wrap the model first, "
            f"or, where a framework has wrapped it, see packsaddle.attach"
        )
    rules = Rules(
        compressor,
        exchange,
        back,
        scope,
        error_feedback,
        start_step,
        seed=as_seed(seed),
        max_skipped=max_skipped,
        compare_every=compare_every,
    )
    _check_types(optimizer, scaler)
    optimizer = _innermost(optimizer)
    monitor = Every(monitor_every)
    named = [(name, p) for name, p in model.module.named_parameters() if p.requires_grad]
    found = places(named, dense_below)
    _check_sizes(found, rules, dense_below, model.process_group.size())
    channel, rates = Channel(group_beside(model), Ledger()), Rates(optimizer, found)
    scale = (lambda: 1.0) if scaler is None else scaler.get_scale
    hook = DDPHook(model.module, channel, rules, found, noise, rates, scale, monitor)
    if escape is not None:
        checker = EscapeAfterStep(escape, hook, optimizer, found, rates, dense_below=dense_below, seed=rules.seed)
        hook.parts["escape"] = checker
    same: dict[str, object] = {
        "rules": rules,
        "noise": noise,
        "escape": escape,
        "dense_below": dense_below,
        "lr": rates.now(),
    }
    same |= {place.name: (tuple(place.parameter.shape), place.parameter.dtype) for place in found}
    check_agreement(channel, same, found[0].parameter.device)
    if optimizer is not None:
        hook.protect(optimizer)
    on_buckets(model, hook)
    _guard(model, hook)
    return hook


def _innermost(optimizer: Optimizer | None) -> Optimizer | None:
    """The optimizer that steps, in what a framework has wrapped around it (Accelerate's has no hooks of its own)."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def _check_types(optimizer: Optimizer | None, scaler: torch.amp.GradScaler | None) -> None:
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")


def _check_sizes(found: list[Place], rules: Rules, dense_below: int, workers: int) -> None:
    """Raise ValueError if the compressor cannot act on the model, before a step finds out."""
    for place in found:
        if not place.parameter.is_floating_point():
            raise ValueError(f"parameters must be floating point, but {place.name} is {place.parameter.dtype}")
    compressed = [place for place in found if not place.dense]
    compressor, d = rules.at(rules.start_step), sum(place.size for place in compressed)
    warn_of_nothing(compressor, d, dense_below, stacklevel=3)
    shapes = [place.parameter.shape for place in compressed]
    choose(compressor.for_tensors(shapes), rules.exchange, d=d, dense=1, workers=workers, back=rules.back)


def attach(model: nn.Module, *arguments: Any, **options: Any) -> DDPHook | None:
    """`register_ddp_hook` for what a framework made of a model, and a guard against a hook that is never called.

    The one DistributedDataParallel in `model` is found, through torch.compile and other wrappers. If there is none and
    one worker, there is nothing to exchange, and None is returned.
    Raises TypeError if there is no DistributedDataParallel, or more than one, among several workers.
    """
    found = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    if not found and is_sharded(model):
        raise TypeError(
            "model is sharded by FSDP, whose gradients are already reduced over workers when its hooks see them; "
            "see packsaddle.register_fsdp_hook"
        )
    if not found and resolve(None).size == 1:
        if options.get("noise") or options.get("escape") is not None:
            warnings.warn("there is one worker and no exchange, so no noise and no escape check either", stacklevel=2)
        return None
    if len(found) != 1:
        raise TypeError(
            f"model must have one DistributedDataParallel in it, got {type(model).__name__} with {len(found)}; "
            f"attach after the framework has wrapped the model"
        )
    return register_ddp_hook(found[0], *arguments, **options)


def _guard(model: DistributedDataParallel, hook: DDPHook) -> None:
    """Raise at a forward pass if gradients came before it that should have gone through the hook and did not."""
    last = [p for p in model.module.parameters() if p.requires_grad][-1]
    missed = False

    def on_gradient(_: Tensor) -> None:
        nonlocal missed
        missed = missed or model.require_backward_grad_sync

    def on_forward(module: nn.Module, _: Any) -> None:
        if hook.calls:
            for handle in handles:
                handle.remove()
        elif missed:
            raise RuntimeError(
                "gradients were computed, but DistributedDataParallel never called the hook: workers train apart. "
                "Is the model run as model.module, or wrapped again by a framework? attach to what is really run"
            )

    handles = [
        last.register_post_accumulate_grad_hook(on_gradient),
        model.module.register_forward_pre_hook(on_forward),
    ]
