"""One adapter for each front of the engine, so that a property is stated once and checked on all fronts.

A front is a public class that trains: CompressedSGD, a hook, or LocalUpdates. A `Training` is the part of one worker: a
small network, trained on batches that are functions of (rank, t). Fronts that use torch's wrappers need real processes;
the workers of the rest are simulated. `run_on` hides the difference.
"""

import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from ddp_runs import SEVERAL
from elastic_fakes import FakeGroup, FakeManager
from specs import folded
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import packsaddle
from packsaddle import Elastic, Escape, LocalUpdates, TopK
from packsaddle.comm.group import resolve

LR = 0.1


class Spoiled(torch.autograd.Function):
    """The identity function, whose backward pass multiplies the first row of the gradient by a value."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, value: float) -> Tensor:
        ctx.value = value
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        g = g.clone()
        g[0] *= ctx.value
        return g, None


class Layer(nn.Linear):
    """A linear layer. If `value` is not None, the first row of its weight's gradient is multiplied by it."""

    value: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight if self.value is None else Spoiled.apply(self.weight, self.value)
        return nn.functional.linear(x, w, self.bias)


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Return a network of three linear layers, which fills several of DDP's buckets of `SEVERAL` MiB."""
    rng = torch.Generator().manual_seed(1)
    model = nn.Sequential(Layer(30, 60), nn.Tanh(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 30))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2, generator=rng)
    return model.to(dtype)


def batch(t: int, dtype: torch.dtype = torch.float64) -> Tensor:
    rng = torch.Generator().manual_seed(1000 * t + resolve(None).rank)
    return torch.randn(12, 30, generator=rng, dtype=torch.float64).to(dtype)


class Training:
    """One worker's training by a front.

    `engine` is the object with the attributes `steps`, `skips` and `ledger`, and with a state.
    """

    plain: nn.Sequential  # the network, without a wrapper
    model: nn.Module
    optimizer: torch.optim.Optimizer
    engine: Any
    defaults: ClassVar[dict[str, Any]] = {"dense_below": 100}

    def __init__(self, **options: Any) -> None:
        """Make the front with options of `folded`; the default compressor is TopK(0.05).

        Further options: `dtype`; `inner`, which makes the user's optimizer; `escape` as (interval, radius).
        """
        self.dtype = options.pop("dtype", torch.float64)
        self.inner = options.pop("inner", lambda ps: torch.optim.SGD(ps, LR))
        self.plain = network(self.dtype)
        if "escape" in options:
            options["escape"] = Escape(*options["escape"], self.objective)
        self.build(folded(self.defaults | options, TopK(0.05)))

    def build(self, options: dict[str, Any]) -> None:
        raise NotImplementedError

    def objective(self) -> Tensor:
        """Return the loss on a batch that no step trains on."""
        data = batch(-1, self.dtype)
        return (self.plain(data) - data).square().mean()  # type: ignore[no-any-return]

    def begin(self) -> None:
        """Prepare the front for its first step. Call also after loading a state."""

    def end(self) -> None:
        """Clean up after a step that raised an error."""

    def step(self, t: int, value: float | None = None) -> None:
        """Train on batch t; `value` multiplies the first row of the first layer's gradient on this worker."""
        self.plain[0].value = value  # type: ignore[assignment]
        data = batch(t, self.dtype)

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss: Tensor = (self.model(data) - data).square().mean()
            loss.backward()
            return loss

        self.optimizer.step(closure)

    def parameters(self) -> list[Tensor]:
        """Return this worker's parameters as plain tensors, which are views."""
        return [p.detach() for p in self.plain.parameters()]

    def x(self) -> Tensor:
        """Return the point on which all workers agree, float[d]: the parameters, or the anchor of local updates."""
        return flat(self.parameters())

    def y(self) -> Tensor:
        """Return x minus the mean over workers of all unsent updates, float[d]; collective."""
        raise NotImplementedError

    def disturb(self) -> str:
        """Change one coordinate of the parameters or the anchor, which all workers share; return the changed name."""
        self.parameters()[2].view(-1)[3] += 1e-6
        return "2.weight"

    def everything(self) -> dict[str, Any]:
        """Return copies of all state on which later steps depend."""
        state = {"x": self.parameters(), "optimizer": self.optimizer.state_dict(), "engine": self.engine.state_dict()}
        return copied(state)  # type: ignore[no-any-return]

    def outcome(self) -> dict[str, Any]:
        """Return copies of all state that is a function of the options and the batches only."""
        return self.everything()

    def load(self, state: dict[str, Any]) -> None:
        for p, old in zip(self.parameters(), state["x"], strict=True):
            p.copy_(old)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.engine is not self.optimizer:
            self.engine.load_state_dict(state["engine"])


