"""Trainings on the CPU and on a pretended device: their parameters, and the events on the device in each step.

Trainings on the CPU use torch's loops, as those on a device do. So results are bitwise identical, except if the device
draws different random numbers. Functions below "In child processes" are called by `run_in_processes`.
"""

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import leftovers
import torch
import torch.distributed as dist
from elastic_fakes import FakeManager
from pretended_device import FAULTS, Device, Kind, Log, start
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch_loops import torch_only

import packsaddle as ps
from packsaddle.comm import ManagedGroup, Solo, resolve
from packsaddle.compressors import compressors, describe

EVERY = 4  # inner steps between exchanges
STEPS = 2 * EVERY


@dataclass
class Training:
    """A model with its optimizers, and optionally its local updates and gradient scaler."""

    model: nn.Module
    optimizers: Sequence[Any]
    local: ps.LocalUpdates | None = None
    scaler: torch.amp.GradScaler | None = None


Make = Callable[[nn.Module], Training]


@dataclass
class Outcome:
    """The result of a training on one device."""

    x: Tensor = field(default_factory=lambda: torch.zeros(0))  # all parameters at the end, on the CPU
    # Numbers of times that the host waited for the device, in each of the last `EVERY` steps and in the flush.
    waits: list[int] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)  # descriptions of these waits
    faults: list[str] = field(default_factory=list)
    error: str = ""


def network(where: Any) -> nn.Module:
    rng = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 64), nn.Tanh(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 10))
    for p in model.parameters():
        p.data.uniform_(-0.2, 0.2, generator=rng)
    return model.to(where)


def batch(i: int, rank: int, where: Any) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(100 * i + rank)
    return torch.randn(8, 24, generator=rng).to(where), torch.randint(10, (8,), generator=rng).to(where)


def step(training: Training, x: Tensor, y: Tensor) -> None:
    for optimizer in training.optimizers:
        optimizer.zero_grad()
    loss = nn.functional.cross_entropy(training.model(x), y)
    scaler = training.scaler
    (loss if scaler is None else scaler.scale(loss)).backward()
    for optimizer in training.optimizers:
        optimizer.step() if scaler is None else scaler.step(optimizer)
    if scaler is not None:
        scaler.update()


def vector(model: nn.Module) -> Tensor:
    """Return this worker's local parts of all parameters as one vector, on the CPU."""
    return torch.cat([getattr(p, "_local_tensor", p).detach().cpu().reshape(-1) for p in model.parameters()])


def train(make: Make, where: Any, device: Device | None = None, rank: int = 0) -> Outcome:
    """Train for `STEPS` steps and flush, and return the outcome. If `device` is None, train on the CPU."""
    found, logs = Outcome(), []

    def recorded(act: Callable[..., None], *args: Any) -> None:
        with device.record() if device else contextlib.nullcontext(Log()) as log:
            act(*args)
        logs.append(log)

    try:
        training = make(network(where))
        for i in range(STEPS):
            recorded(step, training, *batch(i, rank, where))
        if training.local is not None:
            recorded(training.local.flush)
        found.x = vector(training.model)
    except Exception as error:
        found.error = f"{type(error).__name__}: {error}"
    shown = logs[STEPS - EVERY :]
    found.waits = [log.total("wait") for log in shown]
    found.lines = [f"step {i}: {line}" for i, log in enumerate(shown) for line in log.lines("wait")]
    found.faults = [line for log in logs for line in log.lines(*FAULTS)]
    return found


# ------------------------------------------------------------------------------------------------------ what is trained
def own(optimizer: Any, **options: Any) -> Make:
    """Return a function that makes a training with an optimizer only."""
    return lambda model: Training(model, [optimizer(model.parameters(), **options)])


def local(
    *args: Any, fused: bool | None = None, capturable: bool = False, scaled: bool = False, **options: Any
) -> Make:
    def make(model: nn.Module) -> Training:
        where = next(model.parameters()).device.type
        on_device = capturable and where != "cpu"
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=fused, capturable=on_device)
        scaler = torch.amp.GradScaler(where) if scaled else None
        wrapped = ps.LocalUpdates(optimizer, *args, **{"every": EVERY, "scaler": scaler} | options)
        return Training(model, [optimizer], wrapped, scaler)

    return make


