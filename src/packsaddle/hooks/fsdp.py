"""Averaging of gradients over the replicas of an FSDP2 model: uncompressed within a machine, and compressed between
machines.

The model is sharded by `fully_shard` over the workers of one machine, and each machine has a replica of it. In a
backward pass FSDP first reduces gradients within the machine. It then calls a hook with this worker's shard of the
gradient, and the hook averages this shard over the workers that have the same shard on other machines.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from packsaddle.comm.communicator import Communicator, check_agreement
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
from packsaddle.numerics.devices import check_not_capturing
from packsaddle.numerics.finite import fill_where
from packsaddle.numerics.kernels import arithmetic
from packsaddle.numerics.seeds import as_seed, mix
from packsaddle.options.agreement import agreement


def uses_fsdp(model: nn.Module) -> bool:
    # Do not import FSDP here, since the import is slow. If the model uses FSDP, the module is already loaded.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kinds = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel) if fsdp else ()
    return any(isinstance(m, kinds) for m in model.modules())


def sharded_modules(model: nn.Module) -> list[tuple[str, Any]]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [(name, m) for name, m in model.named_modules() if fsdp and isinstance(m, fsdp.FSDPModule)]


def local_shards(model: nn.Module, *, gradients: bool = False) -> list[tuple[str, Tensor]]:
    """Return a pair (name, this worker's shard) for each parameter that FSDP2 shards.

    If `gradients` is True, the shards are those of the gradients, and parameters without a gradient are left out. Call
    outside of forward and backward passes, in which parameters are not sharded.
    """
    found: list[tuple[str, Tensor]] = []
    for name, p in model.named_parameters():
        sharded: Any = p.grad if gradients else p.detach()
        if hasattr(sharded, "to_local"):
            found.append((name, sharded.to_local()))
    return found


def padded_size(model: nn.Module) -> int:
    """Return the number of coordinates in this worker's shards of all gradients, padding included.

    FSDP2 pads the shards of a gradient in dimension 0, so that they have the same length on all workers.
    """
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
    """The hook of `register_fsdp_hook`: it averages the gradients of each sharded module separately.

    Each module has its own error memory. A backward pass with an invalid gradient is rejected on all replicas of the
    shard, as described in `register_fsdp_hook`.
    """

    def __init__(self, model: nn.Module, channel: Communicator, rules: HookOptions) -> None:
        super().__init__(channel, rules, padded_size(model))
        self.saved_state = State(
            "register_fsdp_hook",
            RULES,
            self._identity,
            self._saved_fields,
            names={"": ROOT},
            only_with=_SHARDS,
        )
        self._model = model
        # The index of this worker's shard, and the number of shards of the model.
        self.shard = int(_mesh(model).get_local_rank()), int(_mesh(model).size())
        # Binary digits of each module's index, int64[b], by the module's name; replicas compare them.
        self._bits: dict[str, Tensor] = {}
        # The modules exchanged in this backward pass: names, and the id that autograd has given to the pass.
        self._seen: dict[str, int] = {}

    @torch.no_grad()
    def start(self) -> None:
        """Broadcast rank 0's parameters to all replicas; collective.

        If the model is still on the meta device, the broadcast is deferred to the first forward pass that records
        gradients. In this pass it runs before FSDP's own hook, which replaces the shards by whole parameters.
        """
        if any(local.is_meta for _, local in local_shards(self._model)):

            def on_forward(*_: Any) -> None:
                # A forward pass that records no gradients does not count, since one replica may do an evaluation alone.
                # If weights are still on the meta device, FSDP itself raises an error.
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
                there = local.to(self.device)  # a copy only if FSDP offloads parameters to the CPU
                self.channel.broadcast(there, "start")
                if there is not local:
                    local.copy_(there)

    @torch.no_grad()
    def take(self, name: str, index: int, gradient: Tensor) -> None:
        """Average a module's shard of the gradient, `gradient`, float[n], over the replicas, in place. FSDP calls this
        method in the backward pass.

        `name` is the name of the module, and `index` its index among the sharded modules of the model.
        """
        number = torch._C._current_graph_task_id()
        if number >= 0 and self._seen.get(name) == number and self._pass:
            raise RuntimeError(
                f"{name or ROOT} is used twice in one backward pass (a block that is shared, or a model "
                f"that is called twice), and FSDP hands over its gradient in parts, which cannot be exchanged as one: "
                f"call backward() after each use"
            )
        if not self._pass or name in self._seen:  # this is the first module of a new backward pass
            check_not_capturing("the hook", gradient.device)
            self._open()
            self._seen = {}
            self._step_rates.add([self.rules.noise.at_step(self._steps)])
            # This callback runs after FSDP's own callback, which sets p.grad, since it is queued later.
            torch.autograd.Variable._execution_engine.queue_callback(self._end)
        self._seen[name] = number
        is_first = name not in self._slices
        seed = mix(self.rules.seed, index, self.shard[0])  # identical on all replicas
        part = self._slice(name, index, gradient, seed)
        self._noise = self.rules.noise.drawn(seed=seed, step=self._steps)  # line 9 of Algorithm 1
        code = self._exchange(part, {name: gradient}, [self._bits[name]])
        fill_where(gradient, (code != 0).any(), float("nan"))
        # `code` is the outcome of the exchange. To read it, the host must wait for the GPU, so read it here only in the
        # first exchange of a module. `_settle` reads the outcomes of all exchanges later.
        if (is_first or code.device.type == "cpu") and code[2]:
            self._complete()
            self._settle()

    @torch.no_grad()
    def _end(self) -> None:
        """End a backward pass.

        If one of its exchanges was rejected, set all gradients to NaN on all replicas of the shard, so that a
        GradScaler or a protected optimizer skips the step. If a comparison is due, compare the parameters of the
        replicas; collective.
        """
        if not self._pass:
            return
        bad = (torch.stack(self._codes) != 0).any()
        gradients = [gradient for _, gradient in local_shards(self._model, gradients=True)]
        # FSDP has added the gradients of this pass to p.grad, which may still have the NaNs of a rejected pass. To
        # check it, the host waits for a GPU, but only if the optimizer has made no step since that pass.
        self._fresh = not self._rejected or not any(bool(gradient.isnan().any()) for gradient in gradients)
        for gradient in gradients:
            fill_where(gradient, bad.to(gradient.device), float("nan"))
        if self._steps and self._drift.due(self._steps - 1):
            named = [(name, local.to(self.device)) for name, local in local_shards(self._model)]
            self._drift.compare(self._steps - 1, [local for _, local in named], lambda: named, self._step_rates)
        self._complete()

    @property
    def device(self) -> torch.device:
        # Use the device of the mesh. The weights may be on another one: on the CPU, if they are offloaded, or still on
        # the meta device.
        return torch.device(_mesh(self._model).device_type)

    def _slice(self, name: str, index: int, gradient: Tensor, seed: int) -> ErrorFeedback:
        if name not in self._slices:
            # The module's slice has the size of its first gradient, padding included. A `Place` needs only the shape of
            # a tensor, so a tensor on the meta device replaces the gradient.
            place = Place(name, torch.empty_like(gradient, device="meta"), dense=False, start=0)
            if name in self._loose and len(self._loose[name]) != len(gradient):
                raise RuntimeError(
                    f"the loaded error memory of {name or ROOT} has {len(self._loose[name])} coordinates, but the "
                    f"gradient has {len(gradient)}: load the state of the same model with the same sharding"
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
        """Return this worker's error memory, as a dictionary with one tensor, float[n], for each name of a sharded
        module.

        During a backward pass, the result is the error memory after the previous step.
        """
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
            as in `register_ddp_hook`, except that all tensors are compressed. Each module's shard is one message. Every
            `compare_every` steps the replicas compare their parameters, at the end of a backward pass. `max_skipped`
            limits the number of consecutive steps that the replicas of one shard skip. Steps that only other shards
            skip do not count.
        noise, start_step, seed: see `register_ddp_hook`.

    All replicas start from rank 0's parameters, which this function broadcasts. If the model is still on the meta
    device, the first forward pass that records gradients broadcasts them instead. Weights that are loaded after the
    broadcast are not overwritten.

    If a gradient, or the mean, is invalid in any module of a backward pass, the replicas of this shard reject the pass:
    they roll back error memories, noise and step count, and set all gradients to NaN. The workers with other shards do
    not detect the invalid gradient, and apply the step. A GradScaler skips the step on all shards, but the error
    memories of the other shards have then been committed. `hook.protect(optimizer)` makes an optimizer without a scaler
    skip rejected steps.

    Every backward pass that exchanges gradients must use every sharded module. If the replicas of a shard exchange
    different modules of the same size with each other, the pass raises RuntimeError on all of them.

    Raises TypeError if the model is not sharded. Raises ValueError if its mesh has two dimensions, or if an argument is
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
    # A flat shard contains parts of tensors, so no whole tensor can be sent uncompressed, or be compressed as a matrix.
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
    # Options must match on all replicas of the shard.
    same = {**agreement(rules), "modules": [name for name, _ in modules], "shard": hook.shard}
    same["arithmetic"] = arithmetic(hook.device)
    same |= {name: (tuple(local.shape), local.dtype) for name, local in local_shards(model)}
    check_agreement(channel, same, hook.device)
    choose(first, spec.exchange_of(first), d=padded_size(model), dense=1, workers=channel.group.size, back=spec.back)
    hook.start()
    for index, (name, module) in enumerate(modules):
        # Let FSDP reduce unused parameters too, so that a shard of the gradient always contains the same parameters.
        if hasattr(module, "set_reduce_scatter_unused_params"):
            module.set_reduce_scatter_unused_params(True)
        module.set_all_reduce_hook(partial(hook.take, name, index))
    return hook