class Optimizer(Training):
    def build(self, options: dict[str, Any]) -> None:
        self.model = self.plain
        self.engine = self.optimizer = packsaddle.CompressedSGD(self.plain.named_parameters(), LR, **options)

    def y(self) -> Tensor:
        return self.engine.corrected()  # type: ignore[no-any-return]


class Hook(Training):
    def y(self) -> Tensor:
        memory = self.engine.memory()
        e = torch.cat([memory[name].reshape(-1) for name, _ in self.plain.named_parameters()])
        return self.x() - LR * mean(e)


class DDPBuckets(Hook):
    scope = "bucket"

    def build(self, options: dict[str, Any]) -> None:
        self.model = DistributedDataParallel(self.plain, bucket_cap_mb=SEVERAL)
        self.optimizer = self.inner(self.plain.parameters())
        self.engine = packsaddle.register_ddp_hook(self.model, scope=self.scope, optimizer=self.optimizer, **options)

    def end(self) -> None:
        """Wait for the exchanges of a backward pass that raised."""
        for thread in self.engine._background._threads:
            thread.join()


class DDPModel(DDPBuckets):
    scope = "model"


class FSDP(Hook):
    """The hook for FSDP2 with one shard per replica, so that a parameter's local part is the whole parameter."""

    defaults: ClassVar[dict[str, Any]] = {}

    def build(self, options: dict[str, Any]) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("replicate", "shard"))
        for layer in (self.plain[0], self.plain[2], self.plain[4], self.plain):
            fully_shard(layer, mesh=mesh["shard"])
        self.model = self.plain
        self.optimizer = self.inner(self.plain.parameters())
        self.engine = packsaddle.register_fsdp_hook(self.plain, mesh["replicate"].get_group(), **options)
        self.engine.protect(self.optimizer)

    def parameters(self) -> list[Tensor]:
        return [p.detach().to_local() for p in self.plain.parameters()]  # type: ignore[attr-defined]

    def y(self) -> Tensor:
        """Return x minus the mean unsent update. Before the first exchange there is no error memory.

        The error memory of a module is one vector, in the order of the module's parameters.
        """
        memory = self.engine.memory()
        return self.x() - LR * mean(flat([memory[name] for name in sorted(memory)])) if memory else self.x()


class Local(Training):
    defaults: ClassVar[dict[str, Any]] = {"dense_below": 100, "every": 3}

    def build(self, options: dict[str, Any]) -> None:
        self.model = self.plain
        self.optimizer = self.inner(self.plain.parameters())
        self.optimizer.param_groups[0]["param_names"] = [name for name, _ in self.plain.named_parameters()]
        self.engine = LocalUpdates(self.optimizer, **options)

    def x(self) -> Tensor:
        return flat(list(self.engine.anchor().values()))

    def y(self) -> Tensor:
        return self.x() - self.engine.error()  # type: ignore[no-any-return]

    def disturb(self) -> str:
        state = self.engine.state_dict()
        state["fragments"][0]["anchor"]["0.weight"].view(-1)[3] += 1e-6
        self.engine.load_state_dict(state)
        return "anchor of 0.weight"