class TorchftGloo:
    """A wrapper of a process group like torchft's with gloo: its only backend is for tensors on the CPU."""

    def __init__(self, rank: int, size: int) -> None:
        c10d: Any = dist  # its type stubs are incomplete
        store = dist.PrefixStore("torchft", c10d.distributed_c10d._get_default_store())
        backend = c10d.ProcessGroupGloo(store, rank, size, timedelta(seconds=60))
        backend._set_sequence_number_for_group()
        self._group = c10d.ProcessGroup(store, rank, size)
        self._group._set_default_backend(c10d.ProcessGroup.BackendType.GLOO)
        self._group._register_backend(torch.device("cpu"), c10d.ProcessGroup.BackendType.GLOO, backend)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def getBackendName(self) -> str:  # noqa: N802 -- torchft's name
        return "torchft-gloo"


class FakeManagedGroup(ManagedGroup):
    """The managed group of a fake Manager, over `TorchftGloo`."""

    def __init__(self, manager: FakeManager) -> None:
        self.manager, self.site = manager, Solo()
        self.renew()
        self._group = TorchftGloo(self.rank, self.size)


def elastic(model: nn.Module) -> Training:
    manager = FakeManager(resolve(None))
    workers = ps.Elastic(manager, group=FakeManagedGroup(manager), leave_on_sigterm=False)
    return local(TOPK, workers=workers)(model)


def muon(model: nn.Module) -> Training:
    matrices, rest = ([p for p in model.parameters() if (p.ndim == 2) is found] for found in (True, False))
    optimizers = [torch.optim.Muon(matrices, 1e-2), torch.optim.AdamW(rest, 1e-3)]
    return Training(model, optimizers, ps.LocalUpdates(optimizers, every=EVERY))


def ddp(
    *args: Any, hooked: bool = True, scaled: bool = False, protects: bool = True, finds: bool = False, **options: Any
) -> Make:
    """Return a function that makes a training with DistributedDataParallel, and with packsaddle's hook if `hooked`.

    With `finds` it finds unused parameters.
    """

    def make(model: nn.Module) -> Training:
        where = next(model.parameters()).device
        devices = None if where.type == "cpu" else [where.index]
        net = DistributedDataParallel(model, device_ids=devices, find_unused_parameters=finds)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        scaler = torch.amp.GradScaler(where.type) if scaled else None
        if hooked:
            protected = optimizer if protects else None
            ps.register_ddp_hook(net, *args, optimizer=protected, scaler=scaler, **options)
        return Training(net, [optimizer], None, scaler)

    return make


def fsdp(*args: Any, hooked: bool = True) -> Make:
    """Return a function that makes a training with FSDP2.

    With packsaddle's hook there are two replicas, each sharded over one process. Without it, the model is sharded over
    both processes.
    """

    def make(model: nn.Module) -> Training:
        where, names = next(model.parameters()).device.type, ("replicate", "shard")
        mesh = dist.init_device_mesh(where, (2, 1) if hooked else (1, 2), mesh_dim_names=names)
        for module in [*(layer for layer in model if isinstance(layer, nn.Linear)), model]:  # type: ignore[attr-defined]
            fully_shard(module, mesh=mesh["shard"])
        if hooked:
            ps.register_fsdp_hook(model, mesh["replicate"].get_group(), *args)
        return Training(model, [torch.optim.AdamW(model.parameters(), 1e-3)])

    return make


