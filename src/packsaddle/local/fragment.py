"""A fragment: some parameters whose local updates are exchanged together, with their anchor and error memory.

The anchor a, float[n] in at least float32, has the parameters on which all workers last agreed. A worker's
pseudo-gradient is its change since then, a - x. One exchange of it is a `Flight`, carried out immediately or during the
next steps, and then applied or rejected.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from packsaddle.comm.aggregators import Averaged
from packsaddle.comm.communicator import Communicator
from packsaddle.comm.sharding import local_part
from packsaddle.compressors import Compressor
from packsaddle.feedback.background import Promise
from packsaddle.feedback.compression import Compression
from packsaddle.feedback.contraction import Contraction
from packsaddle.feedback.guard import Guard
from packsaddle.feedback.memory import ErrorMemory, Update
from packsaddle.feedback.noise import GaussianNoise
from packsaddle.feedback.round import ErrorFeedback, Round
from packsaddle.feedback.slices import Place, Shaped, Slice


@dataclass
class Flight:
    """One exchange of a fragment, from its start until it is applied or rejected."""

    due: int  # the inner step after which it is applied
    round: Round | None  # None once the memory is committed or rolled back
    v: Tensor  # float[n]: decay e + a - x + xi, then its residual
    bad: Tensor  # bool[]: this worker's v is invalid
    name: str = ""  # the first parameter whose part of v is invalid
    before: list[Tensor] = field(default_factory=list)  # x at the start, if it moves until the end; empty: it does not
    averaged: Averaged | None = None
    mean: Tensor | None = None  # float[n], with a delay or an outer optimizer
    verdict: Tensor | None = None  # float[2]: fraction of workers whose v is invalid; the mean's magnitude
    names: list[str] = field(default_factory=list)  # the invalid parameter of each worker, by rank
    taken: bool | None = None  # True: applied; False: rejected; None: not known yet
    headers: Tensor | None = None  # int64[W, 2], calls and steps by rank, still to be compared
    promise: Promise | None = None  # of an exchange in the background
    share: float = 1.0  # weight of this worker's v; 0: it receives the mean but keeps its own update


@dataclass(frozen=True)
class PseudoGradient(Update):
    """The update of a fragment's memory, float[n]: the local update start - x, `Fragment.owed` and shared noise.

    A 16-bit x started at the start point rounded to 16 bits, so the local update is the change since that.
    """

    of: "Fragment"
    decay: float
    noise: GaussianNoise | None

    def add(self, base: Shaped, out: Shaped) -> None:
        """Set out to decay base + start - x + owed + xi, both float[n]; out is not base."""
        share, xs = self.decay, self.of.tensors()
        # v = decay e + start - x, where start = a - e is folded in: (a - x) + (decay - 1) e
        starts: Sequence[Tensor] = self.of.anchor.views
        if self.of.keeps and all(x.dtype == a.dtype for x, a in zip(xs, starts, strict=True)):
            share -= 1.0
        elif self.of.keeps:  # with start rounded to x's precision, so made as a vector
            starts = self.of.starts()
        for x, start, v in zip(xs, starts, out.views, strict=True):
            x = x.to(start.device)
            if x.dtype == start.dtype:
                torch.sub(start, x, out=v)
            else:
                torch.sub(start.to(x.dtype).to(start.dtype), x, out=v)
        if share:
            out.flat.add_(base.flat, alpha=share)
        if self.of.owed is not None:
            out.flat.add_(self.of.owed)
        self.perturb(out.flat)

    def perturb(self, out: Tensor) -> None:
        """Add xi to out, float[n]; its coordinates are those of the vector of all parameters."""
        if self.noise is not None:
            for first, last, start in self.of.stretches():
                self.noise.add_to(out[first:last], 1.0, start)


class Fragment(Slice):
    """Some parameters, their anchor and their error memory.

    `d` is the number of compressed coordinates of all fragments, and `parameters` are the optimizer's, by name, of
    which this process has the parts in `places`.
    """

    def __init__(
        self,
        places: Sequence[Place],
        parameters: Mapping[str, Tensor],
        device: torch.device,
        every: int,
        offset: int,
        compression: Compression,
        channel: Communicator,
        d: int,
        seed: int,
        *,
        agree: Callable[[Tensor], Tensor],
        keep: bool,
    ) -> None:
        super().__init__(places, device)
        self.keeps = keep  # the start point is a - e
        self._every, self._offset = every, offset
        self.parameters = [parameters[place.name] for place in self.places]
        self.anchor = self.zeros()
        self.leaves = [nn.Parameter(view) for view in self.anchor.views]  # the anchor, for an outer optimizer
        self.meet()
        self.monitor = Contraction(compression.monitor_every)
        self._compression = compression
        memory = ErrorMemory(self, spare=True)
        guard = Guard("extra", unnamed="another shard", agree=agree)
        self.feedback = ErrorFeedback(
            self, memory, channel, guard, self.monitor, seed=seed, back=compression.back, whole=d
        )
        self.rounds = 0  # t: applied exchanges
        self.flight: Flight | None = None
        # float[n]: update missing from start - x, because the start moved without x or x was rounded; None: 0
        self.owed: Tensor | None = None

    def is_due(self, step: int) -> bool:
        """Return True if an exchange begins after inner step n, from 1: (n + offset) % every = 0."""
        return (step + self._offset) % self._every == 0

    def until_due(self, step: int) -> int:
        """Return the number of inner steps from n to the next exchange, at least 1."""
        return self._every - (step + self._offset) % self._every

    def tensors(self) -> list[Tensor]:
        """Return this process's part of each parameter; views."""
        return [local_part(p) for p in self.parameters]

    def starts(self) -> list[Tensor]:
        """Return the start point of x after an exchange, by parameter: a, or a - e; may be views of a."""
        if not self.keeps:
            return self.anchor.views
        return self.views(self.anchor.flat - self.feedback.memory.vector)

    def meet(self) -> None:
        """Set the anchor to the current parameters."""
        for a, x in zip(self.anchor.views, self.tensors(), strict=True):
            a.copy_(x)

    def frozen(self, flat: Tensor) -> list[Tensor]:
        """Return the views of the frozen parameters, which receive neither noise nor updates."""
        if all(p.requires_grad for p in self.parameters):
            return []
        return [view for p, view in zip(self.parameters, self.views(flat), strict=True) if not p.requires_grad]

    def start(
        self,
        compressor: Compressor,
        noise: GaussianNoise | None,
        decay: float,
        due: int,
        *,
        later: bool = False,
        share: float = 1.0,
    ) -> Flight:
        """Compute v = decay e + a - x + xi, zeros if it is invalid on any shard of this worker.

        If the exchange ends `later`, at another step, or if the worker keeps its update (a `share` of 0), x continues
        from its current value.
        """
        self._prepare(compressor)
        began = [] if share else [s.to(x, copy=True) for s, x in zip(self.starts(), self.tensors(), strict=True)]
        r = self.feedback.round(self.rounds)
        v = r.correct(PseudoGradient(self, decay, noise))
        before = [x.clone() for x in self.tensors()] if later else began
        self.flight = Flight(due, r, v, r.invalid, r.name, before, share=share)
        return self.flight

    def _prepare(self, compressor: Compressor) -> None:
        """Switch to this compressor's aggregator. The residual of another one is added to e, and x moves with a - e."""
        memory, changes = self.feedback.memory.vector, not self.feedback.uses(compressor)
        before = memory.clone() if self.keeps and changes and self.feedback.owner_errors() else None
        self.use(compressor)
        if before is not None:
            self.owed = memory - before if self.owed is None else self.owed.add_(memory - before)
        if self.owed is not None:
            pairs, self.owed = zip(self.tensors(), self.views(self.owed), strict=True), None
            self._set(x.to(wide(x)) - part.to(x.device, wide(x)) for x, part in pairs)

    def use(self, compressor: Compressor) -> None:
        """Use a compressor. Lossless messages are averaged directly: their mean needs no second compression."""
        self.feedback.use(compressor, "direct" if compressor.lossless else self._compression.exchange)

    def send(self, flight: Flight, step: int, *, senders: bool, dense: bool) -> None:
        """Exchange C(share v) and absorb the residual; collective, possibly in another thread.

        `dense` computes the mean as a vector. So does `senders`, over the workers that sent a coordinate.
        """
        r, channel = flight.round, self.feedback.channel
        assert r is not None
        channel.step = step
        # Line 10: the mean of C(share v), and with it the fraction of invalid vectors.
        g = r.exchange(weight=flight.share)
        fraction = r.verdict.fraction
        assert fraction is not None
        flight.verdict = torch.stack([fraction.double(), torch.as_tensor(r.verdict.magnitude)])
        # Line 12: e <- v - C(share v) / share
        if flight.share:
            r.absorb()
        flight.averaged = g
        if dense or senders:
            flight.mean = self._mean(g, senders=senders)
        if flight.v.device.type == "cpu":
            self.name_bad(flight)

    def name_bad(self, flight: Flight) -> None:
        """Gather the names of invalid parameters if a v is invalid and they are unknown; collective."""
        assert flight.verdict is not None
        if flight.verdict[0] > 0 and not flight.names:
            flight.names = self.feedback.channel.gather_text(flight.name, flight.v.device, "guard")

    def _mean(self, g: Averaged, *, senders: bool) -> Tensor:
        """Return the mean over workers, float[n]; with `senders` that of a coordinate over those that sent it."""
        n, total = self.compressed_d, self.zeros().flat
        for term in g.mean:
            term.add_to(total[:n], 1.0)
        if senders and len(g.mean) > 1:
            counts = torch.zeros_like(total[:n])
            for term in g.mean:
                sent = term.compressor.support_of(term.message, n)
                counts.add_(1.0) if sent is None else counts.index_add_(0, sent, torch.ones_like(counts[: len(sent)]))
            total[:n].mul_(len(g.mean) / counts.clamp_(min=1.0))
        total[n:] = g.dense
        return total

    def finish(self, flight: Flight) -> bool:
        """Read the outcome of a finished exchange; commit or roll back the memory. Return True if it is applied."""
        if flight.taken is None:
            assert flight.verdict is not None
            assert flight.round is not None
            share, magnitude = flight.verdict.tolist()
            flight.taken = share == 0 and magnitude < float("inf")
            self.name_bad(flight)
            self._settle(flight, taken=flight.taken and flight.share > 0)
        return flight.taken

    def _settle(self, flight: Flight, *, taken: bool) -> None:
        assert flight.round is not None
        flight.round.commit() if taken else flight.round.roll_back()
        if taken:
            self.owed = None  # v included it
        self.monitor.close(flight.round.step, apply=taken)
        flight.round = None

    def forget(self) -> None:
        """Cancel the current exchange and roll back the error memory, unless already committed."""
        flight, self.flight = self.flight, None
        if flight is not None and flight.round is not None:
            self._settle(flight, taken=False)

    def land(self, outer: Optimizer | None, blend: float | None) -> Flight:
        """Apply the exchange to the anchor, and move x with it. Returns the flight, which has ended.

        If the exchange is rejected, nothing moves, except that a worker whose v is invalid resets x to its start point.
        """
        flight, self.flight = self.flight, None
        assert flight is not None
        if not self.finish(flight):
            if bool(flight.bad):
                self.restart()
            return flight
        # Line 11: a <- a - mean_i C(v_i), or an outer step with that mean as the gradient of a
        self.rounds += 1
        if flight.mean is None:
            assert flight.averaged is not None
            self.feedback.memory.apply_mean(self.anchor.flat, flight.averaged)
        elif outer is None:
            self.anchor.flat.sub_(flight.mean)
        else:
            for leaf, grad in zip(self.leaves, self.views(flight.mean), strict=True):
                leaf.grad = grad
            outer.step()
            for leaf in self.leaves:
                leaf.grad = None
        # x <- start + (x - before)
        self._move(flight.before, blend)
        return flight

    def _move(self, before: Sequence[Tensor], blend: float | None) -> None:
        """x <- start + (x - before), or with `blend` (1 - blend) start + blend x; x <- start without `before`."""
        if not before:
            self.restart()
            return
        where = zip(self.tensors(), self.starts(), before, strict=True)
        starts = ((x, a.to(x.device, x.dtype).to(wide(x)), s) for x, a, s in where)
        if blend is None:
            self._set((x.to(start.dtype) - s).add_(start) for x, start, s in starts)
        else:
            self._set(torch.lerp(start, x.to(start.dtype), blend) for x, start, _ in starts)

    def _set(self, places: Iterable[Tensor]) -> None:
        """Set x, except frozen parameters, to `places`, at least float32. The rounding error of x is owed."""
        xs = self.tensors()
        rounds = any(x.dtype != wide(x) for x in xs)
        if rounds and self.owed is None:
            self.owed = self.zeros().flat
        owed = self.views(self.owed) if rounds and self.owed is not None else [None] * len(xs)
        for p, x, place, lost in zip(self.parameters, xs, places, owed, strict=True):
            if p.requires_grad:
                x.copy_(place)
                if lost is not None:
                    lost.add_((x.to(place.dtype) - place).to(lost))

    def follow(self, before: Sequence[Tensor]) -> None:
        """Rebase x on the new start point: x <- start + (x - before)."""
        self._move(before, None)

    def restart(self) -> None:
        """Reset x to its start point, with nothing owed."""
        self.owed = None
        if not self.keeps:
            self.go_to(self.anchor.views)
            return
        memory = self.feedback.memory.views
        for p, x, a, e in zip(self.parameters, self.tensors(), self.anchor.views, memory, strict=True):
            if p.requires_grad and x.dtype == a.dtype and x.device == a.device:
                torch.sub(a, e, out=x)
            elif p.requires_grad:
                x.copy_(a - e)

    def go_back(self) -> None:
        """Discard local progress: x <- its value at the start of a running exchange, if valid, or its start point."""
        if self.flight is not None and self.flight.before and not bool(self.flight.bad):
            self.go_to(self.flight.before)
        else:
            self.restart()

    def go_to(self, places: Sequence[Tensor]) -> None:
        """Set x, except frozen parameters, to `places`."""
        for p, x, there in zip(self.parameters, self.tensors(), places, strict=True):
            if p.requires_grad:
                x.copy_(there)

    def unapplied(self) -> Tensor:
        """Return this worker's updates that are not in the anchor, float[n], after the current exchange."""
        flight, found = self.flight, self.feedback.pending().clone()
        starts: Sequence[Tensor] = self.starts()
        if flight is not None and flight.taken:
            assert flight.mean is not None
            starts = flight.before
            found.add_(flight.mean)
        for x, start, view in zip(self.tensors(), starts, self.views(found), strict=True):
            view.add_(start.to(x).to(view) - x.to(view))
        return found if self.owed is None else found.add_(self.owed)

    def state_dict(self) -> dict[str, Any]:
        """Return the fragment's state by parameter, tensors and plain types, after the current exchange."""
        flight = self.flight
        state: dict[str, Any] = {
            "rounds": self.rounds,
            "anchor": self._named(self.anchor.flat),
            "pending": self._named(self.feedback.memory.vector),
            "held": self.feedback.held_state(),
            "owed": {} if self.owed is None else self._named(self.owed),
            "monitor": self.monitor.state_dict(),
            "flight": None,
        }
        # A delayed exchange has its outcome already, and is applied at the step that is due.
        if flight is not None:
            before = {place.name: s.clone() for place, s in zip(self.places, flight.before, strict=True)}
            kept: dict[str, Any] = {"due": flight.due, "taken": flight.taken, "before": before, "mean": {}}
            kept |= {"bad": bool(flight.bad), "names": list(flight.names)}
            if flight.taken:
                assert flight.mean is not None
                kept["mean"] = self._named(flight.mean)
            state["flight"] = kept
        return state

    def load_state_dict(self, state: Mapping[str, Any], compressor: Compressor) -> None:
        """Restore `state_dict`; `compressor` is that of its last round."""
        self.rounds = state["rounds"]
        self.monitor.load_state_dict(state["monitor"])
        memory = self.zeros().flat
        for key, flat in (("anchor", self.anchor.flat), ("pending", memory)):
            for place, view in self.named(flat):
                view.copy_(state[key][place.name])
        self.feedback.drop_aggregator()
        self.feedback.memory.vector.copy_(memory)
        if state["held"]:
            self.use(compressor)
            self.feedback.restore(state["held"])
        self.flight = self._flight(state["flight"]) if state["flight"] else None
        # The residual of another aggregator moves the start point without x, unless a delayed exchange moves x to it.
        owed = self.feedback.memory.vector.sub(memory).mul_(float(self.keeps))
        for place, view in self.named(owed) if state["owed"] else ():
            view.add_(state["owed"][place.name].to(view))
        lands = self.flight is not None and self.flight.taken
        self.owed = owed if not lands and owed.any() else None

    def _flight(self, saved: Mapping[str, Any]) -> Flight:
        device, mean = self.anchor.flat.device, None
        if saved["taken"]:
            mean = self.zeros().flat
            for place, view in self.named(mean):
                view.copy_(saved["mean"][place.name])
        here = self.tensors()
        before = [saved["before"][place.name].to(x, copy=True) for place, x in zip(self.places, here, strict=True)]
        nothing = torch.zeros(0, device=device)
        bad, names = torch.tensor(saved["bad"], device=device), list(saved["names"])
        return Flight(saved["due"], None, nothing, bad, before=before, mean=mean, names=names, taken=saved["taken"])

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        return {place.name: view.clone() for place, view in self.named(flat)}


def wide(x: Tensor) -> torch.dtype:
    """Return the dtype, at least float32, in which x is computed before it is rounded to its own."""
    return torch.promote_types(x.dtype, torch.float32)
