"""A fragment: a set of parameters whose local updates are exchanged together, with their anchor and error memory.

An exchange has four calls. `begin` computes v, the vector to send. `exchange`, collective, runs immediately, or in the
background of the next steps. `close` reads whether the exchange is applied, and commits or rolls back the error memory.
`apply_exchange` applies the mean to the anchor. With workers that join and leave, the round is recorded between the
last two.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.aggregators import Averaged
from packsaddle.comm.communicator import Communicator
from packsaddle.comm.sharding import is_replicated, local_part
from packsaddle.compressors import Compressor, Identity, Rounded
from packsaddle.feedback.checks import Contraction
from packsaddle.feedback.guard import Guard
from packsaddle.feedback.memory import ErrorMemory
from packsaddle.feedback.round import ErrorFeedback, Round, SavedAggregator
from packsaddle.feedback.slices import Place, Slice, places
from packsaddle.feedback.state import ANY, Path, Value, Vector, attribute, check_tensor, skip, typed
from packsaddle.local.anchor import Anchor, PseudoGradient
from packsaddle.local.clipping import Clips, factors_of, norm_of
from packsaddle.local.inner import Shards
from packsaddle.local.options import Elastic, LocalOptions
from packsaddle.local.trained import Trained


@dataclass
class PendingExchange:
    """One exchange of a fragment, from `begin` until it is applied or rejected."""

    due: int  # the inner step after which it is applied
    round: Round | None  # round of the error memory; None: ended, or loaded from a saved state
    invalid: Tensor  # bool[]: this worker's update v is non-finite, or too large to compress
    share: float = 1.0  # weight of this worker's update v; 0: it receives the mean but keeps its update
    frozen: list[str] = field(default_factory=list)  # parameters that were frozen at `begin`, on this worker
    agrees: bool = True  # the same parameters are frozen on all workers, so the exchange does not change them
    owner_errors: list[Tensor] = field(default_factory=list)  # copies from `begin`; empty: no parameter is frozen
    residuals: dict[str, Tensor] = field(default_factory=dict)  # of the frozen parameters, 0 - C(0), by name
    before: list[Tensor] = field(default_factory=list)  # parameters at `begin`; later changes are kept. Empty: none
    wait: Callable[[], bool] = lambda: True  # waits for an exchange in the background, and raises its errors
    mean: Averaged | Tensor | None = None  # the mean of C(v) over workers; float[n] with a delay or an outer optimizer
    names: list[str] = field(default_factory=list)  # name of the invalid parameter on each worker, by rank
    norm: Tensor | None = None  # norm of v, float32[1] (see `norm_of`); None: updates are not clipped
    factors: Tensor | None = None  # clipping factors of all workers' v, float64[W]; None: not clipped
    workers: Sequence[str] = ()  # names of the workers for the log, by rank; empty: log the ranks
    applied: bool | None = None  # True: applied; False: rejected; None: not known yet
    flush: Compressor | None = None  # of a flush: compresses v, without noise; None: an ordinary round
    leaves_rest: bool = False  # a flush that has not sent all of v: x is at the anchor, not at the start point


@dataclass(frozen=True)
class SavedExchange:
    """An exchange that is completed but not yet applied, as stored in a `state_dict`, with its outcome."""

    due: int  # the inner step after which it is applied
    applied: bool  # False: rejected
    invalid: bool  # this worker's update was non-finite, or too large to compress
    names: list[str]  # name of the invalid parameter on each worker, by rank
    start: dict[str, Tensor]  # the parameters at `begin`, by name
    mean: dict[str, Tensor]  # mean update over workers, by parameter; empty if rejected
    frozen: list[str]  # parameters that were frozen at `begin`, on this worker
    agrees: bool  # the same parameters are frozen on all workers


class Fragment(Slice):
    """A set of parameters exchanged together, with its anchor, error memory and at most one pending exchange.

    Args:
        places: name, shape and position in the flat vector of each parameter of the fragment (its local shard).
        parameters: all parameters of the optimizers, by name.
        options: options of the local updates.
        channel: the communicator of exchanges.
        device: device of the anchor and the error memory.
        agree: reduces a bool[] with OR over the processes that have shards of this worker; collective over them.
        offset: number of inner steps by which its exchanges are earlier than those of the first fragment.
        d: the number of compressed coordinates of all fragments.
    """

    def __init__(
        self,
        places: Sequence[Place],
        parameters: Mapping[str, Tensor],
        options: LocalOptions,
        channel: Communicator,
        device: torch.device,
        agree: Shards,
        *,
        offset: int,
        d: int,
    ) -> None:
        self.trained = [Trained(parameters[place.name]) for place in places]
        super().__init__(places, device)
        self._options, self._offset = options, offset
        self.parameters = [each.parameter for each in self.trained]
        self._is_sharded = any(hasattr(p, "device_mesh") for p in self.parameters)
        memory, spec = ErrorMemory(self, spare=True), options.compression
        self.anchor = Anchor(self, self.trained, memory, keeps=options.keep_unsent)
        self.contraction = Contraction(spec.monitor_every)
        guard = Guard("extra", unnamed="another shard", agree=agree)
        self.feedback = ErrorFeedback(
            memory, channel, guard, self.contraction, seed=options.seed, back=spec.back, whole=d
        )
        self.clips = Clips(logs=isinstance(options.workers, Elastic) or channel.group.rank == 0)
        self.rounds = 0  # t: applied exchanges
        self.current: PendingExchange | None = None
        self.was_rejected = False  # the last round; identical on all workers
        self.was_invalid = False  # this worker's last local update

    @property
    def frozen_next(self) -> list[str]:
        """The names of the parameters that are frozen in the next exchange; after `begin`, in this one."""
        return [name for name, each in zip(self.names, self.trained, strict=True) if not each.requires_grad_next]

    @property
    def trained_parameters(self) -> list[Tensor]:
        return [each.parameter for each in self.trained if each.requires_grad]

    def is_due(self, step: int) -> bool:
        """Return True if an exchange begins after inner step n, counted from 1: (n + offset) % every = 0."""
        return (step + self._offset) % self._options.every == 0

    def until_due(self, step: int) -> int:
        """Return the number of inner steps from step n to the next exchange of this fragment, at least 1."""
        return self._options.every - (step + self._offset) % self._options.every

    def begin(self, due: int, share: float, *, later: bool = False, flush: Compressor | None = None) -> PendingExchange:
        """Begin an exchange: compute the vector to send, v = decay e + (start - x) + noise, from the error memory e.

        v is replaced by zeros if it is invalid on any shard of this worker. It is 0 for frozen parameters, which keep
        their error memory.

        Args:
            due: the inner step after which the exchange is applied.
            share: the weight of v in the mean; 0: send nothing, and keep the local update.
            later: `due` is a later step, so the changes of the parameters until then are kept.
            flush: send v with this compressor and without noise; afterwards x is the anchor.
        """
        t, spec = self.rounds, self._options.compression
        noise = None if flush else self._options.noise.drawn(seed=self._options.seed, step=t)
        self.switch_to(flush or spec.at(t))
        for each in self.trained:
            each.begin_exchange()
        frozen = self.frozen_next
        self.anchor.subtract_owed()
        # Compute v, and keep the parameters for later.
        kept = [] if share else self.anchor.copy_starts()
        r = self.feedback.round(t)
        r.correct(PseudoGradient(self.anchor, spec.decay, noise, frozen))
        before = [x.clone() for x in self.anchor.tensors()] if later else kept
        norm = None if self._options.workers.clip is None else norm_of(r.v, share)
        self.current = PendingExchange(due, r, r.invalid, share, frozen, before=before, norm=norm, flush=flush)
        if frozen:
            self.current.owner_errors = [error.clone() for error in self.feedback.owner_errors().values()]
        return self.current

    def switch_to(self, compressor: Compressor) -> None:
        """Use another compressor from now on. The old one's residuals are added to the error memory e, and the start
        point moves with a - e, but x does not. Raises ValueError if the exchange does not support the compressor."""
        changes = not self.feedback.uses(compressor) and self.feedback.owner_errors()
        with self.anchor.fixed_update() if changes else nullcontext():
            self.use(compressor)

    def use(self, compressor: Compressor) -> None:
        self.feedback.use(compressor, self._options.compression.exchange_of(compressor))
        self._options.check_aggregator(self.feedback.choice.aggregator, sharded=self._is_sharded)

    def end_flush(self) -> None:
        """Drop the aggregator of a flush, with its residuals added to the error memory; x does not move. A saved state
        could not restore it, since the next round's compressor may be another one."""
        with self.anchor.fixed_update() if self.feedback.owner_errors() else nullcontext():
            self.feedback.drop_aggregator()

    def last_compressor(self) -> Compressor:
        """Return the compressor of a flush to which none is given: four bits a value, or Identity.

        Identity where rounds send more bits, and where the exchange would send more bytes, or lose more in `back`, than
        Identity.
        """
        spec, four, workers = self._options.compression, Rounded("int4"), self.feedback.channel.group.size
        is_usual = spec.exchange in ("auto", "two-way") and spec.back is None
        sends_less = self.feedback.sends_no_more(self._of_last_round, four)
        is_uneven = self._options.workers.are_uneven
        return four if workers > 1 and is_usual and sends_less and not is_uneven else Identity()

    @property
    def _of_last_round(self) -> Compressor:
        """The compressor of the last round, which is not that of a flush; before the first round, its compressor."""
        return self._options.compression.at(max(0, self.rounds - 1))

    def exchange(self, p: PendingExchange, step: int, norms: Tensor | None = None, *, as_vector: bool) -> None:
        """Exchange C(share v), the compressed and weighted v; set the error memory to the residual; collective.

        It may run in another thread. `norms`, float32[W], are the workers' norms of v, from which v is clipped. With
        `as_vector`, and always with exchange "senders" or a `mean_momentum`, `PendingExchange.mean` is a vector.
        """
        assert p.round is not None
        self.feedback.channel.step = step
        if norms is not None and (limit := self._options.workers.clip) is not None:
            p.factors = factors_of(norms, limit)
        g = p.round.exchange(weight=p.share, clip=self._own_factor(p))
        if p.share:
            p.round.absorb()
            # The frozen parameters, of which zeros were sent, keep their error memory.
            p.residuals = {name: view.clone() for name, view in self.by_name(p.round.v).items() if name in p.frozen}
            self.feedback.memory.keep([self.names.index(name) for name in p.frozen])
        as_vector = as_vector or self._options.averages_senders or self._options.mean_momentum > 0
        p.mean = self._mean(g) if as_vector else g
        # Here, not in `close`: there the main thread's collective could run before another fragment's exchange.
        if p.invalid.device.type == "cpu":
            self.name_workers(p)

    def _own_factor(self, p: PendingExchange) -> Tensor | None:
        return None if p.factors is None else p.factors[self.feedback.channel.group.rank]

    def _mean(self, g: Averaged) -> Tensor:
        """Return the mean update over workers, float[n]; with "senders" each coordinate over its senders only."""
        n, total = self.compressed_d, g.write_to(self.zeros().flat)
        if self._options.averages_senders and len(g.mean) > 1:
            counts = torch.zeros_like(total[:n])
            for term in g.mean:
                sent = term.compressor.support_of(term.message, n)
                counts.add_(1.0) if sent is None else counts.index_add_(0, sent, torch.ones_like(counts[: len(sent)]))
            total[:n].mul_(len(g.mean) / counts.clamp_(min=1.0))
        return total

    def name_workers(self, p: PendingExchange) -> None:
        """Gather from all workers the names of invalid parameters or messages, if there are any; collective."""
        assert p.round is not None
        fraction = p.round.verdict.fraction
        assert fraction is not None
        if fraction != 0 and not p.names:  # above 0: a worker's v is invalid; NaN: a message is
            p.names = self.feedback.channel.gather_text(p.round.name, p.invalid.device, "guard")

    def close(self) -> bool:
        """Wait for the current exchange, and commit or roll back the error memory; idempotent. Returns True if the
        exchange is applied, False if it is rejected. Raises errors of an exchange in the background."""
        p = self.current
        assert p is not None
        if p.applied is None:
            assert p.round is not None
            p.agrees &= p.wait()
            p.applied = p.round.verdict.read()
            self.name_workers(p)
            self._exclude_frozen(p)
            with self.anchor.fixed_update([] if p.agrees else p.frozen):
                self._end(p, commit=p.applied and p.share > 0)
        return p.applied

    def _exclude_frozen(self, p: PendingExchange) -> None:
        """Exclude the frozen parameters from an exchange that has completed. If they are frozen on all workers, their
        anchor and owner errors do not change, else this worker has sent C(0), whose residual is added to e."""
        if not p.agrees and p.round is not None:
            views = self.by_name(p.round.v)
            for name, residual in p.residuals.items():
                views[name].add_(residual)
            return
        for now, old in zip(self.feedback.owner_errors().values(), p.owner_errors, strict=bool(p.frozen)):
            then = self.by_name(old)
            for name, view in self.by_name(now).items():
                if name in p.frozen:
                    view.copy_(then[name])
        for name, mean in self._named(p.mean if isinstance(p.mean, Tensor) else None).items():
            if name in p.frozen:
                mean.zero_()

    def _end(self, p: PendingExchange, *, commit: bool) -> None:
        assert p.round is not None
        p.round.close(apply=commit)
        if commit:
            self.anchor.clear_owed(p.frozen)  # the rest was part of the vector v that was sent
        else:
            for each in self.trained:
                each.cancel_exchange()
        if p.applied and p.factors is not None:
            self.clips.record(p.round.step, p.factors, p.workers)
        self.contraction.close(p.round.step, apply=commit)
        p.round = None

    def abandon(self) -> None:
        """Wait for the current exchange, and roll it back, also if it failed."""
        if self.current is not None:
            with suppress(Exception):  # it may have failed long ago
                self.current.wait()
            self.roll_back()

    def roll_back(self) -> None:
        """Cancel the current exchange and roll back the error memory, unless already committed."""
        p, self.current = self.current, None
        if p is not None and p.round is not None:
            self._end(p, commit=False)

    def apply_exchange(self, outer: Optimizer | None) -> PendingExchange:
        """Close the current exchange, apply its mean to the anchor, and move the parameters x with the anchor; return
        it. After a rejected exchange only a worker with an invalid update moves x, to its start point."""
        p, applied = self.current, self.close()
        assert p is not None
        self.current = None
        if applied:
            assert p.mean is not None
            self.rounds += 1
            # A flush has less than a round's steps, or none: an outer momentum would move the anchor beyond them.
            outer, mean = None if p.flush else outer, p.mean
            if outer is not None and self._options.mean_momentum and isinstance(mean, Tensor):
                mean = mean.clone()  # torch's foreach SGD changes its gradients, and the mean is still needed
            is_clipped = (factor := self._own_factor(p)) is not None and bool(factor < 1)
            p.leaves_rest = p.flush is not None and bool(p.share) and (is_clipped or not p.flush.lossless)
            with self.anchor.fixed_update([] if p.agrees else p.frozen):
                self.anchor.apply_mean(mean, outer, p.frozen if p.agrees else None)
            if p.flush and p.share and not p.leaves_rest:  # a weighted v leaves a residual: its rounding error
                for name, e in self._named(self.feedback.memory.vector).items():
                    if name not in p.frozen:
                        e.zero_()
            self.anchor.move(p.before, p.frozen, self._options.overlap.blend)
            if p.leaves_rest:
                self.anchor.move_to_anchor()
        elif bool(p.invalid):
            self.anchor.move_to_start()
        return p

    def unapplied(self) -> Tensor:
        """Return the updates of this worker that the anchor does not include yet, float[n]. Call after `close`."""
        p, found = self.current, self.feedback.pending().clone()
        if p is None or not p.applied:
            return self.anchor.add_local_update(found)
        assert isinstance(p.mean, Tensor)
        starts = zip(self.names, self.anchor.starts(), p.before, strict=True)
        starts_then = [start if name in p.frozen else before for name, start, before in starts]
        return self.anchor.add_local_update(found.add_(p.mean), starts_then)

    def shared_fields(self, path: Path) -> list[Vector | Value]:
        shapes = {place.name: place.parameter.shape for place in self.places}
        anchor = Vector((*path, "anchor", ANY), shapes, lambda: self._named(self.anchor.flat))
        return [attribute((*path, "rounds"), self, "rounds", int), anchor]

    def fields(self, path: Path) -> list[Vector | Value]:
        """Return this fragment's saved-state fields; `path` is the prefix of their keys.
        Call after `close`; call `resume` after loading. A delayed exchange is saved with its outcome."""
        feedback, shapes = self.feedback, {place.name: place.parameter.shape for place in self.places}
        compressed = {place.name: place.parameter.shape for place in self.places if not place.dense}
        exchange = Value(
            (*path, "exchange"), SavedExchange | None, self._saved_exchange, self._load_exchange, self._check_exchange
        )
        return [
            *self.shared_fields(path),
            *self.contraction.fields((*path, "contraction")),
            attribute((*path, "clipped"), self.clips, "count", int),
            attribute((*path, "rejected"), self, "was_rejected", bool),
            attribute((*path, "invalid"), self, "was_invalid", bool),
            self._trained_field((*path, "trained")),
            Vector((*path, "error", ANY), shapes, lambda: self._named(feedback.memory.vector), self._load_error),
            Vector((*path, "owner_error", ANY), compressed, feedback.owner_errors_by_name, skip, optional=True),
            Vector((*path, "owed", ANY), shapes, lambda: self._named(self.anchor.owed), skip, optional=True),
            Value((*path, "aggregator"), SavedAggregator | None, feedback.aggregator_state, skip),
            exchange,
        ]

    def _trained_field(self, path: Path) -> Value:
        by_name = dict(zip(self.names, self.trained, strict=True))

        def check(saved: Mapping[str, object]) -> None:
            if saved.keys() != by_name.keys():
                raise ValueError(f"trained must be of {', '.join(by_name)}, found {', '.join(saved)}")

        def load(saved: Mapping[str, tuple[bool, bool | None]]) -> None:
            for name, each in by_name.items():
                each.load(saved[name])

        hint = dict[str, tuple[bool, bool | None]]
        return Value(path, hint, lambda: {name: each.state() for name, each in by_name.items()}, load, check)

    def _load_error(self, saved: Mapping[str, Tensor]) -> None:
        self.feedback.drop_aggregator()
        self._fill(self.feedback.memory.vector, saved)

    def resume(self, saved: Mapping[str, Any]) -> None:
        """Restore the aggregator with its residuals, and the unsent change of x, `Anchor.owed`. Call after loading."""
        aggregator, self.anchor.owed = typed(SavedAggregator | None, saved["aggregator"]), None
        if saved["owed"]:
            self.anchor.owed = self.zeros().flat
            self._fill(self.anchor.owed, saved["owed"])
        # If another aggregator saved a residual, e grows by it, so the start point a - e moves, but x does not.
        if aggregator is not None:
            # The aggregator is of the last round, or of a delayed exchange, which is not counted yet.
            is_delayed = self.current is not None and self.current.applied
            with self.anchor.fixed_update():
                self.use(self._options.compression.at(self.rounds) if is_delayed else self._of_last_round)
                self.feedback.restore(aggregator, saved["owner_error"] or {})
        # A delayed exchange will move x to the start point, so nothing is owed then, except of frozen parameters.
        if self.current is not None and self.current.applied:
            self.anchor.clear_owed(self.current.frozen)

    def _saved_exchange(self) -> SavedExchange | None:
        p = self.current
        if p is None:
            return None
        assert p.applied is not None
        start = {place.name: s for place, s in zip(self.places, p.before, strict=True)}
        mean = self._named(p.mean if p.applied and isinstance(p.mean, Tensor) else None)
        return SavedExchange(p.due, p.applied, bool(p.invalid), list(p.names), start, mean, p.frozen, p.agrees)

    def _check_exchange(self, saved: SavedExchange | None) -> None:
        vectors = {} if saved is None else {"start": saved.start} | ({"mean": saved.mean} if saved.applied else {})
        for kind, vector in vectors.items():
            for place in self.places:
                check_tensor(f"{kind} of {place.name}", vector.get(place.name), place.parameter.shape)

    def _load_exchange(self, saved: SavedExchange | None) -> None:
        self.current = None
        if saved is None:
            return
        mean = self.zeros().flat if saved.applied else None
        self._fill(mean, saved.mean)
        here = self.anchor.tensors()
        before = [saved.start[place.name].to(x, copy=True) for place, x in zip(self.places, here, strict=True)]
        invalid = torch.tensor(saved.invalid, device=self.anchor.flat.device)
        self.current = PendingExchange(
            *(saved.due, None, invalid),
            frozen=saved.frozen,
            agrees=saved.agrees,
            before=before,
            mean=mean,
            names=saved.names,
            applied=saved.applied,
        )

    def _named(self, flat: Tensor | None) -> dict[str, Tensor]:
        return {} if flat is None else self.by_name(flat)

    def _fill(self, flat: Tensor | None, saved: Mapping[str, Tensor]) -> None:
        """Copy saved tensors, by parameter, into a vector, float[n]; None: no-op."""
        for name, view in self._named(flat).items():
            view.copy_(saved[name])