class LocalSeveral(Local):
    """Local updates of two inner optimizers. The optimizer of the biases steps before that of the matrices."""

    def build(self, options: dict[str, Any]) -> None:
        self.model = self.plain
        matrices, vectors = ([p for p in self.plain.parameters() if (p.ndim == 2) is two] for two in (True, False))
        muon = options.pop("muon", lambda ps: torch.optim.SGD(ps, LR))
        self.members = [muon(matrices), self.inner(vectors)]
        self.engine = LocalUpdates(self.members, **options)

    def step(self, t: int, value: float | None = None) -> None:
        self.plain[0].value = value  # type: ignore[assignment]
        data = batch(t, self.dtype)
        self.plain.zero_grad()
        (self.model(data) - data).square().mean().backward()
        for member in reversed(self.members):
            member.step()

    def x(self) -> Tensor:
        return self._in_order(super().x())

    def y(self) -> Tensor:
        return self.x() - self._in_order(self.engine.error())

    def everything(self) -> dict[str, Any]:
        optimizers = [member.state_dict() for member in self.members]
        state = {"x": self.parameters(), "optimizer": optimizers, "engine": self.engine.state_dict()}
        return copied(state)  # type: ignore[no-any-return]

    def load(self, state: dict[str, Any]) -> None:
        for p, old in zip(self.parameters(), state["x"], strict=True):
            p.copy_(old)
        for member, saved in zip(self.members, state["optimizer"], strict=True):
            member.load_state_dict(saved)
        self.engine.load_state_dict(state["engine"])

    def _in_order(self, vector: Tensor) -> Tensor:
        """Reorder a vector, float[d], from the order of the optimizers' parameters to that of the network's."""
        held = [p for member in self.members for p in member.param_groups[0]["params"]]
        parts = dict(zip(map(id, held), vector.split([p.numel() for p in held]), strict=True))
        return torch.cat([parts[id(p)] for p in self.plain.parameters()])


class LocalOverlapped(Local):
    defaults: ClassVar[dict[str, Any]] = {"dense_below": 100, "every": 4, "delay": 2, "fragments": 2}


class ElasticLocal(Local):
    def build(self, options: dict[str, Any]) -> None:
        manager = FakeManager(resolve(None))
        workers = Elastic(manager, group=FakeGroup(manager), leave_on_sigterm=False)
        super().build({"workers": workers} | options)

    def begin(self) -> None:
        self.engine.join()

    def y(self) -> Tensor:
        return self.x() - mean(self.engine.pending())

    def outcome(self) -> dict[str, Any]:
        """Return the state without the random names of the run and its rounds, and without the ledger.

        Joining again after loading a state sends bytes, so the ledger may differ.
        """
        state = self.everything()
        for name in ("membership", "ledger"):
            del state["engine"][name]
        return state


@dataclass(frozen=True)
class Front:
    """A front's class of `Training`, with its need of real processes."""

    make: Callable[..., Training]
    processes: bool = False


FRONTS = {
    "CompressedSGD": Front(Optimizer),
    "DDP by buckets": Front(DDPBuckets, processes=True),
    "DDP by model": Front(DDPModel, processes=True),
    "FSDP": Front(FSDP, processes=True),
    "local": Front(Local),
    "local, two optimizers": Front(LocalSeveral),
    "local overlapped": Front(LocalOverlapped),
    "elastic": Front(ElasticLocal),
}


def made(front: str, **options: Any) -> Training:
    """Return a new training by a front, ready for its first step."""
    one = FRONTS[front].make(**options)
    one.begin()
    return one


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors]).clone()


def mean(vector: Tensor) -> Tensor:
    """Return the mean over workers; collective."""
    group, total = resolve(None), vector.double()
    group.all_reduce(total)
    return total / group.size


def copied(state: Any) -> Any:
    """Return a copy of a state, as if it were saved to a file and loaded again."""
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    """Return the places, such as keys, at which two states are not bitwise identical."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
        return [] if same else [place]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for key in a for d in differences(a[key], b[key], f"{place}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{place}.{i}")]
    return [] if bool(a == b) else [f"{place}: {a} and {b}"]


def parameters_of(fronts: Mapping[str, Iterable[str]], step: int = 1) -> Any:
    """Return the decorator that parametrizes a test over (front, way). Fronts that start processes have the mark
    `process`. Of each `step` ways of a front the first has no other mark, and the others have the mark `nightly`."""
    process, nightly = pytest.mark.process, pytest.mark.nightly
    cases = [
        pytest.param(name, way, marks=[process] * FRONTS[name].processes + [nightly] * (i % step > 0))
        for name, ways in fronts.items()
        for i, way in enumerate(ways)
    ]
    return pytest.mark.parametrize(("front", "way"), cases)
