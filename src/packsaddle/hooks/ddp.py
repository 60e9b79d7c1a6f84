"""Compressed exchange of gradients for DistributedDataParallel, with any optimizer. A training script needs two more
lines.

`register_ddp_hook` and `attach` return a `DDPHook` (see `ddp_hook`). `keep_gradients_local` disables the exchange of
gradients by DistributedDataParallel, for use with `LocalUpdates`.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from packsaddle.comm.communicator import Communicator, check_agreement
from packsaddle.comm.group import TorchGroup, same_workers, training_group
from packsaddle.comm.ledger import Ledger
from packsaddle.comm.select_aggregator import choose, warn_if_nothing_compressed
from packsaddle.compressors import Rounded
from packsaddle.errors import suggests
from packsaddle.feedback.compression import AnyCompression, Compression
from packsaddle.feedback.exchanging import register_hook
from packsaddle.feedback.noise import Noise
from packsaddle.feedback.optimizers import as_optimizers, check_scaler, parameters_of
from packsaddle.feedback.slices import Place, places, strides_of_view
from packsaddle.hooks.ddp_hook import Bucket, DDPHook
from packsaddle.hooks.fsdp import uses_fsdp
from packsaddle.hooks.hook import HookOptions, Scope
from packsaddle.numerics.kernels import arithmetic
from packsaddle.numerics.seeds import as_seed
from packsaddle.options.agreement import agreement


@suggests(compression="compressor", error_feedback="compressor", optimizers="optimizer", start_iter="start_step")
def register_ddp_hook(
    model: DistributedDataParallel,
    compressor: AnyCompression = Rounded("int4"),  # noqa: B008 -- immutable
    *,
    noise: float | Callable[[int], float] | Noise = 0.0,
    start_step: int = 0,
    seed: int = 0,
    scope: Scope = "bucket",
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> DDPHook:
    """Average the gradients of a DistributedDataParallel with compression, noise and error feedback; collective.

    After a backward pass, the gradient p.grad of each parameter is the mean of the workers' messages, identical on all
    workers. Any optimizer may apply it. With plain SGD, a constant learning rate and scope="model", every step equals a
    step of `CompressedSGD` with eager noise.

    Args:
        model: a DistributedDataParallel without a communication hook.
        compressor: C, or a function of the step that returns it, or a `Compression`, which also sets how messages are
            averaged, which tensors are sent uncompressed and which checks are made.
        noise: the artificial noise, as in `CompressedSGD`, but not lazy.
        start_step: the number of initial steps, which are exchanged uncompressed.
        seed: seed of all shared randomness; identical on all workers.
        scope: the vectors that are compressed. "bucket": each of DDP's buckets, during the backward pass. "model": the
            whole model as one vector, at the end of the backward pass, as in Algorithm 1.
        optimizer: the optimizer of the model, or a list such as [muon, adamw]; their steps are skipped after a rejected
            exchange. Together they must train all parameters of the model.
        scaler: the GradScaler that scales the gradients; the error memory is kept unscaled.

    If a worker's gradient is invalid, all workers reject the exchange. Error memories, noise and step count are rolled
    back. The gradients of the bucket (or of the model, see `scope`) become NaN on every worker, so that the GradScalers
    of all workers skip the step. The worker with the invalid gradient logs the name of the parameter, if it is on a
    CPU, and `hook.skips` records the step. More than `max_skipped` consecutive rejected steps raise NonFiniteError in
    the backward pass. With max_skipped=None the number of rejected steps has no limit, and `optimizer` gets the NaNs.

    If a comparison finds that parameters differ between workers, all workers raise DriftError. If gradients are
    computed without a call of the hook, the next forward pass raises RuntimeError. That is the case if the model runs
    without its DistributedDataParallel, as in `model.module(x)`.

    Raises TypeError or ValueError if an argument is invalid or differs between workers. Raises RuntimeError if the
    model already has a communication hook, or if its parameters were frozen or unfrozen after DistributedDataParallel
    was made.

    >>> import torch
    >>> import torch.distributed as dist
    >>> import packsaddle
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> hook = packsaddle.register_ddp_hook(model, optimizer=optimizer)
    >>> model(torch.rand(8, 64)).square().mean().backward()
    >>> optimizer.step()
    >>> hook.steps, hook.skipped, hook.ledger.total.sent, sorted(hook.memory())
    (1, 0, 0, ['bias', 'weight'])
    >>> dist.destroy_process_group()
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(
            f"model must be a DistributedDataParallel, got {type(model).__name__}: wrap the model first, "
            f"or, where a framework has wrapped it, see packsaddle.attach"
        )
    # Validate the options: first each option alone, and then all options for this model.
    spec = Compression.of(compressor)
    rules = HookOptions(spec, Noise.of(noise), scope, start_step, as_seed(seed))
    check_scaler(scaler)
    optimizers = () if optimizer is None else as_optimizers(optimizer)
    named = [(name, p) for name, p in model.module.named_parameters() if p.requires_grad]
    _check_trained(model, [name for name, _ in named])
    found = places(named, spec.dense_below)
    _check_sizes(found, rules, model.process_group.size())
    trained = {id(p) for p in parameters_of(optimizers)}
    if optimizers and (missing := [name for name, p in named if id(p) not in trained]):
        raise ValueError(f"optimizer must have all parameters of the model, and lacks {missing[0]}")
    # Make the hook. It executes lines 9-12 of Algorithm 1 in the backward pass.
    device = next(model.parameters()).device
    channel = Communicator(TorchGroup(same_workers(model.process_group, device)), Ledger())
    hook = DDPHook(model.module, channel, rules, found, scaler)
    if model.find_unused_parameters:
        hook.record_use()
    # Options and parameters must match on all workers.
    same = {**agreement(rules), "lr": [float(group["lr"]) for each in optimizers for group in each.param_groups]}
    same["arithmetic"] = arithmetic(found[0].parameter.device)
    same |= {place.name: (tuple(place.parameter.shape), place.parameter.dtype) for place in found}
    check_agreement(channel, same, found[0].parameter.device)
    # After a rejected exchange the gradients are NaNs, which no optimizer should apply.
    for each in optimizers:
        hook.protect(each)
    on_buckets(model, hook)
    register_hook(hook, (place.parameter for place in found))
    _guard(model, hook)
    return hook