def by_parameter(fragments: Iterable[Fragment], vectors: Iterable[Tensor]) -> dict[str, Tensor]:
    pairs = zip(fragments, vectors, strict=True)
    return {place.name: view for part, vector in pairs for place, view in part.named(vector)}


def partition(
    parameters: Mapping[str, Tensor], options: LocalOptions, channel: Communicator, device: torch.device, agree: Shards
) -> list[Fragment]:
    """Split the parameters, in order, into fragments: sets of parameters that are exchanged at different steps.

    Each is due `every` / `fragments` steps before the preceding one. Replicated DTensors are in separate fragments from
    sharded ones, since they must stay identical on all shards. Raises ValueError for more fragments than parameters.
    """
    by_name = {p.name: p for p in places(parameters.items(), options.compression.dense_below, local_part)}
    names = list(parameters)
    d = sum(place.size for place in by_name.values() if not place.dense)
    found = []
    for i, members in enumerate(_balanced(names, [by_name[name].size for name in names], options.overlap.fragments)):
        offset = i * options.every // options.overlap.fragments
        for replicated in (False, True):
            mine = [by_name[n] for n in members if is_replicated(parameters[n]) == replicated]
            if mine:
                found.append(Fragment(mine, parameters, options, channel, device, agree, offset=offset, d=d))
    return found


def _balanced(names: Sequence[str], sizes: Sequence[int], parts: int) -> list[list[str]]:
    """Split a list of names into consecutive non-empty parts of approximately equal total size."""
    if parts > len(names):
        raise ValueError(f"fragments must be at most the number of parameters, {len(names)}, got {parts}")
    total, done, found = sum(sizes), 0, [list[str]() for _ in range(parts)]
    at = 0
    for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
        middle = (done + size / 2) / total if total else 0.0
        left = len(names) - i
        while at < parts - 1 and found[at] and (middle >= (at + 1) / parts or left <= parts - 1 - at):
            at += 1
        found[at].append(name)
        done += size
    return found