SGD = ps.CompressedSGD
TOPK, QSGD = ps.TopK(0.05), ps.QSGD(127)
OPTIMIZERS: dict[str, Make] = {
    "torch: SGD": own(torch.optim.SGD, lr=0.1),
    "torch: AdamW": own(torch.optim.AdamW, lr=1e-3),
    "CompressedSGD": own(SGD, lr=0.1),
    "CompressedSGD, noise": own(SGD, lr=0.1, noise=1e-3),
    "CompressedSGD, momentum": own(SGD, lr=0.1, momentum=0.9, compressor=ps.Sign(per_tensor=True)),
    "CompressedSGD, TopK": own(SGD, lr=0.1, compressor=TOPK),
    "CompressedSGD, TopK two-way": own(SGD, lr=0.1, compressor=ps.Compression(TOPK, exchange="two-way")),
    "CompressedSGD, SharedTopK": own(SGD, lr=0.1, compressor=ps.SharedTopK(0.05)),
    "CompressedSGD, QSGD": own(SGD, lr=0.1, compressor=QSGD),
    "CompressedSGD, QSGD uncoded": own(SGD, lr=0.1, compressor=ps.QSGD(127, coded=False)),
    "CompressedSGD, LowRank": own(SGD, lr=0.1, compressor=ps.LowRank(2)),
}
LOCALS: dict[str, Make] = {
    "LocalUpdates": local(),
    "LocalUpdates, fused": local(fused=True),
    "LocalUpdates, capturable": local(capturable=True),
    "LocalUpdates, GradScaler": local(scaled=True),
    "LocalUpdates, Muon and AdamW": muon,
    "LocalUpdates, outer": local(outer=ps.OuterSGD()),
    "LocalUpdates, mean_momentum": local(mean_momentum=0.5),
    "LocalUpdates, clip": local(workers=ps.Workers(clip=2.0)),
    "LocalUpdates, TopK int2": local(ps.TopK(1 / 32, values="int2")),
    "LocalUpdates, Sign two-way": local(ps.Compression(ps.Sign(), exchange="two-way")),
    "LocalUpdates, overlap": local(overlap=2),
    "LocalUpdates, overlap agreement": local(overlap=2, outer=ps.OuterAgreement()),
    "LocalUpdates, overlap TopK int2": local(ps.TopK(1 / 32, values="int2"), overlap=2),
    "LocalUpdates, overlap fragments": local(overlap=ps.Overlap(1, fragments=2)),
    "LocalUpdates, elastic": elastic,
    "LocalUpdates, offload": local(offload=True),
    "LocalUpdates, offload overlap": local(offload=True, overlap=2),
}
HOOKS: dict[str, Make] = {
    "torch: DDP": ddp(hooked=False),
    "torch: FSDP2": fsdp(hooked=False),
    "torch: DDP, GradScaler": ddp(hooked=False, scaled=True),
    "DDP hook": ddp(),
    "DDP hook, unprotected": ddp(protects=False),
    "DDP hook, find_unused_parameters": ddp(finds=True),
    "DDP hook, coded": ddp(QSGD),
    "DDP hook, uncoded": ddp(ps.QSGD(127, coded=False)),
    "DDP hook, RandomK": ddp(ps.RandomK(0.05), noise=1e-3),
    "DDP hook, TopK model": ddp(TOPK, scope="model"),
    "DDP hook, GradScaler": ddp(ps.QSGD(127, coded=False), scaled=True),
    "FSDP hook": fsdp(),
    "FSDP hook, coded": fsdp(QSGD),
    "FSDP hook, uncoded": fsdp(ps.QSGD(127, coded=False)),
}


# --------------------------------------------------------------------------------------------------- In child processes
BACKENDS = {"nccl": "nccl", "mixed": "cpu:gloo,cuda:nccl", "gloo": "gloo"}
# The cases for the backends "mixed" and "gloo". They are few, since these differ from NCCL in few places of the code.
MIXED = ("LocalUpdates", "LocalUpdates, offload", "LocalUpdates, offload overlap", "DDP hook")
GLOO = (
    *(*MIXED, "CompressedSGD, TopK", "LocalUpdates, elastic", "LocalUpdates, overlap", "DDP hook, TopK model"),
    "FSDP hook, uncoded",
)
# The cases for devices whose tensors are always exchanged through the host, where torch has no DistributedDataParallel.
STAGED = (
    *(
        "CompressedSGD, TopK",
        "CompressedSGD, QSGD uncoded",
        "LocalUpdates",
        "LocalUpdates, clip",
        "LocalUpdates, elastic",
    ),
    *("LocalUpdates, overlap", "LocalUpdates, overlap fragments", "LocalUpdates, offload"),
)
# The cases without a process group: those that run different code without a group, and on devices except CUDA.
ALONE = (
    *("torch: SGD", "torch: AdamW", "CompressedSGD, noise", "CompressedSGD, TopK two-way", "CompressedSGD, LowRank"),
    *("LocalUpdates", "LocalUpdates, capturable", "LocalUpdates, Muon and AdamW", "LocalUpdates, TopK int2"),
    *("LocalUpdates, overlap", "LocalUpdates, offload"),
)
Key = tuple[str, str]


def trained(cases: Mapping[str, Make], where: Any, device: Device | None = None, rank: int = 0) -> dict[str, Outcome]:
    return {name: train(make, where, device, rank) for name, make in cases.items()}


