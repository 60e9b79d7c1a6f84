"""Naive twin of local updates, from the documented algorithm alone: vectors of the whole model in float64, one row for
each worker; and the toy training that it and `LocalUpdates` are run on."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any, Literal

import pytest
import torch
from clock import WorkersClock
from specs import local_options
from torch import Tensor, nn

from packsaddle import (
    Compression,
    Compressor,
    Escape,
    Identity,
    LocalUpdates,
    LowRank,
    NonFiniteError,
    OuterSGD,
    Overlap,
    Rounded,
    Workers,
)
from packsaddle.comm import resolve
from packsaddle.compressors.low_rank import orthonormal, scaled
from packsaddle.feedback.noise import Noise
from packsaddle.local.options import LocalOptions
from packsaddle.local.schedule import paces
from packsaddle.numerics.seeds import mix

SHAPES: dict[str, tuple[int, ...]] = {"w": (9, 7), "b": (5,), "u": (4, 6), "c": (3,)}
# Models, and the number of parameters in each of one, two and three fragments, by hand.
MODELS: list[tuple[dict[str, tuple[int, ...]], dict[int, list[int]]]] = [
    (SHAPES, {1: [4], 2: [1, 3], 3: [1, 1, 2]}),
    ({"p": (5, 6), "q": (3, 2, 5), "r": (6, 5)}, {1: [3], 2: [1, 2], 3: [1, 1, 1]}),
    ({"v": (4,), "m": (7, 5), "n": (2, 3)}, {1: [3], 2: [2, 1], 3: [1, 1, 1]}),
    ({"m": (4, 3), "v": (2,)}, {1: [2], 2: [1, 1]}),
]
INNERS: dict[str, Callable[[list[Any]], torch.optim.Optimizer]] = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.05, betas=(0.8, 0.9), weight_decay=0.1),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.02, momentum=0.9, nesterov=True),
}
OUTERS: dict[str, Any] = {
    "none": None,
    "nesterov": OuterSGD(),
    "plain": OuterSGD(0.8, 0.0),
    "heavy": OuterSGD(0.5, 0.8, nesterov=False),
    "adam": lambda ps: torch.optim.AdamW(ps, lr=0.03, weight_decay=0.5),
}


# All options, by the names that they have in `Case`, where `steps` of Workers are `paces`.
OPTIONS = {f.name for cls in (LocalOptions, Compression, Overlap, Workers) for f in fields(cls)}
OPTIONS = OPTIONS - {"compression", "overlap", "workers", "group", "memory", "steps"} | {"paces"}
CLOCK = WorkersClock()


@dataclass(frozen=True)
class Case:
    """One setting: the options of `LocalUpdates`, and what happens in the training."""

    every: int
    compressor: Compressor | tuple[Compressor, ...]  # several: in turn, a round each
    fragments: int = 1
    delay: int = 0
    outer: str = "none"
    agreement: float = 0.0
    mean_momentum: float = 0.0
    keep_unsent: bool = False
    decay: float = 1.0
    noise: Any = 0.0
    exchange: Any = "direct"
    back: Compressor | None = None
    dense_below: int = 1
    weight: tuple[float, ...] | Literal["steps"] | None = None  # by worker
    paces: tuple[int, ...] | None = None  # by worker
    speeds: tuple[tuple[int, ...], ...] = ((1,) * 9,)  # seconds of a step by worker, in each round; the last: and later
    clip: float | None = None
    escape: tuple[int, float, Any, int] | None = None  # interval, radius, compare, every
    max_skipped: int | None = 20
    compare_every: int = 1
    monitor_every: int = 0
    compare_optimizers: bool = True
    offload: bool = False
    seed: int = 5
    workers: int = 3
    model: int = 0
    inner: str = "adamw"  # two with a comma between them: of the first half of the parameters, and of the others
    second_first: bool = False  # of two optimizers the second steps first
    steps: int = 17  # ticks: with paces, parts of `every` of a round
    loud: float = 1.0  # factor of worker 1's gradients
    bad: Mapping[int, int] = field(default_factory=dict)  # inner step (from 1) in which which worker computes a NaN
    flushes: Mapping[int, Compressor | None] = field(default_factory=dict)  # after these inner steps
    freezes: str = ""  # parameters in spells, on "all" workers or on "each"; "others": while another optimizer steps

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return MODELS[self.model][0]

    def cut(self) -> Iterator[list[str]]:
        """Yield the names in each fragment."""
        names = iter(self.shapes)
        yield from ([next(names) for _ in range(n)] for n in MODELS[self.model][1][self.fragments])

    def is_compressed(self, name: str) -> bool:
        shape = self.shapes[name]
        return not self.dense_below or (len(shape) > 1 and prod(shape) >= self.dense_below)

    def compressor_at(self, t: int) -> Compressor:
        return self.compressor[t % len(self.compressor)] if isinstance(self.compressor, tuple) else self.compressor

    def seconds(self, tick: int) -> tuple[int, ...]:
        """Return the seconds of each worker's step at a tick."""
        return self.speeds[min((tick - 1) // self.every, len(self.speeds) - 1)]

    def last_step(self, tick: int, pace: int) -> int:
        """Return the last step of a round whose exchanges are all due by a tick of it: the k-th runs those of the ticks
        up to k every / pace."""
        return max(k for k in range(pace + 1) if k * self.every // pace <= tick)

    def is_quiet(self, n: int, pace: Iterable[int]) -> bool:
        """Return True if no worker is ahead of others by an exchange, or by the first step's check, at tick n."""
        tick = (n - 1) % self.every + 1
        lasts = [(self.last_step(tick, h), h) for h in pace]
        first = min(k * self.every // h for k, h in lasts)
        return (n > self.every or min(lasts)[0] > 0) and not any(map(self.is_due, range(first + 1, tick + 1)))

    def is_due(self, tick: int) -> bool:
        """Return True if an exchange begins or ends at a tick."""
        offsets = [i * self.every // self.fragments for i in range(self.fragments)]
        return any((tick + offset - late) % self.every == 0 for offset in offsets for late in (0, self.delay))

    def is_frozen(self, name: str, worker: int, n: int) -> bool:
        """For spells of three steps; the first parameter never."""
        if self.freezes not in ("all", "each") or name == next(iter(self.shapes)):
            return False
        spell = f"{self.seed} {name} {worker if self.freezes == 'each' else ''} {n // 3}"
        return random.Random(spell).random() < 0.4

    def local(self, training: "Training") -> LocalUpdates:
        """Return the `LocalUpdates` of this worker."""
        rank = resolve(None).rank
        given = {name: getattr(self, name) for name in OPTIONS - {"paces"}} | {"outer": OUTERS[self.outer]}
        given["compressor"] = self.compressor_at if isinstance(self.compressor, tuple) else self.compressor
        given["weight"], given["steps"] = self.weight, self.paces
        if isinstance(self.weight, tuple):
            given["weight"] = self.weight[rank]
        if self.escape is not None:
            interval, radius, compare, every = self.escape
            f = partial(lambda training: objective(flat(training.parameters), rank), training)
            given["escape"] = Escape(interval, radius, f, compare=compare, every=every)
        optimizers = training.optimizers
        return LocalUpdates(optimizers, model=training.model, warn_own_state=False, **local_options(**given))


def begin(shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    """x_0."""
    rng = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, dtype=torch.float64, generator=rng) for name, shape in shapes.items()}


def gradient(name: str, x: Tensor, worker: int, step: int) -> Tensor:
    """Of a quadratic with each worker's own minimum, and noise."""
    rng = torch.Generator().manual_seed(1000 * worker + 7 * step + len(name) + ord(name[0]))
    noise = torch.randn(x.shape, dtype=torch.float64, generator=rng)
    return ((1 + worker % 2) * x + 0.3 * (worker - 1) + 0.5 * noise).to(x.dtype)


def objective(x: Tensor, worker: int) -> float:
    """That quadratic."""
    return float(((1 + worker % 2) * x / 2 + 0.3 * (worker - 1)).mul(x).sum())


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """All of them as a vector."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors.values()])


class Training:
    """One worker's parameters, which begin at `values`, and their inner optimizers."""

    def __init__(self, case: Case, values: Mapping[str, Tensor]) -> None:
        self.case, self.model = case, nn.ParameterDict(values.items())
        self.parameters = dict(self.model.named_parameters())
        inners, names = case.inner.split(","), list(values)
        half = len(names) // 2 if len(inners) > 1 else len(names)
        self.groups = [names[:half], names[half:]][: len(inners)]
        self.optimizers = [
            INNERS[inner]([self.parameters[name] for name in group])
            for inner, group in zip(inners, self.groups, strict=True)
        ]
        self.moved = torch.zeros_like(flat(values))  # float[d], by this worker's own steps
        for optimizer in self.optimizers:
            optimizer.register_step_post_hook(self._note)  # before the hooks of LocalUpdates, which exchange

    def step(self, n: int, worker: int) -> None:
        """Do inner step n, from 1."""
        for i, (name, p) in enumerate(self.parameters.items()):
            p.requires_grad_(not self.case.is_frozen(name, worker, n))
            p.grad = gradient(name, p.detach(), worker, n) if p.requires_grad else None
            if p.grad is not None and worker == 1:
                p.grad *= self.case.loud
            if p.grad is not None and self.case.bad.get(n) == worker and (n % 2 == 0 or i == len(self.groups[0]) // 2):
                p.grad.view(-1)[0] = torch.nan  # in one parameter, or in all
        self._before = flat(self.parameters)
        pairs = list(zip(self.optimizers, self.groups, strict=True))
        for optimizer, group in reversed(pairs) if self.case.second_first else pairs:
            optimizer.step()
            for name in group if self.case.freezes == "others" else ():
                self.parameters[name].requires_grad_(False)

    def _note(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        step = self._before - flat(self.parameters)
        self._before -= step
        self.moved += step


def made(case: Case) -> tuple[Training, LocalUpdates]:
    """Return this worker's training, at x_0, and its `LocalUpdates`."""
    training = Training(case, begin(case.shapes))
    return training, case.local(training)


@dataclass
class Round:
    """An exchange of a fragment that has begun; arrays have a row for each worker."""

    frozen: Tensor  # bool[W, n]
    invalid: Tensor  # bool[W]
    before: Tensor  # x
    flush: Compressor | None
    mean: Tensor | None = None  # float[n]; None: the round is rejected
    rest: Tensor | None = None  # bool[W]: of a flush, not all was sent
    times: tuple[int, ...] = ()  # seconds of the workers' steps
    clips: list[tuple[int, str, float]] = field(default_factory=list)


class Part:
    """A fragment: its coordinates in the vector of the model, compressed ones first."""

    def __init__(self, names: list[str], case: Case, places: Mapping[str, Tensor], order: list[str], of: int) -> None:
        self.names, self.in_order = names, (mine := [name for name in order if name in names])
        self.at = torch.cat([places[name] for name in mine])
        self.shapes = [torch.Size(case.shapes[name]) for name in mine if case.is_compressed(name)]
        self.n, self.of = sum(map(prod, self.shapes)), of  # the number of compressed coordinates, here and in all
        start = sum(len(places[name]) for name in order[: order.index(mine[0])])
        self.seed = case.seed if self.n == of else mix(case.seed, start)
        self.t, self.was_rejected = 0, False
        self.compressor: Compressor | None = None
        self.warm: list[Tensor] | None = None  # LowRank's Q
        self.current: Round | None = None
        self.made: Tensor | None = None  # float[W, 1], each worker's part of the mean when its error memory was made
        self.clips: list[tuple[int, str, float]] = []

    def restricted(self, c: Compressor) -> Compressor:
        """Return the compressor of the whole model for this fragment."""
        c = c if self.n == self.of else c.restrict(0, self.n, self.of)
        return c.for_tensors(self.shapes) if self.n else c


class Twin:
    """The algorithm. A worker's local update u is the sum of its own steps since its last exchange. When an exchange
    begins and when it ends, x = s - u, where s = a - e, or a without `keep_unsent` and where the worker owns."""

    def __init__(self, case: Case, workers: int | None = None) -> None:
        self.case, self.size = case, workers or case.workers
        values = begin(case.shapes)
        self.a = flat(values)
        self.x = self.a.repeat(self.size, 1)
        self.e, self.u, self.owned = torch.zeros_like(self.x), torch.zeros_like(self.x), self.x.isnan()
        sizes = [value.numel() for value in values.values()]
        self.places = dict(zip(values, torch.arange(len(self.a)).split(sizes), strict=True))
        self.trainings = [Training(case, self._views(x)) for x in self.x]
        self.leaves = {name: nn.Parameter(view) for name, view in self._views(self.a).items()}
        self.outer = OUTERS[case.outer](list(self.leaves.values())) if OUTERS[case.outer] else None
        order = sorted(values, key=lambda name: not case.is_compressed(name))
        self.order = torch.cat([self.places[name] for name in order])
        of = sum(len(self.places[name]) for name in order if case.is_compressed(name))
        self.parts = [Part(names, case, self.places, order, of) for names in case.cut()]
        # If a parameter was trained since the last exchange, by worker; or, before the next step, up to that exchange.
        self.seen = [dict.fromkeys(values, True) for _ in range(self.size)]
        self.is_sent = [dict.fromkeys(values, True) for _ in range(self.size)]
        self.segment, self.segment_t = self.a.clone(), 0  # of the escape check
        self.resets: list[tuple[int, bool]] = []
        self.skips = list[tuple[int, ...]]()  # the workers whose updates were invalid, by rejected round
        self.streak = 0
        self.paces = self.following = list(case.paces or (case.every,) * self.size)
        self.times, self.changed = (1,) * self.size, 0  # of a step, as the paces are; rounds with others
        self.made, self.done = [0] * self.size, [0] * self.size  # steps of each worker, and those of this round
        self.waits = set[int]()  # workers whose last step reaches a later tick
        self.traces = [Trace() for _ in range(self.size)]

    def _views(self, vector: Tensor) -> dict[str, Tensor]:
        return {k: vector[at[0] : at[-1] + 1].view(self.case.shapes[k]) for k, at in self.places.items()}

    def s(self) -> Tensor:
        return self.a - self.e * ~self.owned if self.case.keep_unsent else self.a.expand_as(self.x)

    def shares(self) -> Tensor:
        """Return each worker's factor in the mean, float[W, 1]."""
        weight = self.paces if self.case.weight == "steps" else self.case.weight
        w = torch.tensor(weight or (1.0,) * self.size, dtype=torch.float64)
        return (self.size * w / w.sum())[:, None]

    def pending(self) -> Tensor:
        """Return each worker's updates that the anchor does not include, float[W, d]."""
        pending = self.e + self.u
        for part in self.parts:
            pending[:, part.at] = self.carried(part) * self.e[:, part.at] + self.u[:, part.at]
            if part.current is not None and part.current.mean is not None:
                pending[:, part.at] += part.current.mean
        return pending

    def carried(self, part: Part) -> Tensor | float:
        """Return the factor of each error memory, so that it counts as much as with the weights when it was made."""
        return 1.0 if part.made is None else part.made / (self.shares() / self.size)

    def train(self, i: int) -> None:
        """Do the next inner step of worker i."""
        before = self.x[i].clone()
        self.made[i] += 1
        self.done[i] += 1
        n = self.made[i]
        self.trainings[i].step(n, i)
        for name in self.places:
            trained = not self.case.is_frozen(name, i, n)
            self.seen[i][name] = trained or (self.seen[i][name] and not self.is_sent[i][name])
            self.is_sent[i][name] = False
        self.u[i] += before - self.x[i]

    def step(self, n: int) -> None:
        """Do the inner steps up to tick n, and the exchanges that end or begin at it."""
        case, part = self.case, (n - 1) % self.case.every + 1
        if part == 1:
            self.done = [0] * self.size
            self.traces[0].paces.append(list(self.paces))
        for i, pace in enumerate(self.paces if case.is_due(part) else ()):
            while self.done[i] * case.every < part * pace:
                self.train(i)
                if self.done[i] * case.every // pace < part:
                    self.note(i)
                else:
                    self.waits.add(i)
        here = self.paces
        try:
            self.exchange(n)
            self.paces = self.following if part == case.every else here
        finally:
            for i in [i for i in self.waits if self.done[i] * case.every // here[i] == part]:
                self.note(i)
                self.waits.discard(i)
        # Further steps at this tick.
        for i, pace in enumerate(here):
            while self.done[i] < case.last_step(part, pace):
                self.train(i)
                self.note(i)

    def note(self, i: int) -> None:
        """Record a row of worker i."""
        self.traces[i].rows.append(torch.stack([self.x[i], self.a, self.pending()[i]]))

    def measure(self, times: tuple[int, ...]) -> None:
        """Choose other paces after two rounds in which a worker's part of the speeds has changed by over a tenth."""
        now, then = ([1 / t / sum(1 / s for s in both) for t in both] for both in (times, self.times))
        self.changed = self.changed + 1 if any(abs(a / b - 1) > 0.1 for a, b in zip(now, then, strict=True)) else 0
        if self.changed == 2:
            self.following, self.times, self.changed = paces(times, sum(self.paces)), times, 0

    def exchange(self, n: int) -> None:
        case, count = self.case, len(self.parts)
        due = [p for i, p in enumerate(self.parts) if (n + i * case.every // count) % case.every == 0]
        late = n - case.delay
        ended = [p for i, p in enumerate(self.parts) if (late + i * case.every // count) % case.every == 0]
        for part in ended if case.delay else ():
            if part.current is not None:
                self.end(part)
        for part in due:
            self.begin(part, n)
            if not case.delay:
                self.end(part)

    def flush(self, n: int, compressor: Compressor | None) -> None:
        for part in self.parts:
            if part.current is not None:
                self.end(part)
        chosen = [compressor or self.default(part) for part in self.parts]
        for part, c in zip(self.parts, chosen, strict=True):
            self.begin(part, n, c)
            self.end(part)
        for part in self.parts:
            self.switch(part, None)

    def default(self, part: Part) -> Compressor:
        """Four bits where rounds send no more, by owners that do not compress otherwise; else all."""
        case, four, c = self.case, Rounded("int4"), self.case.compressor_at(max(0, part.t - 1))
        few = part.n and part.restricted(c).message_bytes(part.n, 8) <= four.message_bytes(part.n, 8)
        usual = case.exchange in ("auto", "two-way") and case.back is None
        return four if usual and few and self.size > 1 else Identity()

    def switch(self, part: Part, compressor: Compressor | None) -> None:
        """Use a compressor, for which workers may own other coordinates."""
        if compressor != part.compressor:
            part.compressor, part.warm = compressor, None
        self.owned[:, part.at] = False
        for j, a, b in self.chunks(part, compressor):
            self.owned[j, part.at[a:b]] = True

    def chunks(self, part: Part, c: Compressor | None) -> list[tuple[int, int, int]]:
        """Return the owners, where their chunks begin and where they end."""
        exchange = "direct" if c is None or c.lossless else self.case.exchange
        owners = {"two-way": list(range(self.size)), "coordinator": [0]}.get(exchange, [])
        bounds = [part.n * k // len(owners) for k in range(len(owners) + 1)] if owners else []
        return [(j, a, b) for j, (a, b) in zip(owners, pairwise(bounds), strict=True)]

    def frozen(self, worker: int) -> Tensor:
        """Return what neither moves nor is sent, bool[d]: it is frozen, and was since the last exchange."""
        parameters, seen = self.trainings[worker].parameters, self.seen[worker]
        return torch.cat([torch.full((p.numel(),), not (p.requires_grad or seen[k])) for k, p in parameters.items()])

    def begin(self, part: Part, n: int, flush: Compressor | None = None) -> None:
        case, at = self.case, part.at
        c = flush or case.compressor_at(part.t)
        share = self.shares()
        self.switch(part, c)
        frozen = torch.stack([self.frozen(i)[at] for i in range(self.size)])
        self.x[:, at] = torch.where(frozen, self.x[:, at], (self.s() - self.u)[:, at])
        kept = case.decay * self.carried(part) * self.e[:, at]
        v = kept + self.u[:, at]
        xi = None if flush else Noise.of(case.noise).vector(self.a, seed=case.seed, step=part.t)
        if xi is not None:
            v += torch.zeros_like(xi).index_put_((self.order,), xi)[at]
        v[frozen] = 0
        invalid = ~v.isfinite().all(1)
        part.current = r = Round(frozen, invalid, self.x[:, at].clone(), flush)
        if case.weight == "steps" and not case.paces and not flush and n % case.every == 0:
            r.times = case.seconds(n)[: self.size]
        if invalid.any():
            return
        # v is weighted and clipped, and sent.
        factor = torch.ones(self.size, 1, dtype=torch.float64)
        owned = self.owned[:, at]
        own = torch.where(owned & ~frozen, v - kept, v)  # without what is of the mean
        if case.clip is not None:
            norms = own.norm(dim=1, keepdim=True).float().double()
            if (norms > 0).sum() > 2:
                factor = (case.clip * norms[norms > 0].median() / norms).clamp(max=1)
            factor[norms == 0] = 1
            r.clips = [(part.t, str(i), s) for i, s in enumerate(factor[:, 0].tolist()) if s < 1]
        r.rest = (factor[:, 0] < 1) | (not c.lossless)
        sent, r.mean, error = self.average(part, c, v * share * factor)
        # What was not sent is kept, and by its owner that of the mean, so that the next mean has it once; of a
        # parameter that is frozen on some workers alone, C(0) was sent.
        residual = v - sent / share + owned * error / (share / self.size)
        agrees = bool((frozen == frozen[0]).all())
        if agrees:
            r.mean[frozen[0]] = 0
        if case.agreement and flush is None:
            self.lengthen(part, r.mean, torch.where(owned, own * share * factor, sent), share[:, 0])
        carried, now = self.carried(part), share / self.size
        self.e[:, at] = torch.where(frozen, carried * self.e[:, at] + (0 if agrees else residual), residual)
        # A memory is kept in a unit that at most doubles in a round.
        part.made = now if part.made is None else torch.maximum(now, part.made / 2)
        self.e[:, at] *= now / part.made
        self.u[:, at] = torch.where(frozen, self.u[:, at], 0)
        for mine in self.is_sent:
            mine.update(dict.fromkeys(part.names, True))

    def lengthen(self, part: Part, mean: Tensor, sent: Tensor, share: Tensor) -> None:
        """Multiply the mean of each tensor by ((sum_i w_i |q_i|^2) / |D|^2)^(p/2), the ratio held in [1, W]."""
        sizes = [len(self.places[name]) for name in part.in_order]
        for d, rows in zip(mean.split(sizes), sent.split(sizes, 1), strict=True):
            of_workers = [w / self.size * (q / w).square().sum() for w, q in zip(share, rows, strict=True)]
            if d.any():
                ratio = float(sum(of_workers) / d.square().sum())
                d *= min(max(ratio, 1.0), self.size) ** (self.case.agreement / 2)

    def average(self, part: Part, c: Compressor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return C(v_i), where owners have v_i itself, the mean, and its residual, float[n]; the part that is not
        compressed is sent whole."""
        case, n, seed, t = self.case, part.n, part.seed, part.t
        sent, error, w, own = v.clone(), torch.zeros_like(v[0]), v[:, :n], part.restricted(c)
        exchange = "direct" if c.lossless else case.exchange
        mean = v.mean(0)
        if n and exchange in ("two-way", "coordinator"):
            back = part.restricted(case.back or (c if exchange == "two-way" else Identity()))
            for j, a, b in self.chunks(part, c):
                up, down = own.restrict(a, b, n), back.restrict(a, b, n)
                for i in [i for i in range(self.size) if a < b and i != j]:
                    mine = mix(seed, i + 1) if c.private else seed
                    sent[i, a:b] = up(w[i, a:b], mix(mine, j), t)
                if a < b:
                    whole = sent[:, a:b].mean(0)
                    mean[a:b] = down(whole, mix(seed, j, 1), t)
                    error[a:b] = whole - mean[a:b]
        elif n and isinstance(own, LowRank):
            sent[:, :n], part.warm = low_rank(own, w, own.gaussian(w[0], seed=seed, step=t), part.warm)
            mean = sent.mean(0)
        elif n and c.aggregation in ("sketched all-reduce", "projected all-reduce"):
            kept = own.support_of(own.encode(w.mean(0), seed=seed, step=t), n)
            sent[:, :n] = torch.zeros_like(w).index_copy(1, kept, w[:, kept])
            mean = sent.mean(0)
        elif n:
            senders = torch.zeros(n, dtype=torch.float64)
            for i, row in enumerate(w):
                message = own.encode(row, seed=mix(seed, i + 1) if c.private else seed, step=t)
                own.add_decoded(message, sent[i, :n].zero_())
                support = own.support_of(message, n)
                senders[slice(None) if support is None else support] += 1
            mean = sent.mean(0)
            if case.exchange == "senders":
                mean[:n] *= self.size / senders.clamp(min=1)
        return sent, mean, error

    def end(self, part: Part) -> None:
        case, at, r = self.case, part.at, part.current
        assert r is not None
        part.current, part.was_rejected = None, r.mean is None
        if r.times:
            self.measure(r.times)
        if r.mean is None:
            self.reject(part, r)
            return
        part.t += 1
        part.clips += r.clips
        self.streak = self.streak if any(each.was_rejected for each in self.parts) else 0
        # The anchor moves, and x with it.
        mean = torch.zeros_like(self.a).index_put_((at,), r.mean)
        frozen = torch.zeros_like(self.x, dtype=torch.bool).index_copy(1, at, r.frozen)
        if self.outer is None or r.flush:
            self.a -= mean
        else:
            for name in part.names:
                place = self.places[name]
                stays = frozen[:, place].all() if bool((frozen == frozen[0]).all()) else not mean[place].any()
                self.leaves[name].grad = None if stays else self._views(mean)[name].clone()
            self.outer.step()
            self.outer.zero_grad()
        if r.flush:
            assert r.rest is not None
            self.e[:, at] = torch.where(r.frozen | r.rest[:, None], self.e[:, at], 0)
        s = self.s()[:, at]
        x = s - self.u[:, at]
        if r.flush:
            assert r.rest is not None
            x = torch.where(r.rest[:, None], self.a[at], x)
        self.x[:, at] = torch.where(r.frozen, self.x[:, at], x)
        if case.mean_momentum and not r.flush:
            self.mix_momentum(part, mean, frozen)
        if case.escape is not None:
            self.check(part, r)

    def reject(self, part: Part, r: Round) -> None:
        """A worker whose v is not finite goes back, also with what else is not, and forgets such moments."""
        for i, training in enumerate(self.trainings):
            if not r.invalid[i]:
                continue
            for optimizer in training.optimizers:
                for p, state in list(optimizer.state.items()):
                    if any(isinstance(m, Tensor) and not bool(m.isfinite().all()) for m in state.values()):
                        del optimizer.state[p]
            for each in self.parts:
                at = each.at[~self.frozen(i)[each.at]]
                if each is part or not self.x[i, at].isfinite().all():
                    begun = each.current is not None and not each.current.invalid[i]
                    start = self.x[i].index_copy(0, each.at, each.current.before[i]) if begun else self.s()[i]
                    self.x[i, at] = start[at]
                    self.u[i, at] = 0
        self.skips.append(tuple(r.invalid.nonzero().flatten().tolist()))
        self.streak += 1
        if self.case.max_skipped is not None and self.streak > self.case.max_skipped:
            raise NonFiniteError("too many")

    def mix_momentum(self, part: Part, mean: Tensor, frozen: Tensor) -> None:
        c = self.case.mean_momentum
        for i, training in enumerate(self.trainings):
            states = {p: state for optimizer in training.optimizers for p, state in optimizer.state.items()}
            for name in part.names:
                update, state = self._views(mean)[name], states.get(training.parameters[name], {})
                if "exp_avg_sq" in state and update.any() and not frozen[i, self.places[name]].any():
                    m, d = state["exp_avg"], state["exp_avg_sq"].sqrt() * update
                    scale = m.norm() / d.norm()
                    m.copy_((1 - c) * m + c * scale * d if scale.isfinite() else m)

    def check(self, part: Part, r: Round) -> None:
        """Lines 4 to 8 of Algorithm 1, on the anchor."""
        assert self.case.escape is not None
        interval, radius, compare, every = self.case.escape
        y = self.a - self.e.mean(0)
        late = part.t - self.segment_t > interval
        if late or (part.t % every == 0 and (self.segment - y).norm() > radius):
            f = [
                sum(objective(x, i) for i in range(self.size)) for x in (y if compare == "y" else self.a, self.segment)
            ]
            self.a.copy_(y if f[0] < f[1] else self.segment)
            self.resets.append((part.t, f[0] < f[1]))
            self.e.zero_()
            self.segment, self.segment_t, part.warm = self.a.clone(), part.t, None
        rest = r.rest[:, None] if r.flush and r.rest is not None else torch.tensor(False)
        self.x.copy_(torch.where(rest, self.a, self.s()))

    def run(self) -> list["Trace"]:
        """Do all steps; return what there was, by worker."""
        case, traces = self.case, self.traces
        for n in range(1, case.steps + 1):
            here = self.paces
            try:
                self.step(n)
                if n in case.flushes and case.is_quiet(n, here):
                    try:
                        self.flush(n, case.flushes[n])
                    finally:
                        for i in range(self.size):
                            self.note(i)
            except NonFiniteError:
                traces[0].stopped = n
                break
        for trace in traces:
            trace.error = (self.shares() * self.pending()).mean(0)
            trace.paces = traces[0].paces
            trace.rounds, trace.skips = sum(part.t for part in self.parts), self.skips
            trace.skipped = len(self.skips)
            trace.resets, trace.stopped = self.resets, traces[0].stopped
            trace.clips = sorted((clip for part in self.parts for clip in part.clips), key=lambda clip: clip[0])
        return traces


def low_rank(
    c: LowRank, v: Tensor, fresh: list[Tensor], warm: list[Tensor] | None
) -> tuple[Tensor, list[Tensor] | None]:
    """P P^T M_i of each matrix of each worker, where P is a basis of the columns of M Q; and the next (P^T M)^T."""
    sent, following, means = torch.empty_like(v), list[Tensor](), c.matrices(v.mean(0))
    for k, (m, q) in enumerate(zip(means, fresh, strict=True)):
        p = orthonormal(m @ (q if warm is None else warm[k] + 0.1 * q)) if q.numel() else torch.eye(len(m)).to(m)
        for row, out in zip(v, sent, strict=True):
            c.matrices(out)[k].copy_(p @ (p.T @ c.matrices(row)[k]))
        following.append(scaled(p.T @ m).T if q.numel() else q)
    return sent, following if all(q.any() for q in following if q.numel()) else None


@dataclass
class Trace:
    """What there was on one worker after each step."""

    rows: list[Tensor] = field(default_factory=list)  # x, the anchor, and what that does not include: float[3, d]
    moved: list[Tensor] = field(default_factory=list)  # by its own steps alone, float[d]
    marks: list[int] = field(default_factory=list)  # numbers of rows when all workers' anchors are equal
    ends: list[int] = field(default_factory=list)  # those at the ends of rounds
    paces: list[list[int]] = field(default_factory=list)  # of all workers in each round
    rounds: int = 0
    skipped: int = 0
    stopped: int = 0  # the step with a NonFiniteError
    resets: list[tuple[int, bool]] = field(default_factory=list)  # round, and if x was committed
    error: Tensor | None = None  # the mean of all that is pending, float[d], at the end; None after a NonFiniteError
    # Since the last resume:
    skips: list[tuple[int, ...]] = field(default_factory=list)  # the workers named by the rejected rounds
    clips: list[tuple[int, str, float]] = field(default_factory=list)


def train(case: Case, rank: int, *, resumes: bool = False) -> Trace:
    """Run `LocalUpdates` as this worker; with `resumes` in new objects after each step, where all workers can."""
    (training, local), trace, n = made(case), Trace(), 0
    for tick in range(1, case.steps + 1):
        part = (tick - 1) % case.every + 1
        if part == 1:
            done, here = 0, local.paces
            trace.paces.append(list(here))
        is_quiet, last = case.is_quiet(tick, here), case.last_step(part, here[rank])
        try:
            while done < last:
                n, done = n + 1, done + 1
                CLOCK.work(case.seconds(tick)[rank])
                try:
                    training.step(n, rank)
                finally:
                    note(trace, training, local)
            if tick in case.flushes and is_quiet:
                try:
                    local.flush(case.flushes[tick])
                finally:
                    note(trace, training, local)
        except NonFiniteError:
            trace.stopped = tick
            break
        if is_quiet:
            trace.marks.append(len(trace.rows))
            trace.ends += [len(trace.rows)] * (part == case.every)
        if resumes and is_quiet:
            training, local = resumed(training, local)
    trace.error = None if trace.stopped else local.error()
    trace.rounds, trace.skipped, trace.skips = local.rounds, local.skipped, [skip.workers for skip in local.skips]
    trace.resets = [(reset.step, reset.committed) for reset in local.resets]
    trace.clips = [(clip.step, clip.worker, clip.factor) for clip in local.clips]
    assert resumes or len(trace.clips) == local.clipped
    return trace


def note(trace: Trace, training: Training, local: LocalUpdates) -> None:
    """Record a row."""
    trace.rows.append(torch.stack([flat(training.parameters), flat(local.anchor()), local.pending()]))
    trace.moved.append(training.moved.clone())


def resumed(old: Training, local: LocalUpdates) -> tuple[Training, LocalUpdates]:
    """Return new objects with the saved states of others."""
    state, states = local.state_dict(), [optimizer.state_dict() for optimizer in old.optimizers]
    new = Training(old.case, {name: p.detach().clone() for name, p in old.parameters.items()})
    again = old.case.local(new)
    for optimizer, saved in zip(new.optimizers, states, strict=True):
        optimizer.load_state_dict(saved)
    again.load_state_dict(state)
    for p, was in zip(new.parameters.values(), old.parameters.values(), strict=True):
        p.data.copy_(was.detach())  # the new ones began at those of rank 0
        p.requires_grad_(was.requires_grad)
    new.moved = old.moved
    return new, again


def check_twin(case: Case, found: list[Trace]) -> None:
    """Compare all workers with the twin, and their anchors bit for bit."""
    for i, (trace, twin) in enumerate(zip(found, Twin(case, len(found)).run(), strict=True)):
        assert trace.paces == twin.paces
        assert trace.stopped or len(trace.rows) == len(twin.rows)
        for n, (rows, twins) in enumerate(zip(trace.rows, twin.rows, strict=False), start=1):
            where = f"worker {i} after step {n}: "
            torch.testing.assert_close(rows, twins, rtol=1e-9, atol=1e-11, equal_nan=True, msg=where.__add__)
        for mine, first in zip(trace.marks, found[0].marks, strict=True):
            assert torch.equal(trace.rows[mine - 1][1], found[0].rows[first - 1][1]), mine
        for name in ("rounds", "skipped", "skips", "resets"):
            assert getattr(trace, name) == getattr(twin, name), name
        if trace.error is not None:
            torch.testing.assert_close(trace.error, twin.error, rtol=1e-9, atol=1e-11, equal_nan=True)
        # A worker that makes fewer steps than the round has ticks is ahead of the exchange that stops it.
        assert trace.stopped == twin.stopped or (trace.stopped > twin.stopped > 0 and case.weight == "steps")
        assert [clip[:2] for clip in trace.clips] == [clip[:2] for clip in twin.clips]
        assert [clip[2] for clip in trace.clips] == pytest.approx([clip[2] for clip in twin.clips])
