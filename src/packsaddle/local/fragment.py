"""The memory of local updates: `Fragment`, a set of parameters whose local updates are exchanged together, has their
anchor (the parameters on which all workers last agreed) and their error memory. `WholeAnchor` joins the fragments of a
model, and `partition` splits a model into fragments.

The error memory carries the weight with which it was made. The residual of an update that this worker sent with the
part p of the mean, p = w_i / sum_j w_j, still counts p in the mean when it is sent later. So if the part is q in a
later round, the residual is multiplied by p / q there: a change of weights, of paces or of the number of workers moves
no update that was made before.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from packsaddle.comm.communicator import Communicator
from packsaddle.comm.select_aggregator import warn_if_nothing_compressed
from packsaddle.comm.sharding import Shards, is_split, local_part, shard_of, sharded_over
from packsaddle.compressors import Compressor, Identity, Rounded
from packsaddle.feedback.checks import Contraction
from packsaddle.feedback.compression import Compression
from packsaddle.feedback.guard import THE_UPDATE, Guard
from packsaddle.feedback.memory import ErrorMemory
from packsaddle.feedback.round import ErrorFeedback, SavedAggregator
from packsaddle.feedback.slices import Place, Slice, places
from packsaddle.feedback.state import ANY, Path, Value, Vector, attribute, skip, typed
from packsaddle.local.anchor import Anchor, Trained
from packsaddle.local.options import LocalOptions
from packsaddle.numerics.seeds import mix

_GROWTH = 2.0  # the most by which the factor p / q of an error memory changes its unit in one round


class Fragment(Slice):
    """A set of parameters exchanged together, with its anchor and its error memory.

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
        # The seed of the noise and of the compressor's draws. It is identical on all workers. The shards of a worker
        # have different seeds, since equal noise in all shards would leave most directions without noise.
        self.seed = mix(options.seed, *shard) if (shard := shard_of(self.parameters[0])) else options.seed
        self.feedback = ErrorFeedback(memory, channel, guard, self.contraction, seed=self.seed, back=spec.back, whole=d)
        self.rounds = 0  # t, the number of applied exchanges
        self.was_rejected = False  # True if the last round was rejected; identical on all workers
        # The part w_i / sum_j w_j of this worker in the mean for which the error memory was made, in (0, 1]; None: the
        # memory is 0.
        self.made: float | None = None

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
        if compressor != self.feedback.compressor:
            self.feedback.use(compressor, self.options.compression.exchange_of(compressor))
            self.options.check_aggregator(self.feedback.choice.aggregator, sharded=self.is_sharded)
        self.feedback.choice.aggregator.owners = owners
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

    def carried(self, part: float) -> float:
        """Return the factor p / q of the error memory in an exchange in which this worker has the part `part` of the
        mean, q = w_i / sum_j w_j. p is its part when the memory was made. The factor is 1 if q is 0, since nothing is
        sent then."""
        return self.made / part if self.made is not None and part else 1.0

    def note_made(self, part: float) -> None:
        """Note that the error memory is the residual of an exchange in which this worker had the part `part` of the
        mean.

        If the part has become much smaller, the residual is scaled down, to count as much with a larger part. Otherwise
        a worker with a very small weight would continue at a point a - e far from the anchor a.
        """
        if self.made is not None and self.made > _GROWTH * part:
            self.feedback.memory.vector.mul_(_GROWTH * part / self.made)
            part = self.made / _GROWTH
        self.made = part

    def forget(self, rounding: Tensor | None = None) -> None:
        """Set the error memory to zero, or to `rounding`, the rounding error of 16-bit parameters, float[n]."""
        self.feedback.reset(rounding)
        self.made = None

    def unapplied(self, part: float = 0.0) -> Tensor:
        """Return the updates of this worker that the anchor, on which all workers last agreed, does not include yet,
        float[n]: its error memory and its local update. If `part` is not 0, the error memory is multiplied by the
        factor with which it would be sent with this part of the mean (see `carried`)."""
        return self.anchor.add_local_update(self.unsent(part))

    def unsent(self, part: float = 0.0) -> Tensor:
        """Return a copy of the error memory, float[n]. If `part` is not 0, it is multiplied by the factor with which it
        would be sent with this part of the mean (see `carried`)."""
        return self.feedback.memory.vector * self.carried(part)

    def shared_fields(self, path: Path) -> list[Vector | Value]:
        shapes = {place.name: place.parameter.shape for place in self.places}
        anchor = Vector((*path, "anchor", ANY), shapes, lambda: self._named(self.anchor.flat))
        return [attribute((*path, "rounds"), self, "rounds", int), anchor]

    def fields(self, path: Path) -> list[Vector | Value]:
        """Return the fields of the saved state that belong to this fragment, such as its anchor and its error memory.
        `path` is the prefix of the fields' keys. Call while no exchange runs, and call `resume` after loading the
        fields.
        """
        feedback, shapes = self.feedback, {place.name: place.parameter.shape for place in self.places}
        return [
            *self.shared_fields(path),
            *self.contraction.fields((*path, "contraction")),
            attribute((*path, "rejected"), self, "was_rejected", bool),
            attribute((*path, "made"), self, "made", float | None),
            self._trained_field((*path, "trained")),
            Vector((*path, "error", ANY), shapes, lambda: self._named(feedback.memory.vector), self._load_error),
            Vector((*path, "shift", ANY), shapes, lambda: self._named(self.anchor.shift()), skip, optional=True),
            Vector((*path, "owed", ANY), shapes, lambda: self._named(self.anchor.owed), skip, optional=True),
            Value((*path, "aggregator"), SavedAggregator | None, feedback.aggregator_state, skip),
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

    def resume(self, saved: Mapping[str, Any], in_flight: Sequence[str] | None = None) -> None:
        """Restore, from the saved state `saved` of this fragment, the aggregator, which averages messages, and the part
        of the local update that the parameters do not contain (`Anchor.owed`). Call after the saved-state fields are
        loaded.

        If a completed exchange with a delay will be applied later, `in_flight` has the names of the parameters that
        were frozen in it. None: there is no such exchange.
        """
        aggregator, self.anchor.owed = typed(SavedAggregator | None, saved["aggregator"]), None
        if aggregator is not None:
            # The saved aggregator was used in the last round or, if an exchange is to be applied later, in that
            # exchange, which `rounds` does not count yet.
            is_delayed = in_flight is not None
            self.use(self.options.compression.at(self.rounds) if is_delayed else self._of_last_round)
            self.feedback.load_aggregator(aggregator)
            self.anchor.own(self.feedback.owned)
        # If this worker owns coordinates (averages them for all workers), `use` has moved its start point, and recorded
        # the move in `owed`. Adding the saved value of `Anchor.shift` cancels that record.
        self._owe(saved["shift"])
        # A delayed exchange will move x to the start point, so clear `owed`, except for frozen parameters.
        if in_flight is not None:
            self.anchor.clear_owed(in_flight)
        self._owe(saved["owed"])

    def _owe(self, saved: Mapping[str, Tensor]) -> None:
        if saved:
            vector = self.zeros().flat
            self._fill(vector, saved)
            self.anchor.owe(vector)

    def _named(self, flat: Tensor | None) -> dict[str, Tensor]:
        return {} if flat is None else self.by_name(flat)

    def _fill(self, flat: Tensor, saved: Mapping[str, Tensor]) -> None:
        """Copy the tensors `saved`, given by parameter name, into the vector `flat`, float[n], in place."""
        for name, view in self.by_name(flat).items():
            view.copy_(saved[name])


class WholeAnchor:
    """The anchor of the whole model, i.e. the parameters on which all workers last agreed. It joins the anchors of the
    `fragments`, the parts of the model that are exchanged separately. `names` are the names of all parameters, in the
    order in which the optimizers have them."""

    def __init__(self, fragments: Sequence[Fragment], names: Iterable[str]) -> None:
        self._fragments, self._names = fragments, list(names)
        self.open = 0  # number of open `at_anchor` contexts, which may be nested

    @torch.no_grad()
    def set_from_parameters(self) -> None:
        for part in self._fragments:
            part.anchor.set_from_parameters()

    def leaves(self) -> dict[str, Tensor]:
        """Return the tensors of the anchor, on which all workers last agreed, by name of the parameter. The tensors are
        nn.Parameters, so that an outer optimizer can make its steps on them."""
        leaves = {n: a for part in self._fragments for n, a in zip(part.names, part.anchor.leaves, strict=True)}
        return {name: leaves[name] for name in self._names}

    def copy(self) -> dict[str, Tensor]:
        found = by_parameter(self._fragments, [part.anchor.flat for part in self._fragments])
        return {name: found[name].clone() for name in self._names}

    def joined(self, vectors: Iterable[Tensor]) -> Tensor:
        """Concatenate `vectors`, one for each fragment (part of the model), into one vector, float[d], in which
        parameters are in the order in which the optimizers have them."""
        found = by_parameter(self._fragments, vectors)
        return torch.cat([found[name].reshape(-1) for name in self._names])

    @torch.no_grad()
    def is_left(self) -> bool:
        """Return True if a parameter of this worker differs from the anchor, on which all workers last agreed. Returns
        False within `at_anchor`."""
        pairs = [(x, a) for f in self._fragments for x, a in zip(f.anchor.tensors(), f.anchor.views, strict=True)]
        return not self.open and any(not torch.equal(x, a.to(x.device, x.dtype)) for x, a in pairs)

    @contextmanager
    def at_anchor(self) -> Iterator[None]:
        """Context manager within which the parameters are set to the anchor, on which all workers last agreed."""
        before = [x.clone() for part in self._fragments for x in part.anchor.tensors()]
        with torch.no_grad():
            for part in self._fragments:
                part.anchor.set_parameters(part.anchor.views)
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1
            xs = [x for part in self._fragments for x in part.anchor.tensors()]
            with torch.no_grad():
                for x, old in zip(xs, before, strict=True):
                    x.copy_(old)


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
) -> tuple[list[Fragment], tuple[int, ...]]:
    """Split the parameters, in order, into `Overlap.fragments` parts, which are exchanged at different steps. Return
    the fragments, and for each the index of its part.

    Of a part with DTensors, the whole tensors form one fragment, and the tensors that are sharded over the same
    dimensions of a mesh form one fragment. They are not mixed, since a tensor must stay identical on all processes that
    have the same shard of it. Raises ValueError if `Overlap.fragments` exceeds the number of parameters.
    """
    by_name = {p.name: p for p in places(parameters.items(), options.compression.dense_below, local_part)}
    names = list(parameters)
    d = sum(place.size for place in by_name.values() if not place.dense)
    found, part_of = list[Fragment](), list[int]()
    parts = _balanced(names, [by_name[name].size for name in names], options.overlap.fragments)
    for i, members in enumerate(parts):
        kinds: dict[Any, list[Place]] = {}
        for name in sorted(members, key=lambda name: not is_split(parameters[name])):
            kinds.setdefault(sharded_over(parameters[name]), []).append(by_name[name])
        for mine in kinds.values():
            found.append(Fragment(mine, parameters, options, channel, device, agree, d=d))
            part_of.append(i)
    return found, tuple(part_of)


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
