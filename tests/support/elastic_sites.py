"""Sites that come and go without torchft: threads whose collectives fail where a peer is dead, and their lighthouse.

A site's processes are threads, of which one runs at a time. A plan draws when a site is killed, at any collective of
one of its processes, when a collective fails on one process alone, and when a state is not received. What a worker
sends is logged as lab/bench/elastic.py logs it, from its own account, and checked there.
"""

import random
import threading
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from elastic_fakes import FakeGroup, FakeManager
from torch import Tensor

from lab.bench.elastic import pending
from packsaddle import Compression, Elastic, LocalUpdates, TopK
from packsaddle.comm import Group
from packsaddle.local.elastic.workers import ElasticWorkers

PROCESSES = 2
SECONDS = 60.0  # until a test that hangs fails


class KilledError(BaseException):
    """Ends a thread, as SIGKILL does."""


@dataclass
class Life:
    """One life of a site, from its start until it is killed or ends."""

    name: str
    number: int
    kill_at: tuple[int, int] | None = None  # process, and its collective, at which the whole site is killed
    break_at: frozenset[tuple[int, int]] = frozenset()  # processes and their collectives that fail on them alone
    deaf: frozenset[tuple[int, int]] = frozenset()  # processes and their quorums at which they receive no state
    calls: list[int] = field(default_factory=lambda: [0] * PROCESSES)
    managers: list["Manager"] = field(default_factory=list)
    is_dead: bool = False


