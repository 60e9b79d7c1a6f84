"""A fragment: a set of parameters whose local updates are exchanged together, with their error memory and their anchor
(the parameters on which all workers last agreed).

One exchange of a fragment is a `LocalRound` (module `round`). `Fragment.apply_round` applies its result to the anchor.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.communicator import Communicator
from packsaddle.comm.select_aggregator import warn_if_nothing_compressed
from packsaddle.comm.sharding import is_split, local_part
from packsaddle.compressors import Compressor, Identity, Rounded
from packsaddle.feedback.checks import Contraction
from packsaddle.feedback.compression import Compression
from packsaddle.feedback.guard import THE_UPDATE, Guard
from packsaddle.feedback.memory import ErrorMemory
from packsaddle.feedback.round import ErrorFeedback, SavedAggregator
from packsaddle.feedback.slices import Place, Slice, places
from packsaddle.feedback.state import ANY, Path, Value, Vector, attribute, check_tensor, skip, typed
from packsaddle.local.anchor import Anchor
from packsaddle.local.clipping import Clips
from packsaddle.local.inner import Shards
from packsaddle.local.options import Elastic, LocalOptions
from packsaddle.local.round import LocalRound, SavedExchange
from packsaddle.local.schedule import Schedule, offsets
from packsaddle.local.trained import Trained


class Fragment(Slice):
    """A set of parameters exchanged together, with its anchor, error memory and at most one pending exchange.

    Args:
        places: name, shape and position in the flat vector of each parameter of the fragment (its local shard).
        parameters: all parameters of the optimizers, by name.
        options: options of the local updates.
        channel: the communicator of exchanges.
        device: device of the anchor (the parameters on which all workers last agreed) and of the error memory.
        agree: reductions over the processes of this worker.
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
        d: int,
    ) -> None:
        self.trained = [Trained(parameters[place.name]) for place in places]
        super().__init__(places, device)
        self.options, self.shards = options, agree
        self.parameters = [each.parameter for each in self.trained]
        self.is_sharded = any(hasattr(p, "device_mesh") for p in self.parameters)
        memory, spec = ErrorMemory(self, spare=True), options.compression
        self.anchor = Anchor(self, self.trained, memory, keeps=options.keep_unsent)
        self.contraction = Contraction(spec.monitor_every)
        guard = Guard("extra", unnamed=THE_UPDATE, agree=agree)
        self.feedback = ErrorFeedback(
            memory, channel, guard, self.contraction, seed=options.seed, back=spec.back, whole=d
        )
        self.clips = Clips(logs=isinstance(options.workers, Elastic) or channel.group.rank == 0)
        self.rounds = 0  # t, the number of applied exchanges
        self.current: LocalRound | None = None
        self.was_rejected = False  # True if the last round was rejected; identical on all workers

    @property
    def frozen_next(self) -> list[str]:
        """The names of the parameters that are frozen in the next exchange or, after `LocalRound.begin`, in the
        exchange that has begun."""
        return [name for name, each in zip(self.names, self.trained, strict=True) if not each.requires_grad_next]

    @property
    def trained_parameters(self) -> list[Tensor]:
        return [each.parameter for each in self.trained if each.requires_grad]

    def use(self, compressor: Compressor, owners: Sequence[int] | None = None) -> None:
        """Set the compressor of the following exchanges. In a two-way exchange each of the workers with the ranks
        `owners` averages one chunk of the vector. If `owners` is None, each worker averages one.

        In a two-way exchange the start point, from which this worker's local update is measured, may move; the
        parameters x and the local update do not change. Raises ValueError if the exchange does not support the
        compressor.
        """
        self.feedback.use(compressor, self.options.compression.exchange_of(compressor))
        self.feedback.choice.aggregator.owners = owners
        self.options.check_aggregator(self.feedback.choice.aggregator, sharded=self.is_sharded)
        self.anchor.own(self.feedback.owned)

    def end_flush(self) -> None:
        """Remove the aggregator (which averages messages) of a flush, i.e. of an exchange of all pending updates. Call
        after the flush. A saved state with this aggregator could not be restored, since loading sets the compressor of
        a round, which may differ from the flush's. The parameters do not move."""
        self.feedback.drop_aggregator()
        self.anchor.own(self.feedback.owned)

    def last_compressor(self) -> Compressor:
        """Return the default compressor of a flush, i.e. of an exchange of all pending updates: Rounded("int4"), with
        four bits per value, or Identity.

        It is Identity if there is only one worker, if the exchange is neither "auto" nor "two-way", if it compresses
        the mean again (`Compression.back`), or if the compressor of the last round sends more bytes than
        Rounded("int4").
        """
        spec, four, workers = self.options.compression, Rounded("int4"), self.feedback.channel.group.size
        is_usual = spec.exchange in ("auto", "two-way") and spec.back is None
        sends_less = self.feedback.sends_no_more(self._of_last_round, four)
        return four if workers > 1 and is_usual and sends_less else Identity()

    @property
    def _of_last_round(self) -> Compressor:
        """The compressor of the last round, not counting flushes (exchanges of all pending updates, which may have
        another compressor). If no round was applied yet, it is the compressor of the first round."""
        return self.options.compression.at(max(0, self.rounds - 1))

    def abandon(self) -> None:
        """Wait until the current round ends, ignore its error if it has failed, and roll the round back. No-op if there
        is no current round."""
        if self.current is not None:
            with suppress(Exception):  # an error of the round does not matter, since the round is rolled back
                self.current.call.wait()
            self.roll_back()

    def roll_back(self) -> None:
        """Cancel the current round, if there is one. The error memory is rolled back to its value before the round,
        unless the round was already closed."""
        r, self.current = self.current, None
        if r is not None and r.exchanged is not None:
            r.finish(commit=False)

    def apply_round(self, outer: Optimizer | None) -> LocalRound:
        """Close the current round, apply its mean update to the anchor (the parameters on which all workers last
        agreed), and move the parameters x with the anchor; return the round.

        If the round was rejected, the anchor does not change. A worker whose update was invalid then resets x to the
        point at which it continued after the last exchange; on the other workers x does not change either.
        """
        r = self.current
        assert r is not None
        r.close()
        self.current = None
        if r.applied:
            assert r.mean is not None
            self.rounds += 1
            # A flush includes fewer inner steps than a round, or none. So its mean is subtracted without the outer
            # optimizer, whose momentum would move the anchor as far as after a whole round.
            outer, mean = None if r.flush else outer, r.mean
            if outer is not None and self.options.mean_momentum and isinstance(mean, Tensor):
                # Pass a copy, since torch's foreach SGD changes its gradients in place, and `mean_momentum` uses the
                # mean afterwards.
                mean = mean.clone()
            with self.anchor.fixed_update([] if r.agrees else r.frozen):
                self.anchor.apply_mean(mean, outer, r.frozen if r.agrees else None)
            # A flush that has sent all of v leaves a residual only if v was multiplied by a weight. The residual is
            # then a rounding error, so clear it.
            if r.flush and r.share and not r.leaves_rest:
                for name, e in self._named(self.feedback.memory.vector).items():
                    if name not in r.frozen:
                        e.zero_()
            self.anchor.move(r.before, r.frozen)
            if r.leaves_rest:
                self.anchor.move_to_anchor()
        elif bool(r.invalid):
            self.anchor.move_to_start()
        return r

    def unapplied(self) -> Tensor:
        """Return the updates of this worker that the anchor, on which all workers last agreed, does not include yet,
        float[n]. Call after the current round is closed."""
        p, found = self.current, self.feedback.memory.vector.clone()
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
        """Return the fields of the saved state that belong to this fragment, such as its anchor and its error memory.
        `path` is the prefix of the fields' keys.

        Call after the current round is closed, and call `resume` after loading the fields. An exchange that is closed
        but not yet applied, because of a delay, is saved with its outcome.
        """
        feedback, shapes = self.feedback, {place.name: place.parameter.shape for place in self.places}
        exchange = Value(
            (*path, "exchange"), SavedExchange | None, self._saved_exchange, self._load_exchange, self._check_exchange
        )
        return [
            *self.shared_fields(path),
            *self.contraction.fields((*path, "contraction")),
            attribute((*path, "clipped"), self.clips, "count", int),
            attribute((*path, "rejected"), self, "was_rejected", bool),
            self._trained_field((*path, "trained")),
            Vector((*path, "error", ANY), shapes, lambda: self._named(feedback.memory.vector), self._load_error),
            Vector((*path, "shift", ANY), shapes, lambda: self._named(self.anchor.shift()), skip, optional=True),
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
        self.anchor.owned = self.feedback.owned
        self._fill(self.feedback.memory.vector, saved)

    def resume(self, saved: Mapping[str, Any]) -> None:
        """Restore, from the saved state `saved` of this fragment, the aggregator, which averages messages, and the part
        of the local update that the parameters do not contain (`Anchor.owed`). Call after the saved-state fields are
        loaded."""
        aggregator, self.anchor.owed = typed(SavedAggregator | None, saved["aggregator"]), None
        if aggregator is not None:
            # The saved aggregator was used in the last round or, if an exchange with a delay was running, in that
            # exchange, which `rounds` does not count yet.
            is_delayed = self.current is not None and self.current.applied
            self.use(self.options.compression.at(self.rounds) if is_delayed else self._of_last_round)
            self.feedback.load_aggregator(aggregator)
            self.anchor.own(self.feedback.owned)
        # If this worker owns coordinates (averages them for all workers), `use` has moved its start point, and recorded
        # the move in `owed`. Adding the saved value of `Anchor.shift` cancels that record.
        self._owe(saved["shift"])
        # A delayed exchange will move x to the start point, so clear `owed`, except for frozen parameters.
        if self.current is not None and self.current.applied:
            self.anchor.clear_owed(self.current.frozen)
        self._owe(saved["owed"])

    def _owe(self, saved: Mapping[str, Tensor]) -> None:
        if saved:
            vector = self.zeros().flat
            self._fill(vector, saved)
            self.anchor.owe(vector)

    def _saved_exchange(self) -> SavedExchange | None:
        return None if self.current is None else self.current.saved()

    def _check_exchange(self, saved: SavedExchange | None) -> None:
        vectors = {} if saved is None else {"start": saved.start} | ({"mean": saved.mean} if saved.applied else {})
        for kind, vector in vectors.items():
            for place in self.places:
                check_tensor(f"{kind} of {place.name}", vector.get(place.name), place.parameter.shape)

    def _load_exchange(self, saved: SavedExchange | None) -> None:
        self.current = None if saved is None else LocalRound.loaded(self, saved)

    def _named(self, flat: Tensor | None) -> dict[str, Tensor]:
        return {} if flat is None else self.by_name(flat)

    def _fill(self, flat: Tensor, saved: Mapping[str, Tensor]) -> None:
        """Copy the tensors `saved`, given by parameter name, into the vector `flat`, float[n], in place."""
        for name, view in self.by_name(flat).items():
            view.copy_(saved[name])


def check_compressor(fragments: Sequence[Fragment], spec: Compression, *, stacklevel: int) -> None:
    """Check the compressor of the first round against the model's size, and set it in each of the `fragments`, i.e.
    parts of the model. Raises ValueError if the compressor does not support the number of compressed coordinates, and
    warns if no tensor is large enough to be compressed. Warnings are issued with `stacklevel` as if the caller of this
    function called `warnings.warn`."""
    d = sum(part.compressed_d for part in fragments)
    warn_if_nothing_compressed(spec.at(0), d, spec.dense_below, stacklevel=stacklevel)
    spec.at(0).validate(d)
    for part in fragments:
        part.use(spec.at(0))


def by_parameter(fragments: Iterable[Fragment], vectors: Iterable[Tensor]) -> dict[str, Tensor]:
    pairs = zip(fragments, vectors, strict=True)
    return {place.name: view for part, vector in pairs for place, view in part.named(vector)}


def partition(
    parameters: Mapping[str, Tensor], options: LocalOptions, channel: Communicator, device: torch.device, agree: Shards
) -> tuple[list[Fragment], Schedule]:
    """Split the parameters, in order, into fragments: sets of parameters that are exchanged at different steps. Return
    the fragments and the schedule of their exchanges.

    In a round of `every` steps, the exchange of each fragment begins `every` / P steps before that of the preceding
    fragment, where P is the number of fragments (`Overlap.fragments`). A fragment has either shards of DTensors or
    whole tensors. They are not mixed, since whole tensors must stay identical on all processes of a worker. Raises
    ValueError if `Overlap.fragments` exceeds the number of parameters.
    """
    by_name = {p.name: p for p in places(parameters.items(), options.compression.dense_below, local_part)}
    names, overlap = list(parameters), options.overlap
    d = sum(place.size for place in by_name.values() if not place.dense)
    found, when = list[Fragment](), list[int]()
    parts = _balanced(names, [by_name[name].size for name in names], overlap.fragments)
    for members, offset in zip(parts, offsets(options.every, overlap.fragments), strict=True):
        for split in (True, False):
            mine = [by_name[n] for n in members if is_split(parameters[n]) == split]
            if mine:
                found.append(Fragment(mine, parameters, options, channel, device, agree, d=d))
                when.append(offset)
    return found, Schedule(options.every, overlap.delay, tuple(when))


def _balanced(names: Sequence[str], sizes: Sequence[int], parts: int) -> list[list[str]]:
    """Split a list of parameter names into `parts` consecutive non-empty lists, whose parameters have approximately
    equal numbers of elements in total. `sizes` has the number of elements of each parameter."""
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