def together(kind: Kind, library: Path, folder: Path) -> dict[Key, Outcome]:
    """Train as one of two workers, and return the outcomes by backend and name. "cpu" stands for no device."""
    rank, device = dist.get_rank(), start(kind, library, devices=1 if kind == "mps" else 2)
    where = torch.device(kind, 0 if kind == "mps" else rank)
    torch.accelerator.set_device_index(where.index)
    cases = OPTIMIZERS | LOCALS | HOOKS
    chosen = {"nccl": tuple(cases), "mixed": MIXED, "gloo": GLOO} if kind == "cuda" else {"gloo": STAGED}
    dist.destroy_process_group()
    found: dict[Key, Outcome] = {}
    for name, names in {"cpu": tuple(cases) if kind == "cuda" else STAGED, **chosen}.items():
        backend, store = BACKENDS.get(name, "gloo"), f"file://{folder}/{name}"
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=2)
        these = {case: cases[case] for case in names}
        if name == "cpu":
            with torch_only():
                outcomes = trained(these, "cpu", rank=rank)
        else:
            outcomes = trained(these, where, device, rank)
        found |= {(name, case): outcome for case, outcome in outcomes.items()}
        if name != "gloo":  # the caller destroys the group of "gloo"
            dist.destroy_process_group()
            leftovers.forget_meshes()
    return found


def alone(kind: Kind, library: Path) -> dict[Key, Outcome]:
    """Train without a process group, and run the programs that need one process only.

    Returns the outcomes by device type and name.
    """
    dist.destroy_process_group()
    device = start(kind, library)
    found: dict[Key, Outcome] = {}
    for where in ("cpu", kind):
        with torch_only() if where == "cpu" else contextlib.nullcontext():
            on = device if where == kind else None
            outcomes = trained({name: (OPTIMIZERS | LOCALS)[name] for name in ALONE}, where, on)
            outcomes |= {describe(c): message(c, where, device) for c in compressors(0.05)}
            outcomes |= {"certify": certified(where, device), "checkpoint": resumed(where, device)}
        with torch_only():
            outcomes["RandomK without numba"] = message(ps.RandomK(0.05), where, device)
        found |= {(where, name): outcome for name, outcome in outcomes.items()}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # the caller destroys this group
    return found


def observed(device: Device, program: Callable[[], Tensor]) -> Outcome:
    """Run a program, and return the outcome with its result and the events on the device. The result is on the CPU."""
    found = Outcome()
    with device.record() as log:
        try:
            found.x = program()
        except Exception as error:
            found.error = f"{type(error).__name__}: {error}"
    found.waits, found.lines, found.faults = [log.total("wait")], log.lines("wait"), log.lines(*FAULTS)
    return found


def message(compressor: ps.Compressor, where: Any, device: Device) -> Outcome:
    """Encode a vector, decode the message as a receiver does, and return the outcome."""
    v = torch.randn(5_001, generator=torch.Generator().manual_seed(3)).to(where)
    out = torch.zeros_like(v)

    def sent() -> Tensor:
        parts = compressor.encode(v, seed=1, step=2).parts
        compressor.add_decoded(compressor.receive(parts, len(v), seed=1, step=2), out, 1.0)
        return torch.zeros(0)

    found = observed(device, sent)
    found.x = out.cpu()
    return found


def certified(where: Any, device: Device) -> Outcome:
    """Compute a certificate of a point on a device, and return the outcome."""
    model, batches = network(where), [batch(i, 0, where) for i in range(2)]

    def certificate() -> Tensor:
        search = ps.Search(generator=torch.Generator().manual_seed(5))
        made = ps.certify(model, lambda net, b: nn.functional.cross_entropy(net(b[0]), b[1]), batches, search=search)
        return torch.tensor([made.grad_norm, made.lambda_min_upper])

    return observed(device, certificate)


def resumed(where: Any, device: Device) -> Outcome:
    """Save a state in the middle of a round, and continue with new objects that load it.

    Returns the outcome, whose result is the parameters of the new objects.
    """
    make, middle = local(TOPK, mean_momentum=0.5), EVERY + 2

    def continued() -> Tensor:
        parts: list[dict[str, Any]] = []
        for steps in (range(middle), range(middle, STEPS)):
            training = make(network(where))
            parts.append({"model": training.model, "optimizer": training.optimizers[0], "local": training.local})
            if steps.start:
                assert ps.load_checkpoint(folder, parts[-1]) is not None
            for i in steps:
                step(training, *batch(i, 0, where))
            if not steps.start:
                ps.save_checkpoint(folder, parts[-1], step=middle)
        parts[-1]["local"].flush()
        return vector(parts[-1]["model"])

    with tempfile.TemporaryDirectory() as folder:
        return observed(device, continued)
