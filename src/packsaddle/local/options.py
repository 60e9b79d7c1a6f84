"""Option classes of `LocalUpdates`: overlap of exchanges with training, workers, and the step by which the workers'
mean update is applied."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, Protocol

import torch
from torch.optim import Optimizer

from packsaddle.comm.aggregators import Aggregator, AllGather, AllReduce
from packsaddle.comm.group import Group, ProcessGroup, resolve
from packsaddle.comm.managed import processes_of
from packsaddle.comm.owner_aggregators import TwoWay
from packsaddle.comm.sites import DeviceMesh
from packsaddle.errors import check_integers, check_momentum, check_positive
from packsaddle.feedback.compression import Compression
from packsaddle.feedback.escape import Escape
from packsaddle.feedback.noise import Noise
from packsaddle.local.schedule import Every
from packsaddle.options.agreement import Option, own
from packsaddle.options.numerals import duration

Outer = Callable[[list[Any]], Optimizer]


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_options(options: "Workers | Elastic") -> None:
    """Validate `clip` and `compare_optimizers`, the fields that `Workers` and `Elastic` have in common. Raises
    ValueError if `clip` is out of range, and TypeError if `compare_optimizers` is not a bool."""
    clip = options.clip
    if not isinstance(options.compare_optimizers, bool):
        raise TypeError(f"compare_optimizers must be True or False, got {options.compare_optimizers!r}")
    if clip is not None and not (_is_number(clip) and 1 <= clip < math.inf):
        raise ValueError(f"clip must be finite and at least 1, or None, got {clip!r}")


@dataclass(frozen=True)
class Overlap(Option):
    """The overlap of exchanges with training, as in Streaming DiLoCo (2025).

    Arguments of this type also accept an integer, as short for `Overlap(delay)`.

    Args:
        delay: inner steps during which an exchange runs, at least 0 and below `every`. When the exchange ends, x
            becomes s plus the change of x during the exchange. Here x are the worker's parameters and s is its new
            start point, the anchor a or, with `keep_unsent`, a - e. A delay above 0 needs memory for a copy of the
            exchanged parameters.
        fragments: P, the number of parts into which the model is split. Each part has consecutive parameters, and all
            parts have about equal numbers of elements. The exchanges of consecutive parts are every / P steps apart. P
            is at least 1, and at most `every` and the number of parameters.

    Raises ValueError for a setting that is out of range.

    >>> import torch
    >>> from packsaddle import LocalUpdates, Overlap
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    >>> local = LocalUpdates(torch.optim.AdamW(model.parameters()), every=30, overlap=Overlap(4, fragments=2))
    """

    delay: int = 0
    fragments: int = 1

    def __post_init__(self) -> None:
        check_integers(0, delay=self.delay)
        check_integers(1, fragments=self.fragments)


@dataclass(frozen=True)
class Workers(Option):
    """A fixed set of workers, and their weights in the mean of the local updates (McMahan et al. 2017, Algorithm 1).

    Arguments of this type also accept a process group or a DeviceMesh, as short for `Workers(group)`.

    Args:
        group: the process group of the workers. By default it is torch's default group or, if there is none, this
            process alone. A DeviceMesh of two or more dimensions has sites as workers: its first dimension numbers the
            sites, and the other dimensions number the processes of a site, which train one model with
            DistributedDataParallel, FSDP2 or tensor parallelism. Each process exchanges its part of the model with its
            peers in the other sites.
        weight: w_i > 0, the weight of this worker in the mean sum_i w_i C(v_i) / sum_i w_i of the compressed updates,
            such as its number of examples. If it is set on one worker, it must be set on all. By default weights are
            equal. With "steps" each worker makes its own number of inner steps in a round, its pace, such that all
            workers end the round together. The pace is then the worker's weight. The paces follow from the measured
            times of the workers' steps, and their sum is W times `every`, where W is the number of workers. The paces
            are equal at first, and are chosen anew after two consecutive rounds in which the speed of a worker, as a
            fraction of the sum of all speeds, differs by more than a tenth from its value at the last choice.
            `LocalUpdates.paces` returns the paces. Training should end after a number of rounds
            (`LocalUpdates.rounds`), not of steps, since numbers of steps differ between workers.
        steps: fixed paces for weight="steps", i.e. the number of inner steps in a round of each worker, by rank, such
            as [12, 4]. A run with fixed paces measures no times, and is bitwise reproducible. If None, the paces follow
            from measured times.
        clip: c, at least 1: the norm of a worker's update, before it is multiplied by the weight, is limited to c times
            the median of the norms of the workers' updates in the round. The rest of the update stays in the worker's
            error memory, and is sent in later rounds. If all updates of a worker are limited, its error memory grows
            (see `Compression.decay`). Norms of 0 do not count, and a round with fewer than three other norms clips
            nothing, since a median of two updates cannot tell which one is wrong. Each worker scales its own update, so
            clipping guards against wrong data and faulty hardware, but not against a worker that reports a wrong norm.
            `LocalUpdates.clips` lists clipped updates. By default there is no limit.
        compare_optimizers: at construction, raise ValueError if the workers' inner optimizers differ in class or in a
            setting of a parameter group, such as the learning rate. If the optimizers should differ, set it to False on
            all workers.

    With a weight, neither escape checks nor the exchange "senders" (see `Compression`) are supported. Raises ValueError
    for a setting that is out of range, and TypeError if compare_optimizers is not a bool.

    >>> import torch
    >>> from packsaddle import LocalUpdates, Workers
    >>> optimizer = torch.optim.SGD(torch.nn.Linear(64, 64).parameters(), lr=0.1)
    >>> local = LocalUpdates(optimizer, every=30, workers=Workers(weight=1000.0))
    """

    group: Any = own(None)
    weight: float | Literal["steps"] | None = own(None)
    clip: float | None = None
    compare_optimizers: bool = True
    steps: Sequence[int] | None = None

    def __post_init__(self) -> None:
        weight, steps = self.weight, self.steps
        if not (weight is None or weight == "steps") and not (_is_number(weight) and 0 < weight < math.inf):
            raise ValueError(f'weight must be finite and above 0, "steps" or None, got {weight!r}')
        if steps is not None:
            if weight != "steps" or not isinstance(steps, Sequence):
                raise ValueError(f'steps must be numbers by rank with weight="steps", else None, got {steps!r}')
            check_integers(1, **{f"steps[{rank}]": n for rank, n in enumerate(steps)})
            object.__setattr__(self, "steps", tuple(steps))
        _check_options(self)


@dataclass(frozen=True)
class Elastic(Option):
    """Settings of a worker in a run whose workers join and leave during training (see `LocalUpdates`).

    Arguments of this type also accept a Manager, as short for `Elastic(manager)`. Delays and escape checks are not
    supported, nor is any exchange except "direct" and "two-way" (see `Compression`). In a two-way exchange, each worker
    that sends an update in a round averages one chunk of the vector. The chunks have equal sizes, so they change if
    other workers send updates in the next round.

    A worker may be a site: all processes in torch's default group, each with a Manager from `connect(..., site=True)`.
    The processes of a site train one model with DistributedDataParallel or FSDP2, and join, leave and vote together.
    Only in a site may parameters be DTensors, and then all parameters must be sharded.

    Args:
        manager: a torchft Manager with use_async_quorum=False (see `packsaddle.comm.connect`). In a site it must also
            have init_sync=False, so the script must set equal initial parameters in all sites.
        weight: the worker's weight in the mean. By default it is 1, or 0 if the worker has not stepped since the last
            round that included its update. With "steps" it is the number of the worker's inner steps since that round.
            With a function that returns a running total, such as the worker's number of tokens, it is the increase of
            the total since that round, summed over the processes of a site. If `weight` is not None, a slower worker
            makes fewer inner steps in a round and a faster one makes more, so that all W workers end the round
            together. The sum of their steps is W times the number of steps between two rounds, which is `every` divided
            by the number of fragments (see `Overlap`).
        patience: seconds, above 0, after which PeerLostError is raised if no round was committed. `patience` and
            `grace` are numbers, or text such as "90s" or "2min".
        leave_on_sigterm: on SIGTERM send all unsent updates (the error memory and the local update), uncompressed, in
            one more round, and end the process. The current inner step, or the wait for other workers, then raises
            SystemExit. The exit code is 0. It is 1 if updates are lost because that round was not committed. The
            processes of a site leave together, after an inner step or a round; while they wait for other workers, they
            wait for the round or the end of `grace`.
        grace: seconds, above 0, after SIGTERM or a call of `leave`, in which the round that sends the worker's unsent
            updates must be committed.
        clip: limit on the norm of a worker's update, as a multiple of the median norm of the workers' updates in the
            round (see `Workers.clip`). By default there is no limit.
        compare_optimizers: when a worker joins, raise ConfigError if its inner optimizers differ from those of the
            other workers in class or in a default setting, and start them at another worker's state. If the optimizers
            should differ, set it to False on all workers; a new worker's optimizers then start without a state.
        group: the manager's existing `ManagedGroup`; by default a new one.

    Raises TypeError if manager is not a Manager or compare_optimizers is not a bool, and ValueError for a setting that
    is out of range.

    >>> from packsaddle import Elastic, LocalUpdates  # doctest: +SKIP
    >>> from packsaddle.comm import connect  # doctest: +SKIP
    >>> elastic = Elastic(connect("http://10.0.0.1:29510"), weight="steps")  # doctest: +SKIP
    >>> local = LocalUpdates(optimizer, workers=elastic)  # doctest: +SKIP
    """

    manager: Any = own(None)
    weight: Literal["steps"] | Callable[[], float] | None = own(None)
    patience: float | str = own(3600.0)
    leave_on_sigterm: bool = own(True)
    grace: float | str = own(25.0)
    clip: float | None = None
    compare_optimizers: bool = True
    group: Any = own(None)

    @property
    def is_site(self) -> bool:
        """True if this worker is a site, i.e. if its manager belongs to several processes."""
        return processes_of(self.manager) > 1

    def __post_init__(self) -> None:
        if not hasattr(self.manager, "start_quorum"):
            raise TypeError(f"manager must be a torchft Manager, got {type(self.manager).__name__}")
        if self.is_site and getattr(self.manager, "_init_sync", False):
            raise ValueError("manager of a site must have init_sync=False: processes would begin at different anchors")
        if getattr(self.manager, "_use_async_quorum", False):
            raise ValueError("manager must have use_async_quorum=False: state must not change between two rounds")
        if not (self.weight is None or self.weight == "steps" or callable(self.weight)):
            raise ValueError(f'weight must be None, "steps" or a function, got {self.weight!r}')
        _check_options(self)
        for name in ("patience", "grace"):
            seconds = duration(getattr(self, name), name)
            if not seconds > 0:
                raise ValueError(f"{name} must be above 0 seconds, got {getattr(self, name)!r}")
            object.__setattr__(self, name, seconds)


class Manager(Protocol):
    """The interface of a torchft Manager, for type annotations."""

    def start_quorum(self, *args: Any, **kwargs: Any) -> Any: ...

    def should_commit(self, *args: Any, **kwargs: Any) -> bool: ...


# Type of the argument `workers` of `LocalUpdates`.
AnyWorkers = Workers | Elastic | Group | ProcessGroup | DeviceMesh | Manager | None


@dataclass(frozen=True)
class OuterSGD(Option):
    """DiLoCo's outer optimizer, Nesterov SGD, with DiLoCo's defaults.

    In each round it makes a step on the anchor (the parameters on which all workers last agreed), with the workers'
    mean update as the gradient.

    Args:
        lr: the learning rate, above 0. It scales the workers' mean update, and is applied once per round.
        momentum: the momentum, in [0, 1).
        nesterov: use Nesterov's form; by default True if momentum is above 0.

    Raises ValueError for a setting that is out of range.

    >>> import torch
    >>> from packsaddle import LocalUpdates, OuterSGD
    >>> optimizer = torch.optim.AdamW(torch.nn.Linear(64, 64).parameters())
    >>> local = LocalUpdates(optimizer, every=30, outer=OuterSGD())
    """

    lr: float = 0.7
    momentum: float = 0.9
    nesterov: bool | None = None

    def __post_init__(self) -> None:
        check_positive(lr=self.lr)
        check_momentum(self.momentum, self.nesterov)
        if not (self.nesterov is None or isinstance(self.nesterov, bool)):
            raise ValueError(f"nesterov must be True, False or None, got {self.nesterov!r}")

    def __call__(self, anchors: list[Any]) -> Optimizer:
        nesterov = self.momentum > 0 if self.nesterov is None else self.nesterov
        return torch.optim.SGD(anchors, lr=self.lr, momentum=self.momentum, nesterov=nesterov)


@dataclass(frozen=True)
class OuterAgreement(Option):
    """A rule for the outer step: the more the workers' updates of a tensor differ, the more their mean is lengthened.

    The outer step, set by `LocalUpdates.outer`, applies the mean update to the anchor, i.e. to the parameters on which
    all workers last agreed. The mean of the workers' updates has a smaller norm than the updates, since their noise
    cancels in the mean. The mean is multiplied by r^p. Here r is the root mean square of the norms of the updates,
    divided by the norm of the mean (see `local.round`). If all workers send the same update, r is 1. Each exchange
    sends four more bytes per tensor. The mean update of a `flush` is not multiplied.

    Args:
        p: the exponent, in [0, 1]; 0 leaves the mean update unchanged.
        then: the outer optimizer that gets the lengthened mean update as its gradient, such as `OuterSGD(lr=1.0,
            momentum=0.5)`. By default the lengthened mean update is subtracted from the anchor.

    Raises ValueError if p is out of range.

    >>> import torch
    >>> from packsaddle import LocalUpdates, OuterAgreement
    >>> optimizer = torch.optim.AdamW(torch.nn.Linear(64, 64).parameters())
    >>> local = LocalUpdates(optimizer, outer=OuterAgreement())
    """

    p: float = 0.5
    then: Outer | None = own(None)  # a function is not compared between workers; the optimizer that it returns is

    def __post_init__(self) -> None:
        if not (_is_number(self.p) and 0 <= self.p <= 1):
            raise ValueError(f"p must be in [0, 1], got {self.p!r}")


AnyOuter = Outer | OuterAgreement | None  # type of the argument `outer` of `LocalUpdates`


@dataclass(frozen=True)
class LocalOptions(Option):
    """The arguments of `LocalUpdates` that are options, such as `every` and `workers`, as one value. Raises ValueError
    or TypeError for invalid options, and ValueError for options that exclude each other.
    """

    compression: Compression
    every: Every
    outer: Outer | None = own(None)  # a function is not compared between workers; the optimizer that it returns is
    agreement: float = 0.0  # p of `OuterAgreement`; 0: the mean update is not lengthened
    mean_momentum: float = 0.0
    overlap: Overlap = Overlap()
    workers: Workers | Elastic = Workers()
    noise: Noise = Noise()  # noqa: RUF009 -- immutable
    escape: Escape | None = None
    keep_unsent: bool = True
    offload: bool = own(False)
    seed: int = 0

    def __post_init__(self) -> None:
        # Check the options of the rounds and the error memory.
        overlap, spec = self.overlap, self.compression
        if callable(self.every):  # its numbers are checked when a round begins
            unequal = getattr(self.workers, "weight", None) == "steps"
            if isinstance(self.workers, Elastic) or unequal:
                where = "with a manager" if isinstance(self.workers, Elastic) else 'with weight="steps"'
                raise ValueError(f"every must be a number {where}, got a function")
        else:
            self._check_every(self.every)
        if not (_is_number(self.mean_momentum) and 0 <= self.mean_momentum <= 1):
            raise ValueError(f"mean_momentum must be in [0, 1], got {self.mean_momentum!r}")
        # Convert 1 to 1.0, since workers compare their arguments as text, in which 1 and 1.0 differ.
        object.__setattr__(self, "mean_momentum", float(self.mean_momentum))
        # Check types here, since an object of a wrong type would raise an error only later, or would count as True.
        for name in ("keep_unsent", "offload"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not (self.escape is None or isinstance(self.escape, Escape)):
            raise TypeError(f"escape must be an Escape or None, got {self.escape!r}")
        outer: Any = self.outer
        if not (outer is None or callable(outer)) or isinstance(outer, type):
            expected = "OuterSGD(), OuterAgreement(), a function of the anchor's tensors that returns a torch optimizer"
            found = f"an optimizer, {type(outer).__name__}" if isinstance(outer, Optimizer) else repr(outer)
            # A class such as torch.optim.SGD could be called too, but would then use its default learning rate, 0.001.
            if isinstance(outer, type):
                found = f"the class {outer.__name__} itself, which leaves its settings open"
            raise TypeError(f"outer must be {expected}, or None, got {found}")
        if not spec.decay:
            raise ValueError(f"decay must be in (0, 1] for local updates, got {spec.decay!r}")
        self.noise.check_eager()

        # Raise ValueError for options that elastic workers, or fixed workers with weights, do not support.
        if isinstance(self.workers, Elastic):
            self._check_plain("with a manager")
            if overlap.delay:
                raise ValueError(f"delay must be 0 with a manager, got {overlap.delay}")
        elif self.workers.weight is not None:
            self._check_plain("with weight")

    def _check_every(self, every: int) -> None:
        check_integers(1, every=every)
        overlap = self.overlap
        if overlap.fragments > every:
            raise ValueError(
                f"overlap.fragments must be at most every = {every}, so that no two are exchanged after one step, "
                f"got {overlap.fragments}"
            )
        if overlap.delay >= every:
            raise ValueError(
                f"overlap.delay must be below every = {every} steps, so that an exchange ends before the next one "
                f"begins, got {overlap.delay}"
            )

    @classmethod
    def of(
        cls, compressor: Any, overlap: Any, workers: Any, noise: Any, outer: AnyOuter = None, **others: Any
    ) -> "LocalOptions":
        """Convert arguments of `LocalUpdates` to `LocalOptions`. In place of an option class, such as `Overlap` or
        `Workers`, an argument may be the value of the class's first field: a number, a process group or a Manager."""
        overlap = overlap if isinstance(overlap, Overlap) else Overlap(overlap)
        p, outer = (float(outer.p), outer.then) if isinstance(outer, OuterAgreement) else (0.0, outer)
        if hasattr(workers, "start_quorum"):
            workers = Elastic(workers)
        elif isinstance(workers, Real):
            raise TypeError(
                f"workers must be a process group, a DeviceMesh, Workers or Elastic, got {workers!r}: the launcher "
                f"sets their number"
            )
        elif not isinstance(workers, Workers | Elastic):
            try:
                if not isinstance(workers, DeviceMesh):
                    resolve(workers)
            except TypeError:
                expected = "a process group, a DeviceMesh, Workers or Elastic"
                raise TypeError(f"workers must be {expected}, got {workers!r}") from None
            workers = Workers(workers)
        compression = Compression.of(compressor, "auto")
        # The exchange "auto" depends on the number of workers, which elastic workers do not know in advance.
        if isinstance(workers, Elastic) and compression.exchange == "auto":
            compression = replace(compression, exchange="direct")
        given = {"overlap": overlap, "workers": workers, "noise": Noise.of(noise), "outer": outer, "agreement": p}
        return cls(compression, **given, **others)

    def _check_plain(self, where: str) -> None:
        if self.escape is not None:
            raise ValueError(f"escape must be None {where}: its checks are of the mean of all workers")
        if self.compression.exchange == "senders":
            raise ValueError(f'exchange must not be "senders" {where}')

    def check_aggregator(self, aggregator: Aggregator, *, sharded: bool) -> None:
        """Raise ValueError if the setting `workers` does not support the aggregator, which averages messages. Also
        raise ValueError if `sharded` is True, i.e. if the parameters are DTensors, and workers join and leave
        (`Elastic`) without being sites."""
        if not isinstance(self.workers, Elastic):
            return
        if sharded and not self.workers.is_site:
            raise ValueError(
                "parameters must be whole on each worker with a manager of one process, and some are DTensors: "
                "make that of a site, connect(..., site=True)"
            )
        if not isinstance(aggregator, AllReduce | AllGather | TwoWay):
            name = type(aggregator).__name__
            raise ValueError(
                f"compressor and exchange must average messages directly or two-way with a manager (TopK, RandomK, "
                f"Rounded, QSGD, Sign, Identity, LinearSketch, not what {name} needs): others need one set of workers"
            )
