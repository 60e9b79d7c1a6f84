"""Elastic workers without torchft: a fake Manager for simulated workers, whose rounds fail as a test specifies."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from specs import local_options
from torch import Tensor

from packsaddle import Compression, Elastic, LocalUpdates, TopK
from packsaddle.comm import Group, ManagedGroup, Solo, resolve
from packsaddle.local.elastic.membership import Membership
from packsaddle.local.elastic.workers import ElasticWorkers

COMPRESSION = Compression(TopK(0.25), dense_below=0, compare_every=1)


class FakeManager:
    """A replacement of torchft's Manager, for a group of workers that does not change.

    A vote to commit fails if its number, counted from 0, is in `refused`.
    """

    def __init__(self, group: Group, refused: Collection[int] = (), site: Group | None = None) -> None:
        self.group, self.refused, self.site = group, refused, site or Solo()
        self._group_world_size = self.site.size
        self.votes = self.step = 0
        self.error: Exception | None = None
        self.load: Callable[[Any], None] = lambda _: None
        self.save: Callable[[], Any] = dict
        self.before_quorum: Callable[[], None] = lambda: None

    def register_state_dict_fn(self, key: str, load: Callable[[Any], None], save: Callable[[], Any]) -> None:
        self.load, self.save = load, save

    def start_quorum(self, timeout: Any = None) -> None:
        self.error = None
        self.before_quorum()

    def participating_rank(self) -> int:
        return self.group.rank

    def num_participants(self) -> int:
        return self.group.size

    def report_error(self, error: Exception) -> None:
        self.error = error

    def errored(self) -> Exception | None:
        return self.error

    def should_commit(self) -> bool:
        self.votes += 1
        no = torch.tensor([self.error is not None or self.votes - 1 in self.refused], dtype=torch.int32)
        self.site.all_reduce(no)
        agreed = not no
        self.step += agreed
        return agreed

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]

    def shutdown(self, wait: bool = True) -> None:
        pass


class FakeGroup(ManagedGroup):
    """The collectives of a group. A collective whose number, counted from 0, is in `broken` raises after its work."""

    def __init__(self, manager: FakeManager, broken: Collection[int] = ()) -> None:
        self.manager, self.site, self.broken, self.calls = manager, manager.site, broken, 0
        self.renew()

    def abort(self) -> None:
        pass

    def _called(self) -> None:
        self.calls += 1
        if self.calls - 1 in self.broken:
            raise RuntimeError("Connection closed by peer")

    def all_reduce(self, tensor: Tensor) -> None:
        self.manager.group.all_reduce(tensor)
        self._called()

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        found = self.manager.group.all_gather(tensor)
        self._called()
        return found

    def all_to_all(self, outgoing: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        found = self.manager.group.all_to_all(outgoing, sizes)
        self._called()
        return found

    def broadcast(self, tensor: Tensor) -> None:
        raise AssertionError("no round needs it")


class Worker:
    """A worker that trains a linear model in float64. A step's gradient is a function of the worker and the step."""

    def __init__(
        self,
        group: Group | None = None,
        *,
        refused: Collection[int] = (),
        broken: Collection[int] = (),
        inner: Callable[[Any], torch.optim.Optimizer] = lambda params: torch.optim.SGD(params, lr=0.1),
        settings: dict[str, Any] | None = None,
        elastic: bool = True,
        **arguments: Any,
    ) -> None:
        group = group or Solo()
        self.rank = group.rank
        self.parameters = [torch.nn.Parameter(torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6))]
        self.parameters.append(torch.nn.Parameter(torch.ones(2, 3, dtype=torch.float64)))
        self.optimizer = inner(self.parameters)
        arguments = {"every": 3, "compressor": COMPRESSION} | arguments
        self.manager = FakeManager(group, refused)
        if elastic:
            given = settings or {}
            arguments["workers"] = Elastic(
                self.manager, group=FakeGroup(self.manager, broken), leave_on_sigterm=False, **given
            )
        else:
            arguments["workers"] = group
        self.local = LocalUpdates(self.optimizer, **local_options(**arguments))
        self.moved = torch.zeros(30, dtype=torch.float64)  # the sum of the inner optimizer's steps, x_0 - x

    def x(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1).clone() for p in self.parameters])

    def anchor(self) -> Tensor:
        return torch.cat([a.reshape(-1) for a in self.local.anchor().values()])

    def gradients(self) -> None:
        """Set the parameters' gradients for the next step."""
        rng = torch.Generator().manual_seed(1000 * self.rank + self.local.steps)
        for p in self.parameters:
            p.grad = torch.randn(p.shape, generator=rng, dtype=p.dtype) + p.detach()

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.gradients()
            flat = torch.cat([p.grad.reshape(-1) for p in self.parameters if p.grad is not None])
            self.moved += 0.1 * flat  # the step of plain SGD with learning rate 0.1
            self.optimizer.step()

    def everything(self) -> list[Tensor]:
        """Return copies of all state that a failed round must not change."""
        found = [self.x(), self.anchor()]
        found += [part.feedback.memory.vector.clone() for part in self.local._fragments]
        for optimizer in (self.optimizer, self.local.outer):
            for state in [] if optimizer is None else optimizer.state.values():
                found += [t.clone() for t in state.values() if isinstance(t, Tensor)]
        return found


def membership(worker: Worker) -> Membership:
    found = worker.local._workers
    assert isinstance(found, ElasticWorkers)
    return found.member


def pace(worker: Worker, steps: int) -> None:
    """Set the number of inner steps that this worker makes between two rounds."""
    member = membership(worker)
    member.rotation = replace(member.rotation, own=steps)


def joined(**arguments: Any) -> Worker:
    """Return this simulated worker, after it has joined the run. Outside a simulation it is the only worker."""
    worker = Worker(resolve(None), **arguments)
    worker.local.join()
    return worker


def of_state(state: Callable[[], Any], *, joins: bool = True, **arguments: Any) -> Worker:
    """Return a worker that loads the given state, another worker's, at its first quorum.

    With `joins` the worker has already joined the run.
    """
    worker = Worker(resolve(None), **arguments)

    def load() -> None:
        worker.manager.before_quorum = lambda: None
        worker.manager.load(state())

    worker.manager.before_quorum = load
    if joins:
        worker.local.join()
    return worker


def check_nothing_is_lost(workers: Sequence[Worker], *, pending: bool) -> None:
    """Check that the anchor has moved from x_0 by the mean over workers of their steps, minus their pending updates.

    `pending` is True if there must be pending updates, and False if there must be none.
    """
    mean = torch.stack([worker.moved - worker.local.pending() for worker in workers]).mean(0)
    for worker in workers:
        torch.testing.assert_close(worker.anchor(), Worker().x() - mean, rtol=1e-12, atol=1e-12)
        assert bool(worker.local.pending().any()) == pending