def attach(model: nn.Module, *arguments: Any, **options: Any) -> DDPHook | None:
    """Register the hook of `register_ddp_hook` on the DistributedDataParallel in a model that a framework has wrapped.

    The DistributedDataParallel may be inside torch.compile and other wrappers. `arguments` and `options` are passed to
    `register_ddp_hook`. Returns None if there is only one worker and no DistributedDataParallel, since nothing is
    exchanged then.

    Raises TypeError if the model has several DistributedDataParallels, if it has none although there are several
    workers, or if FSDP shards it. Raises RuntimeError if a launcher has set WORLD_SIZE above 1 and there is no process
    group. Also raises the errors of `register_ddp_hook`.

    >>> import torch
    >>> import packsaddle
    >>> hook = packsaddle.attach(torch.nn.Linear(4, 4), packsaddle.TopK(0.1))
    >>> hook is None
    True
    """
    found = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    if not found and uses_fsdp(model):
        raise TypeError(
            "model is sharded by FSDP, whose gradients are already reduced over workers when its hooks see them; "
            "see packsaddle.register_fsdp_hook"
        )
    # One worker has nothing to exchange. Do not raise an error, so that the same script runs on one worker.
    if not found and training_group(None).size == 1:
        if options.get("noise"):
            warnings.warn("there is one worker and no exchange, so no noise either", stacklevel=3)
        return None
    if len(found) != 1:
        raise TypeError(
            f"model must have one DistributedDataParallel in it, got {type(model).__name__} with {len(found)}; "
            f"attach after the framework has wrapped the model"
        )
    return register_ddp_hook(found[0], *arguments, **options)


def keep_gradients_local(model: nn.Module) -> None:
    """Disable the exchange of gradients and buffers in every DistributedDataParallel of a model, for `LocalUpdates`.

    Use it with frameworks that wrap every model in a DistributedDataParallel. Each worker then keeps its own gradients
    and its own buffers, such as running statistics. Raises RuntimeError for a DistributedDataParallel that has a
    communication hook already.

    >>> import torch
    >>> import torch.distributed as dist
    >>> import packsaddle
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))
    >>> packsaddle.keep_gradients_local(model)
    >>> local = packsaddle.LocalUpdates(torch.optim.AdamW(model.parameters()), every=30)
    >>> dist.destroy_process_group()
    """

    def own(bucket: Bucket) -> Future[Tensor]:
        future: Future[Tensor] = Future()
        future.set_result(bucket.buffer)
        return future

    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            on_buckets(module, own)
            # Do not broadcast buffers. Otherwise each forward pass would wait for the buffers of rank 0.
            module.broadcast_buffers = False