class Lighthouse:
    """What the threads share: who is alive, who has asked for a quorum, and the collectives that are not complete."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.lives: list[Life] = []
        self.asked: dict[tuple[int, int], int] = {}  # by life and process: its step
        self.found: dict[tuple[int, int], tuple[int, list[Life], dict[str, Any] | None, int]] = {}
        self.quorums = 0
        self.closed: set[Any] = set()  # groups that a member has aborted
        self.given: dict[Any, dict[int, Any]] = {}  # by group and number of the call, then by rank

    def end(self, life: Life) -> None:
        with self.changed:
            life.is_dead = True
            self.changed.notify_all()

    def exchange(self, group: "HubGroup", value: Any) -> list[Any]:
        """Return the values of all members of a group; raise RuntimeError if one is dead or has aborted it."""
        life, process = group.life, group.process
        with self.changed:
            life.calls[process] += 1
            if life.kill_at == (process, life.calls[process]):
                life.is_dead = True
                self.changed.notify_all()
            key = group.key, group.count
            group.count += 1
            given = self.given.setdefault(key, {})
            if not life.is_dead:
                given[group.rank] = value
                self.changed.notify_all()

            def lost() -> bool:
                dead = any(of.is_dead and i not in given for i, of in enumerate(group.lives))
                return dead or group.key in self.closed

            self._wait(lambda: life.is_dead or len(given) == group.size or lost())
            if life.is_dead:
                raise KilledError
            if len(given) < group.size:
                raise RuntimeError("Connection closed by peer")
            if group.is_lane and (process, life.calls[process]) in life.break_at:
                raise RuntimeError("Connection reset by peer")
            return [given[i] for i in range(group.size)]

    def _wait(self, condition: Any) -> None:
        if not self.changed.wait_for(condition, SECONDS):
            raise AssertionError("a site hangs")

    def quorum(self, manager: "Manager") -> tuple[int, list[Life], dict[str, Any] | None, int]:
        """Wait for all sites that are alive; return the number of the quorum, its sites, the state of one that is
        ahead, and the largest step."""
        life, me = manager.life, (manager.life.number, manager.process)
        with self.changed:
            self.asked[me] = manager.step
            self.changed.notify_all()
            self._wait(lambda: life.is_dead or me in self.found or self._forms())
            if life.is_dead:
                raise KilledError
            return self.found.pop(me)

    def _forms(self) -> bool:
        alive = [life for life in self.lives if not life.is_dead]
        everyone = [(life.number, process) for life in alive for process in range(PROCESSES)]
        if not all(one in self.asked for one in everyone) or any(one in self.found for one in everyone):
            return False
        self.quorums += 1
        steps = [self.asked[life.number, self.quorums % PROCESSES] for life in alive]  # the one that asked last, say
        ahead = [life for life, step in zip(alive, steps, strict=True) if step == max(steps)]
        for i, (life, step) in enumerate(zip(alive, steps, strict=True)):
            for process in range(PROCESSES):
                source = ahead[(i + process) % len(ahead)]  # as in torchft, processes have different ones
                state = deepcopy(source.managers[process].save()) if step < max(steps) else None
                self.found[life.number, process] = self.quorums, alive, state, max(steps)
        self.asked.clear()
        self.changed.notify_all()
        return True


class HubGroup(Group):
    """One process's handle to a group of threads: its site, or a lane, the processes of one rank in all sites."""

    def __init__(self, hub: Lighthouse, key: Any, lives: Sequence[Life], rank: int, life: Life, process: int) -> None:
        self.hub, self.key, self.lives, self.rank, self.size = hub, key, lives, rank, len(lives)
        self.life, self.process, self.count = life, process, 0
        self.is_lane = key[0] == "lane"

    def all_reduce(self, tensor: Tensor) -> None:
        first, *rest = self.hub.exchange(self, tensor.clone())
        total = first.clone()
        for each in rest:
            total.add_(each)
        tensor.copy_(total)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        return [each.clone() for each in self.hub.exchange(self, tensor.clone())]

    def all_to_all(self, outgoing: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        return [parts[self.rank].clone() for parts in self.hub.exchange(self, [part.clone() for part in outgoing])]

    def broadcast(self, tensor: Tensor) -> None:
        raise AssertionError("no round needs it")


class Manager(FakeManager):
    """torchft's Manager of one process of a site."""

    def __init__(self, hub: Lighthouse, life: Life, process: int) -> None:
        self.hub, self.life, self.process, self.quorums = hub, life, process, 0
        site = HubGroup(hub, ("site", life.number), [life] * PROCESSES, process, life, process)
        super().__init__(site, site=site)

    def start_quorum(self, timeout: Any = None) -> None:
        self.error = None
        number, lives, state, step = self.hub.quorum(self)
        self.quorums += 1
        rank = lives.index(self.life)
        self.group = HubGroup(self.hub, ("lane", number, self.process), lives, rank, self.life, self.process)
        if state is not None and (self.process, self.quorums) in self.life.deaf:
            self.error = RuntimeError("timed out")
        elif state is not None:
            self.step = step
            self.load(state)


class Lane(FakeGroup):
    def abort(self) -> None:
        with self.manager.hub.changed:  # type: ignore[attr-defined]
            self.manager.hub.closed.add(self.manager.group.key)  # type: ignore[attr-defined]
            self.manager.hub.changed.notify_all()  # type: ignore[attr-defined]


class Process:
    """One process of a site, with an account of what it has sent."""

    def __init__(self, run: "Run", life: Life, process: int, log: list[dict[str, Any]]) -> None:
        self.run, self.life, self.process, self.log = run, life, process, log
        self.parameters = [torch.nn.Parameter(torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6))]
        self.parameters.append(torch.nn.Parameter(torch.ones(2, 3, dtype=torch.float64)))
        if run.sharded:
            for p in self.parameters:
                p.data.add_(float(process))  # the shard of another part of the model
                p.placements = [SimpleNamespace(is_replicate=lambda: False)]  # type: ignore[attr-defined]
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.1)
        manager = Manager(run.hub, life, process)
        life.managers.append(manager)
        workers = Elastic(manager, group=Lane(manager), leave_on_sigterm=False)
        self.local = LocalUpdates(self.optimizer, run.compression, every=2, workers=workers)
        self.moved = torch.zeros(30, dtype=torch.float64)
        self.before = self.kept = self.moved.clone()  # the local update and the error memory that were not sent
        self.steps = 0

    def train(self) -> None:
        local = self.local
        local.join()
        self.say("join", None, None)
        while True:
            over = torch.tensor([local.rounds >= self.run.rounds and (self.life.name != "0" or self.run.is_last())])
            assert isinstance(local._workers, ElasticWorkers)
            local._workers.member.site.group.all_reduce(over := over.int())
            if over == PROCESSES:
                break
            self.step()
            if local.exchanging:
                update, kept = pending(local)
                self.say("round", self.moved - (update - self.before), self.kept - kept)

    def step(self) -> None:
        """Step by a gradient that is equal on all processes of a site that have the whole model."""
        seed = self.process if self.run.sharded else 0
        rng = torch.Generator().manual_seed(1_000_000 * self.life.number + 1000 * seed + self.steps)
        for p in self.parameters:
            p.grad = torch.randn(p.shape, generator=rng, dtype=p.dtype) + p.detach()
        grads = torch.cat([p.grad.reshape(-1) for p in self.parameters if p.grad is not None])
        self.moved += 0.1 * grads
        self.steps += 1
        self.optimizer.step()

    def say(self, event: str, sent: Tensor | None, freed: Tensor | None) -> None:
        assert isinstance(self.local._workers, ElasticWorkers)
        membership = self.local._workers.member
        anchor = torch.cat([a.reshape(-1) for a in self.local.anchor().values()])
        line = {"event": event, "process": self.process, "round": self.local.rounds}
        line |= {"history": membership.roster.history, "past": list(membership.roster.past)[-2:-1], "weight": 1.0}
        line |= {"here": membership.roster.present, "worker": membership.worker, "hash": str(anchor.tolist())}
        line |= {"sends": membership.account.included == membership.account.attempts}
        line |= {"anchor": anchor[::7].tolist()[:4]}
        line |= {name: x if x is None else x[::7].tolist()[:4] for name, x in (("sent", sent), ("freed", freed))}
        self.log.append(line)
        self.before, self.kept = pending(self.local)
        self.moved.zero_()


