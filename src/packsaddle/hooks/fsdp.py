"""Averaging of gradients over replicas of an FSDP2 model: uncompressed in a machine, compressed between machines.

`fully_shard` on a mesh of one machine reduces gradients within the machine, and then calls a hook with this worker's
shard of the gradient. The hook averages this shard over the workers that have the same shard on other machines.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from packsaddle.comm.communicator import Communicator, check_agreement
from packsaddle.comm.devices import check_not_capturing
from packsaddle.comm.group import ProcessGroup, resolve
from packsaddle.comm.ledger import Ledger
from packsaddle.comm.select_aggregator import choose
from packsaddle.compressors import Rounded
from packsaddle.errors import suggests
from packsaddle.feedback.compression import AnyCompression, Compression
from packsaddle.feedback.exchanging import Exchanging
from packsaddle.feedback.guard import ROOT
from packsaddle.feedback.noise import Noise
from packsaddle.feedback.round import ErrorFeedback
from packsaddle.feedback.slices import Place, Slice
from packsaddle.feedback.state import ANY, State, Value, Vector
from packsaddle.hooks.hook import RULES, GradientHook, HookOptions
from packsaddle.numerics.finite import fill_where
from packsaddle.numerics.kernels import arithmetic
from packsaddle.numerics.seeds import as_seed, mix
from packsaddle.options.agreement import agreement


def uses_fsdp(model: nn.Module) -> bool:
    # Do not import FSDP, since that is slow. If FSDP is in use, its module is already loaded.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kinds = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel) if fsdp else ()
    return any(isinstance(m, kinds) for m in model.modules())


def sharded_modules(model: nn.Module) -> list[tuple[str, Any]]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [(name, m) for name, m in model.named_modules() if fsdp and isinstance(m, fsdp.FSDPModule)]


def local_shards(model: nn.Module, *, gradients: bool = False) -> list[tuple[str, Tensor]]:
    """Return a pair (name, local shard) for every parameter that FSDP2 shards, or with `gradients` for every gradient
    of such a parameter.

    Call outside of forward and backward passes, in which parameters are unsharded.
    """
    found: list[tuple[str, Tensor]] = []
    for name, p in model.named_parameters():
        sharded: Any = p.grad if gradients else p.detach()
        if hasattr(sharded, "to_local"):
            found.append((name, sharded.to_local()))
    return found


def padded_size(model: nn.Module) -> int:
    """Return the number of coordinates of this worker's gradient shards. FSDP2 pads shards in dimension 0 to equal
    length on all workers; the result includes the padding."""
    shards, found = int(_mesh(model).size()), 0
    for p in model.parameters():
        if hasattr(p, "to_local") and p.requires_grad:
            rows = p.shape[0] if p.ndim else 1
            found += -(-rows // shards) * (p.numel() // max(rows, 1))
    return found


def _mesh(model: nn.Module) -> Any:
    return next(p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh"))


_OTHERS = (
    "an FSDP hook's error memories go back to as many workers as they came from; otherwise leave the state out, and "
    "the hook begins with empty ones"
)
_SHARDS = {"replicas": _OTHERS, "shards": _OTHERS}


class FSDPHook(GradientHook, Exchanging):
    """The hook of `register_fsdp_hook`. The gradients of each sharded module are averaged separately, and each module
    has its own error memory.

    A backward pass with an invalid gradient is rejected on all replicas of the shard, as described in
    `register_fsdp_hook`.
    """

    def __init__(self, model: nn.Module, channel: Communicator, rules: HookOptions) -> None:
        super().__init__(channel, rules, padded_size(model))
        self.saved_state = State(
            *("register_fsdp_hook", RULES, self._identity, self._saved_fields), names={"": ROOT}, only_with=_SHARDS
        )
        self._model = model
        # Index of this worker's shard, and the number of shards.
        self.shard = int(_mesh(model).get_local_rank()), int(_mesh(model).size())
        self._bits: dict[str, Tensor] = {}  # binary digits of the index of each module, int64[b], by name
        # The modules exchanged in this backward pass, by name. Each value is the id that autograd gives to the pass.
        self._seen: dict[str, int] = {}

    @torch.no_grad()
    def start(self) -> None:
        """Broadcast rank 0's parameters to all replicas; collective.

        For a model on the meta device, the broadcast happens in the first forward pass with gradients. It runs before
        FSDP's own hook in this pass, since that hook replaces the shards by whole parameters.
        """
        if any(local.is_meta for _, local in local_shards(self._model)):

            def on_forward(*_: Any) -> None:
                # Wait for a forward pass with gradients, since one replica may evaluate alone without them. FSDP itself
                # raises an error for weights that are still on the meta device.
                if torch.is_grad_enabled() and not any(local.is_meta for _, local in local_shards(self._model)):
                    for handle in handles:
                        handle.remove()
                    self.start()

            modules = (self._model, *(module for _, module in sharded_modules(self._model)))
            called = {id(module): module for module in modules}.values()
            handles = [module.register_forward_pre_hook(on_forward, prepend=True) for module in called]
            return
        for _, local in local_shards(self._model):
            if local.numel():
                there = local.to(self.device)  # this copies only if FSDP offloads to the CPU
                self.channel.broadcast(there, "start")
                if there is not local:
                    local.copy_(there)

    @torch.no_grad()
    def take(self, name: str, index: int, gradient: Tensor) -> None:
        """Average the `gradient` of a module's shard, float[n], over the replicas, in place.

        FSDP calls it in the backward pass, with the `name` of the module and its `index` among the sharded modules.
        """
        number = torch._C._current_graph_task_id()
        if number >= 0 and self._seen.get(name) == number and self._pass:
            raise RuntimeError(
                f"{name or ROOT} is used twice in one backward pass (a block that is shared, or a model "
                f"that is called twice), and FSDP hands over its gradient in parts, which cannot be exchanged as one: "
                f"call backward() after each use"
            )
        if not self._pass or name in self._seen:  # a new pass begins
            check_not_capturing("the hook", gradient.device)
            self._open()
            self._seen = {}
            # FSDP adds this pass's gradients to those of earlier passes, which are not exchanged again.
            self._fresh = all(p.grad is None for p in self._model.parameters())
            self._step_rates.add([self.rules.noise.at_step(self._steps)])
            # A callback queued here runs after FSDP's own callback, which sets the gradients of parameters.
            torch.autograd.Variable._execution_engine.queue_callback(self._end)
        self._seen[name] = number
        is_first = name not in self._slices
        seed = mix(self.rules.seed, index, self.shard[0])  # identical on all replicas
        part = self._slice(name, index, gradient, seed)
        self._noise = self.rules.noise.drawn(seed=seed, step=self._steps)  # line 9 of Algorithm 1
        code = self._exchange(part, {name: gradient}, [self._bits[name]])
        fill_where(gradient, (code != 0).any(), float("nan"))
        # Reading `code`, the outcome of the exchange, waits for the GPU, so read it here only in a module's first
        # exchange. `_settle` later reads the outcomes of all exchanges.
        if (is_first or code.device.type == "cpu") and code[2]:
            self._complete()
            self._settle()

    @torch.no_grad()
    def _end(self) -> None:
        """End a backward pass. If one of its exchanges was rejected, set all gradients to NaN on all replicas, so that
        a GradScaler or a protected optimizer skips the step."""
        if not self._pass:
            return
        bad = (torch.stack(self._codes) != 0).any()
        for _, gradient in local_shards(self._model, gradients=True):
            fill_where(gradient, bad.to(gradient.device), float("nan"))
        if self._steps and self._drift.due(self._steps - 1):
            named = [(name, local.to(self.device)) for name, local in local_shards(self._model)]
            self._drift.compare(self._steps - 1, [local for _, local in named], lambda: named, self._step_rates)
        self._complete()

    @property
    def device(self) -> torch.device:
        # Use the mesh's device and not that of the weights, which may be offloaded to the CPU or still on the meta
        # device.
        return torch.device(_mesh(self._model).device_type)

    def _slice(self, name: str, index: int, gradient: Tensor, seed: int) -> ErrorFeedback:
        if name not in self._slices:
            # The first gradient of a module has the size of the module's slice, padding included. Only the shape of the
            # gradient is used, so its substitute is a tensor on the meta device.
            place = Place(name, torch.empty_like(gradient, device="meta"), dense=False, start=0)
            if name in self._loose and len(self._loose[name]) != len(gradient):
                raise RuntimeError(
                    f"the error of {name or ROOT} that was loaded has {len(self._loose[name])} "
                    f"coordinates, and its gradient {len(gradient)}: is it another model, or sharded otherwise?"
                )
            self._sizes[name] = gradient.nbytes
            width = (len(sharded_modules(self._model)) - 1).bit_length()
            self._bits[name] = torch.tensor([index >> i & 1 for i in range(width)], device=gradient.device)
            self._slices[name] = self._feedback(Slice([place], gradient.device), seed)
        if self._slices[name].slice.d != len(gradient):
            raise RuntimeError(
                f"{name or 'the model'} came with {len(gradient)} coordinates, and with "
                f"{self._slices[name].slice.d} before: parameters were frozen or unfrozen, or had no gradient"
            )
        return self._slices[name]

    @torch.no_grad()
    def memory(self) -> dict[str, Tensor]:
        """Return this worker's error memory for each sharded module, float[n], by name of the module. During a backward
        pass, the result is the memory after the previous step."""
        self._settle()
        return self._loose | {name: part.memory.vector.clone() for name, part in self._slices.items()}

    def _saved_fields(self) -> list[Vector | Value]:
        shapes: dict[Any, torch.Size | None] = {name: None for name, _ in sharded_modules(self._model)}
        shapes |= {name: torch.Size([part.slice.d]) for name, part in self._slices.items()}
        return [*super()._saved_fields(), Vector(("error", ANY), shapes, self.memory, self._load_errors)]

    def _identity(self) -> dict[str, int]:
        group, (shard, shards) = self.channel.group, self.shard
        found = {"seed": self.rules.seed, "replica": group.rank, "replicas": group.size}
        return found | {"shard": shard, "shards": shards}


@suggests(compression="compressor", error_feedback="compressor", process_group="replicas", start_iter="start_step")
def register_fsdp_hook(
    model: nn.Module,
    replicas: ProcessGroup,
    compressor: AnyCompression = Rounded("int4"),  # noqa: B008 -- immutable
    *,
    noise: float | Callable[[int], float] | Noise = 0.0,
    start_step: int = 0,
    seed: int = 0,
) -> FSDPHook:
    """Average the gradients of a `fully_shard` model over its replicas, with compression and error feedback;
    collective.

    Args:
        model: a model sharded by `torch.distributed.fsdp.fully_shard` on a mesh of one dimension, such as the GPUs of
            one machine.
        replicas: the group of the workers that have the same shard, one on each machine:
            mesh["replicate"].get_group() of a two-dimensional mesh.
        compressor: C for the flat shards of all modules, or a function of the step that returns it, or a `Compression`
            as in `register_ddp_hook`, except that all tensors are compressed. Each module's shard is one message; TopK
            and AdaptiveTopK divide their budget among all modules, as among DDP's buckets. Parameters are compared at
            the end of a backward pass; each shard counts its own skipped steps.
        noise, start_step, seed: see `register_ddp_hook`.

    Replicas start from rank 0's parameters, which are broadcast here or, if the model is still on the meta device, in
    the first forward pass that records gradients; weights loaded later are not overwritten.

    If a gradient, or the mean, is invalid in any module of a backward pass, the pass is rejected: error memories, noise
    and step count are rolled back, and all gradients are set to NaN on all replicas of the shard. Other shards do not
    detect it and apply the step. A GradScaler skips the step on all shards, but the error memories of other shards have
    been committed. `hook.protect(optimizer)` makes an optimizer without a scaler skip rejected steps. Every sharded
    module must be part of every backward pass that exchanges. A pass raises RuntimeError on all replicas of the shard
    if they reduce different modules of one size.

    Raises TypeError if the model is not sharded, and ValueError if its mesh has two dimensions, or if an argument is
    out of range or differs between workers.

    >>> import torch
    >>> import torch.distributed as dist
    >>> import packsaddle
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> mesh = dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
    >>> model = dist.fsdp.fully_shard(torch.nn.Linear(64, 64), mesh=mesh["shard"])
    >>> hook = packsaddle.register_fsdp_hook(model, mesh.get_group("replicate"), packsaddle.TopK(0.1))
    >>> model(torch.rand(8, 64)).square().mean().backward()
    >>> int((hook.memory()[""] == 0).sum())  # of the root module's 4,160 coordinates 10% were sent
    416
    >>> model(torch.full((8, 64), torch.nan)).square().mean().backward()  # a pass that all replicas reject
    >>> hook.steps, hook.skips[0].parameter, bool(model.weight.grad.to_local().isnan().all())
    (1, 'the root module', True)
    >>> dist.destroy_process_group()
    """
    modules = sharded_modules(model)
    if not modules:
        raise TypeError(f"model must have been sharded by fully_shard, got {type(model).__name__}")
    mesh = _mesh(model)
    if mesh.ndim != 1:
        raise ValueError(
            f"model must be sharded on a mesh of one dimension, got {mesh.ndim}: with two, FSDP has averaged over the "
            f"replicas before its hook is called"
        )
    spec = Compression.of(compressor)
    rules = HookOptions(spec, Noise.of(noise), "bucket", start_step, as_seed(seed))
    # Flat shards cut tensors, so no whole tensor can be sent uncompressed, or compressed as a matrix.
    if spec.dense_below not in (0, Compression.dense_below):
        raise ValueError(
            f"dense_below is for whole tensors, and flat shards are compressed as they are, got {spec.dense_below}"
        )
    first = rules.at(start_step)
    if first.needs_tensors:
        raise ValueError(
            f"compressor must act on flat shards, in which tensors are cut, and {first!r} needs whole ones"
        )
    channel = Communicator(resolve(replicas), Ledger())
    hook = FSDPHook(model, channel, rules)
    # Options must match on all replicas of the shard, which start from the same parameters.
    same = {**agreement(rules), "modules": [name for name, _ in modules], "shard": hook.shard}
    same["arithmetic"] = arithmetic(hook.device)
    same |= {name: (tuple(local.shape), local.dtype) for name, local in local_shards(model)}
    check_agreement(channel, same, hook.device)
    choose(first, spec.exchange_of(first), d=padded_size(model), dense=1, workers=channel.group.size, back=spec.back)
    hook.start()
    for index, (name, module) in enumerate(modules):
        # Reduce unused parameters too, so that the layout of a shard does not change.
        if hasattr(module, "set_reduce_scatter_unused_params"):
            module.set_reduce_scatter_unused_params(True)
        module.set_all_reduce_hook(partial(hook.take, name, index))
    return hook