def on_buckets(model: DistributedDataParallel, take: Callable[[Bucket], "Future[Tensor]"]) -> None:
    """Register the function `take` as the communication hook of a model.

    DDP's backward pass calls `take` with one `Bucket` at a time, and `take` returns a future of its mean gradients.
    Raises RuntimeError if the model already has a communication hook.
    """

    def hook(take: Callable[[Bucket], Future[Tensor]], bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
        parameters, gradients = bucket.parameters(), bucket.gradients()
        if bucket.buffer().layout is torch.strided:
            # torch's views of a bucket have contiguous strides, but the elements of a gradient are in the memory order
            # of its parameter. Make views with the strides of the parameters.
            pairs = zip(gradients, parameters, strict=True)
            gradients = [g.as_strided(p.shape, strides_of_view(p), g.storage_offset()) for g, p in pairs]
        return take(Bucket(bucket.index(), bucket.is_last(), bucket.buffer(), gradients, parameters))

    try:
        model.register_comm_hook(take, hook)
    except RuntimeError as error:
        if "can only be called once" not in str(error):
            raise
        raise RuntimeError(
            "this DistributedDataParallel already has a communication hook, and supports only one; for another hook, "
            "wrap model.module in a new DistributedDataParallel"
        ) from error


def _check_trained(model: DistributedDataParallel, trained: Sequence[str]) -> None:
    """Raise RuntimeError if parameters of the model were frozen or unfrozen after the DistributedDataParallel was made.

    The DistributedDataParallel exchanges the gradients of the parameters that were trainable then. `trained` are the
    names of those that are trainable now.
    """
    logged: Callable[[], dict[str, Any]] = model._get_ddp_logging_data
    exchanged = int(logged()["num_parameter_tensors"])
    now = sum(name not in model.parameters_to_ignore for name in trained)
    if now != exchanged:
        raise RuntimeError(
            f"DistributedDataParallel exchanges {exchanged} parameters, but {now} are trainable now: freeze and "
            f"unfreeze parameters before you make DistributedDataParallel"
        )


def _check_sizes(found: list[Place], rules: HookOptions, workers: int) -> None:
    """Raise ValueError if a parameter is not floating-point, or if the compressor or the exchange does not support
    vectors of the model's size.

    Warns if no tensor would be compressed. `found` has the `Place` of each trained parameter. Call before the first
    step.
    """
    for place in found:
        if not place.parameter.is_floating_point():
            raise ValueError(f"parameters must be floating point, but {place.name} is {place.parameter.dtype}")
    compressed = [place for place in found if not place.dense]
    compressor, d = rules.at(rules.start_step), sum(place.size for place in compressed)
    spec = rules.compression
    warn_if_nothing_compressed(compressor, d, spec.dense_below, stacklevel=4)
    shapes = [place.parameter.shape for place in compressed]
    choose(compressor.for_tensors(shapes), spec.exchange_of(compressor), d=d, dense=1, workers=workers, back=spec.back)


def _guard(model: DistributedDataParallel, hook: DDPHook) -> None:
    """Register a check on a model's forward pass. It raises RuntimeError if gradients were computed in an earlier
    backward pass without a call of `hook`, i.e. without an exchange.

    The check is removed as soon as the hook was called once.
    """
    # Remove the guards of an earlier DistributedDataParallel of the same module.
    for handle in _guards.pop(model.module, ()):
        handle.remove()
    # The gradient of one parameter suffices to detect that a backward pass ran. A pass within no_sync does not count,
    # since DDP exchanges nothing in it.
    last = [p for p in model.module.parameters() if p.requires_grad][-1]
    missed, synchronized = False, True

    def on_gradient(_: Tensor) -> None:
        nonlocal missed
        missed = missed or synchronized

    def on_forward(module: nn.Module, _: Any) -> None:
        nonlocal synchronized
        # Read the attribute in the forward pass, as DDP does.
        synchronized = model.require_backward_grad_sync
        # One call of the hook proves that DistributedDataParallel uses it, so the check is no longer needed.
        if hook.calls:
            for handle in handles:
                handle.remove()
        elif missed:
            raise RuntimeError(
                "gradients were computed, but DistributedDataParallel never called the hook: workers train apart. "
                "Is the model run as model.module, or wrapped again by a framework? attach to what is really run"
            )

    handles = [last.register_post_accumulate_grad_hook(on_gradient), model.module.register_forward_pre_hook(on_forward)]
    _guards[model.module] = handles


# Handles of the torch hooks that `_guard` has registered, by the module inside DistributedDataParallel.
_guards: WeakKeyDictionary[nn.Module, list[RemovableHandle]] = WeakKeyDictionary()