class Run:
    """A run of sites, disturbed as `seed` draws it; `logs` are the lines of all processes of all lives."""

    def __init__(self, seed: int, *, sharded: bool, rounds: int = 12, exchange: Any = "direct") -> None:
        self.rng, self.sharded, self.rounds = random.Random(seed), sharded, rounds
        self.compression = Compression(TopK(0.25), exchange, dense_below=0, compare_every=1)
        self.hub, self.logs, self.errors = Lighthouse(), [], []  # type: ignore[var-annotated]
        self.running = self.killed = 0

    def is_last(self) -> bool:
        return self.running == 1

    def all(self, sites: int) -> None:
        threads = [threading.Thread(target=self._site, args=(str(i),)) for i in range(sites)]
        self.running = sites
        self.first = [self._life(str(i)) for i in range(sites)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * SECONDS)
        for error in self.errors:
            raise error

    def _life(self, name: str) -> Life:
        rng, processes = self.rng, range(PROCESSES)
        with self.hub.changed:
            life = Life(name, len(self.hub.lives))
            if name != "0" and self.killed < 4 and rng.random() < 0.8:
                life.kill_at = rng.randrange(PROCESSES), rng.randint(20, 220)
                self.killed += 1
            life.break_at = frozenset((p, rng.randint(1, 300)) for p in processes for _ in range(rng.randint(0, 2)))
            life.deaf = frozenset((p, rng.randint(1, 3)) for p in processes if rng.random() < 0.2)
            self.hub.lives.append(life)
        return life

    def _site(self, name: str) -> None:
        """Start a site again and again, until it ends without having been killed."""
        life = self.first[int(name)]
        while True:
            logs: list[list[dict[str, Any]]] = [[] for _ in range(PROCESSES)]
            self.logs += logs
            threads = [threading.Thread(target=self._process, args=(life, i, logs[i])) for i in range(PROCESSES)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if not life.is_dead or self.errors:
                break
            life = self._life(name)
        self.running -= 1
        self.hub.end(life)

    def _process(self, life: Life, process: int, log: list[dict[str, Any]]) -> None:
        with self.hub.changed:  # one thread runs at a time, until it waits for others
            try:
                self.hub._wait(lambda: len(life.managers) == process)
                Process(self, life, process, log).train()
            except KilledError:
                pass
            except BaseException as error:
                self.errors.append(error)
                self.hub.end(life)
