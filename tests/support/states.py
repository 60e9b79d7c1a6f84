"""Small trainings whose states are saved and loaded, for the tests of checkpoints; run in gloo processes as well."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from specs import folded
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import packsaddle
from packsaddle.checkpoint.save_load import restore
from packsaddle.comm.group import resolve

Parts = dict[str, Any]


def _model(dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(8, 20), nn.BatchNorm1d(20), nn.Tanh(), nn.Linear(20, 8)).to(dtype)


def _batch(rank: int, step: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(100 * step + rank)).to(dtype)


class Small:
    """A training of a small network by CompressedSGD, or with DistributedDataParallel and the hook.

    The batch of step t depends on t and the worker only.
    """

    def __init__(self, *, hook: str | None = None, dtype: torch.dtype = torch.float64, **options: Any) -> None:
        self.dtype, self.rank = dtype, resolve(None).rank
        self.model: Any = _model(dtype)
        options = folded({"compressor": packsaddle.TopK(0.1), "noise": 0.01, "dense_below": 30, "seed": 5, **options})
        self.parts: Parts
        if hook is None:
            self.optimizer: Any = packsaddle.CompressedSGD(self.model.named_parameters(), 0.05, **options)
            self.parts = {"model": self.model, "optimizer": self.optimizer}
            self.memory = self.optimizer
        else:
            plain = self.model
            self.model = DistributedDataParallel(plain)
            kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[hook]
            self.optimizer = kind(plain.parameters(), lr=0.05)
            follow = self.optimizer if hook == "sgd" else None
            self.memory = packsaddle.register_ddp_hook(self.model, **{"scope": "model", "optimizer": follow, **options})
            self.parts = {"model": plain, "optimizer": self.optimizer, "hook": self.memory}
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 4, gamma=0.7)
        self.parts["scheduler"] = self.scheduler

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            batch = _batch(self.rank, step, self.dtype)

            def closure(batch: Tensor = batch) -> Tensor:
                self.optimizer.zero_grad()
                loss = nn.functional.mse_loss(self.model(batch), batch)
                loss.backward()
                return loss

            self.optimizer.step(closure)
            self.scheduler.step()

    def vectors(self) -> dict[str, Tensor]:
        """Return the vectors that must be identical after resuming, by name."""
        state = self.memory.state_dict()
        found = {name: t.clone() for name, t in self.parts["model"].state_dict().items()}
        if "hook" in self.parts:
            return found | {f"error {n}": t.clone() for n, t in self.memory.memory().items()}
        return found | {f"{n} {i}": t.clone() for i, v in state["state"].items() for n, t in v.items()}


def straight_and_resumed(folder: str, options: dict[str, Any], stop: int, end: int) -> dict[str, Any]:
    """Train to step `end`, saving at steps 2 and `stop`. Then load the state into new objects, and train to `end`.

    Returns the results of both trainings.
    """
    one = Small(**options)
    for first, last in ((0, 2), (2, stop)):
        one.train(first, last)
        packsaddle.save_checkpoint(folder, one.parts, step=last, extra={"seen": [last]})
    one.train(stop, end)
    two = Small(**options)
    found = packsaddle.load_checkpoint(folder, two.parts)
    assert found is not None
    assert (found.step, found.extra["seen"]) == (stop, [stop])
    two.train(stop, end)
    a, b = one.vectors(), two.vectors()
    assert a.keys() == b.keys()
    ledgers = [small.memory.ledger.by_purpose for small in (one, two)]
    return {
        "differ": [k for k in a if not torch.equal(a[k], b[k])],
        "bytes": dict(ledgers[0]) == dict(ledgers[1]),
    }


def by_torchs_own_checkpoints(folder: str, options: dict[str, Any], stop: int, end: int) -> list[str]:
    """Save and load with torch.distributed.checkpoint, where each worker's state has its own key.

    Returns the differences from an uninterrupted run.
    """
    import torch.distributed.checkpoint as dcp

    one, two = Small(**options), Small(**options)
    one.train(0, stop)
    two.train(0, 1)
    key = f"worker-{one.rank}"
    packed = io.BytesIO()
    torch.save({name: part.state_dict() for name, part in one.parts.items()}, packed)
    dcp.save({key: packed}, checkpoint_id=folder)
    found = {key: io.BytesIO()}
    dcp.load(found, checkpoint_id=folder)
    found[key].seek(0)
    states = torch.load(found[key], weights_only=True)
    for name, part in two.parts.items():
        part.load_state_dict(states[name])
    for small in (one, two):
        small.train(stop, end)
    a, b = one.vectors(), two.vectors()
    return [name for name in a if not torch.equal(a[name], b[name])]


def begun(folder: str, options: dict[str, Any], stop: int) -> Tensor:
    """Train to step `stop` and save; return the summary: x and the mean pending update."""
    one = Small(**options)
    one.train(0, stop)
    packsaddle.save_checkpoint(folder, one.parts, step=stop)
    return summary(one)


def summary(small: Small) -> Any:
    """Return x and the mean pending update over workers, both by parameter, and the momentum; collective."""
    group = resolve(None)
    found: dict[str, Tensor] = {n: p.detach().clone() for n, p in small.parts["model"].named_parameters()}
    if "hook" in small.parts:
        memory = {f"e {n}": t.double() for n, t in small.memory.memory().items()}
    else:
        memory = {"y": small.optimizer.corrected(), "e": small.optimizer._mean_pending()}
        for i, vectors in small.optimizer.state_dict()["state"].items():
            if "momentum" in vectors:
                memory[f"mean momentum {i}"] = vectors["momentum"].clone()
    for name, t in memory.items():
        if name not in ("y", "e"):
            group.all_reduce(t)
            t.div_(group.size)
    return found | memory


def carried_over(folder: str, options: dict[str, Any], end: int) -> Any:
    """Load a state that another number of workers has saved, and train to step `end`.

    Returns the summary after loading, and the note that loading has returned.
    """
    one = Small(**options)
    found = restore(folder, one.parts)
    assert found is not None
    loaded = summary(one)
    buffers = {n: b.clone() for n, b in one.parts["model"].named_buffers()}
    one.train(found.step, end)
    ended = {n: p.detach().clone() for n, p in one.parts["model"].named_parameters()}
    return loaded, buffers, found.notes, ended


def in_turn(calls: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    return [call(*arguments) for call, arguments in calls]


def saved_by(folder: Path, **options: Any) -> Small:
    """Return a training of a single worker after four steps, which has saved its state at steps 2 and 4."""
    one = Small(**options)
    for first, last in ((0, 2), (2, 4)):
        one.train(first, last)
        packsaddle.save_checkpoint(folder, one.parts, step=last)
    return one
