"""The anchor of a fragment (parameters exchanged together), and changes of the parameters x relative to it.

The anchor a, float[n] in at least float32, is the values of the parameters on which all workers last agreed. After an
exchange a worker continues from its start point: a, or a - e with `keep_unsent`, where e is its error memory. Its local
update is start - x, where x are its parameters now. In a two-way exchange each of the W workers averages one chunk of
the vector for all workers. At the coordinates of its own chunk a worker always continues from a, even with
`keep_unsent`, since its e contains W times the residual of a mean there. A frozen parameter x does not move. If the
start point of a frozen parameter moves, `Anchor.owed` records by how much.

`Trained` records when a parameter was frozen, and `OuterOptimizer` steps on the anchor.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from packsaddle.comm.aggregators import Averaged
from packsaddle.comm.sharding import local_part
from packsaddle.feedback.memory import ErrorMemory, Update
from packsaddle.feedback.noise import GaussianNoise
from packsaddle.feedback.optimizers import parameters_of
from packsaddle.feedback.slices import Shaped, Slice
from packsaddle.feedback.state import Value
from packsaddle.local.options import Outer
from packsaddle.messages import shown
from packsaddle.numerics.devices import all_to_host, assign, to_device


class Trained:
    """A parameter, with a record of when it was frozen (requires_grad=False). A parameter counts as frozen in an
    exchange if it is frozen now, and was frozen at all steps of its optimizer since the last exchange.

    The current `requires_grad` is not sufficient. With several optimizers, an exchange may run at the end of a step of
    an optimizer that does not train this parameter. Scripts for GANs freeze the parameters of other optimizers during a
    step (`set_requires_grad(D, False)`, Lightning's `toggle_optimizer`).
    """

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self.dtype, self.device = parameter.dtype, parameter.device  # at construction
        # True if the parameter was trained at one of the steps that led to the last exchange. Before the first exchange
        # it is `requires_grad` at construction.
        self._before = parameter.requires_grad
        # True if the parameter was trained at a step since the last exchange; None: there was no step.
        self._since: bool | None = None

    @property
    def requires_grad(self) -> bool:
        return self.parameter.requires_grad or self._before or bool(self._since)

    @property
    def requires_grad_next(self) -> bool:
        """True if the parameter counts as trained in the next exchange or, after `begin_exchange`, in the exchange that
        has begun."""
        return self.parameter.requires_grad or (self._before if self._since is None else self._since)

    def note_step(self) -> None:
        """Record the current `requires_grad` of the parameter. Call at each step of its optimizer."""
        self._since = bool(self._since) or self.parameter.requires_grad

    def begin_exchange(self) -> None:
        if self._since is not None:
            self._before, self._since = self._since, None

    def cancel_exchange(self) -> None:
        """Count the steps that led to the current exchange among the steps that lead to the next exchange. Call if the
        current exchange is rejected, or does not include this worker."""
        if self._before:
            self._since = True

    def state(self) -> tuple[bool, bool | None]:
        return self._before, self._since

    def load(self, saved: tuple[bool, bool | None]) -> None:
        self._before, self._since = saved


def note_step(trained: Iterable[Trained]) -> None:
    """Record which of these parameters are frozen. Call at each step of their optimizer."""
    for each in trained:
        each.note_step()


class Anchor:
    """The anchor a, float[n], i.e. the parameters that all workers last agreed on, and this worker's own parameters x.

    After an exchange the worker continues at its start point. The start point is a - e if `keeps` is True, where e is
    the worker's error memory (`memory`), and a otherwise. `layout` has the names, shapes and positions of the
    parameters in the vector, and `trained` has the parameters.
    """

    def __init__(self, layout: Slice, trained: Sequence[Trained], memory: ErrorMemory, *, keeps: bool) -> None:
        a = layout.zeros()
        self.flat, self.views = a.flat, a.views
        self.leaves = [nn.Parameter(view) for view in self.views]  # the anchor as parameters, for an outer optimizer
        self.layout, self.keeps = layout, keeps
        self._trained, self._memory = trained, memory
        # The part of the local update that start - x does not contain, float[n]. It arises when the start point moves
        # without the parameters x, or when x is rounded to 16 bits. None means 0.
        self.owed: Tensor | None = None
        # The coordinates that this worker owns (averages for all workers) in a two-way exchange. At these coordinates
        # its start point is a. The slice is empty in other exchanges, and if `keeps` is False.
        self.owned = slice(0, 0)
        self.set_from_parameters()

    def tensors(self) -> list[Tensor]:
        return [local_part(each.parameter) for each in self._trained]

    def values(self) -> list[Tensor]:
        """Return this worker's parameters, on the device of the anchor (which may be on the CPU to save GPU memory). If
        the anchor is on the CPU and the parameters are on a GPU, the result is a copy of the parameters on the CPU, and
        the host waits once for all of them."""
        return self._beside_anchor(self.tensors())

    def _beside_anchor(self, tensors: list[Tensor]) -> list[Tensor]:
        return all_to_host(tensors) if self.flat.device.type == "cpu" else tensors

    @property
    def _frozen(self) -> set[str]:
        """The names of the currently frozen parameters."""
        return {name for name, each in zip(self.layout.names, self._trained, strict=True) if not each.requires_grad}

    def starts(self) -> list[Tensor]:
        """Return the point from which the parameters x continue after an exchange, one tensor per parameter. It is the
        anchor a or, if `keeps` is True, a - e, where e is the error memory. At coordinates that this worker owns, i.e.
        averages for all workers in a two-way exchange, it is always a. The tensors may be views of a."""
        return self.layout.views(self.flat - self._kept()) if self.keeps else self.views

    def _kept(self) -> Tensor:
        """Return the anchor minus this worker's start point, float[n], if `keeps` is True. The start point is the point
        from which the worker continues after an exchange. The result is the error memory, with zeros at the coordinates
        that the worker owns, i.e. averages for all workers in a two-way exchange. The result may be a view of the error
        memory."""
        kept = self._memory.vector
        if self.owned.start < self.owned.stop:
            kept = kept.clone()
            kept[self.owned] = 0
        return kept

    def copy_starts(self) -> list[Tensor]:
        """Return a copy of the start point, from which this worker continues after an exchange: one tensor per
        parameter, with the parameters' dtypes and device."""
        places = zip(self.starts(), self.tensors(), strict=True)
        return [beside(x, start) if start.device != x.device else start.to(x, copy=True) for start, x in places]

    def set_from_parameters(self) -> None:
        for a, x in zip(self.views, self.values(), strict=True):
            a.copy_(x)

    def apply_mean(self, mean: Tensor | Averaged, outer: Optimizer | None, frozen: Collection[str] | None) -> None:
        """Apply the workers' mean update to the anchor a (line 11 of Algorithm 1): a <- a - mean. If `outer` is given,
        this optimizer makes a step instead, with the mean, float[n], as its gradient.

        The anchor of a frozen parameter keeps its value, even if an outer momentum, or a decoded message that is not
        exactly zero, would change it. `frozen` are the names of the frozen parameters, identical on all workers. If
        workers have frozen different parameters, `frozen` is None, and `outer` skips the parameters whose mean update
        is zero in all coordinates.
        """
        stays = [name in (frozen or ()) for name in self.layout.names]
        before = [(a, a.clone()) for a, is_frozen in zip(self.views, stays, strict=True) if is_frozen]
        if isinstance(mean, Averaged):
            self._memory.apply_mean(self.flat, mean)
        elif outer is None:
            self.flat.sub_(mean)
        else:
            grads = self.layout.views(mean)
            left_out = [not grad.any() for grad in grads] if frozen is None else stays
            for leaf, grad, is_out in zip(self.leaves, grads, left_out, strict=True):
                leaf.grad = None if is_out else grad
            outer.step()
            for leaf in self.leaves:
                leaf.grad = None
        for a, old in before:
            a.copy_(old)

    def move(self, before: Sequence[Tensor], frozen: Collection[str] | None = None) -> None:
        """Set the parameters x to start + (x - before) after the anchor changed, so that x keeps its progress since
        `before`. Here `start` is the new start point (see `starts`). `before` has earlier values of x, one tensor per
        parameter. If `before` is empty, x is set to `start`.

        Parameters whose names are in `frozen` keep their values; by default, `frozen` has all currently frozen
        parameters.
        """
        frozen = self._frozen if frozen is None else frozen
        if not before:
            self.move_to_start(frozen)
            return
        where = zip(self.tensors(), self.starts(), before, strict=True)
        starts = ((x, beside(x, a).to(wide_dtype(x)), s) for x, a, s in where)
        self._set(((x.to(start.dtype) - s).add_(start) for x, start, s in starts), frozen)

    def move_to_start(self, frozen: Collection[str] | None = None) -> None:
        """Reset the parameters x to this worker's start point, from which it continues after an exchange, and clear
        `owed`, the part of the local update that start - x does not contain.

        Parameters whose names are in `frozen` keep their values; by default, `frozen` has all currently frozen
        parameters.
        """
        frozen = self._frozen if frozen is None else frozen
        self.clear_owed(frozen)
        if not self.keeps:
            self.set_parameters(self.views, frozen)
            return
        kept = self.layout.views(self._kept())
        for name, x, a, e in zip(self.layout.names, self.tensors(), self.views, kept, strict=True):
            if name not in frozen and x.dtype == a.dtype and x.device == a.device:
                torch.sub(a, e, out=x)
            elif name not in frozen:
                assign(x, a - e)

    def move_to_anchor(self) -> None:
        """Move the parameters x, except frozen ones, from this worker's start point (see `starts`) to the anchor. The
        change of x is recorded in `owed`, the part of the local update that start - x does not contain. So the next
        local update is the same as without the move."""
        before = [x.clone() for x in self.values()]
        self.set_parameters(self.views)
        if self.keeps:
            change = self.layout.zeros()
            for view, x, old in zip(change.views, self.values(), before, strict=True):
                view.copy_(x).sub_(old.to(view))
            self.owed = change.flat if self.owed is None else change.flat.add_(self.owed)

    def set_parameters(self, values: Sequence[Tensor], frozen: Collection[str] | None = None) -> None:
        """Set the parameters to `values`, one tensor per parameter. Parameters whose names are in `frozen` keep their
        values; by default, `frozen` has all currently frozen parameters."""
        frozen = self._frozen if frozen is None else frozen
        for name, x, value in zip(self.layout.names, self.tensors(), values, strict=True):
            if name not in frozen:
                assign(x, value)

    def clear_owed(self, frozen: Collection[str] = ()) -> None:
        """Clear `owed`, the part of the local update that start - x does not contain. Here x are the parameters, and
        `start` is the point at which they continued after the last exchange. `owed` is kept for the parameters whose
        names are in `frozen`."""
        if not frozen or self.owed is None:
            self.owed = None
            return
        for name, view in self.layout.by_name(self.owed).items():
            view.mul_(name in frozen)

    @property
    def is_rounded(self) -> bool:
        """True if a parameter has a narrower dtype than the anchor, such as bfloat16, so that the point at which the
        parameter continues after an exchange is rounded to that dtype."""
        return any(x.dtype != a.dtype for x, a in zip(self.tensors(), self.views, strict=True))

    @contextmanager
    def fixed_update(self, names: Collection[str]) -> Iterator[None]:
        """Keep the local update of the parameters with these names fixed while the anchor a and the error memory e
        change within the context.

        Such a change moves the start point, from which the local update start - x is measured. The parameters x do not
        move, so the move of the start point is recorded in `owed`, a correction that is added to start - x.
        """
        if not names:
            yield
            return
        before = self._rounded(self.starts())
        yield
        change = before.sub_(self._rounded(self.starts()))
        for name, view in self.layout.by_name(change).items():
            view.mul_(name in names)
        self.owe(change)

    def own(self, owned: slice) -> None:
        """Set the coordinates that this worker owns, i.e. averages for all workers, in a two-way exchange. The worker's
        start point, from which its local update is measured, moves at the coordinates that it did not own before or no
        longer owns. Its parameters and its local update do not change. No-op if the start point is the anchor at all
        coordinates (`keeps` is False)."""
        if self.keeps and owned != self.owned:
            with self.fixed_update(self.layout.names):
                self.owned = owned

    def shift(self) -> Tensor | None:
        """Return start - (a - e), float[n], or None if this worker owns no coordinates. Here a is the anchor, e is the
        error memory, and `start` is the point at which this worker continues after an exchange. `start` differs from
        a - e only at the coordinates that the worker owns, i.e. averages for all workers in a two-way exchange. There
        `start` is a."""
        if self.owned.start == self.owned.stop:
            return None
        without = self.layout.views(self.flat - self._memory.vector)
        return self._rounded(self.starts()).sub_(self._rounded(without))

    def _rounded(self, values: Sequence[Tensor]) -> Tensor:
        """Round `values`, one tensor per parameter, to the dtypes of the parameters, and return them as one vector,
        float[n]."""
        found = self.layout.zeros()
        for view, x, value in zip(found.views, self.tensors(), values, strict=True):
            view.copy_(value.to(x.dtype))
        return found.flat

    def owe(self, change: Tensor) -> None:
        """Add `change`, float[n], to `owed`, a correction of the local update. The local update is the difference
        between the point at which this worker continued after the last exchange and its parameters, plus `owed`. Call
        after that point has moved by -change and the parameters have not moved."""
        total = change if self.owed is None else self.owed.add_(change)
        self.owed = total if total.any() else None

    def subtract_owed(self) -> None:
        """Subtract `owed` from the parameters x that are not frozen. `owed` is the part of the local update that is not
        in start - x, where `start` is the point at which this worker continued after the last exchange. After the
        subtraction, start - x is the whole local update, except that for 16-bit parameters `owed` becomes the rounding
        error of x."""
        if self.owed is None:
            return
        frozen, owed = self._frozen, self.owed.clone() if self._frozen else self.owed
        self.clear_owed(frozen)
        pairs = zip(self.tensors(), self.layout.views(owed), strict=True)
        self._set((x.to(wide_dtype(x)) - beside(x, part, wide_dtype(x)) for x, part in pairs), frozen)

    def _set(self, values: Iterable[Tensor], frozen: Collection[str]) -> None:
        """Set the parameters x to `values`, given in at least float32. For 16-bit parameters, the rounding error is
        added to `owed`, the part of the local update that the change of x since the last exchange does not contain.
        Parameters whose names are in `frozen` keep their values."""
        xs = self.tensors()
        rounds = any(x.dtype != wide_dtype(x) for x in xs)
        if rounds and self.owed is None:
            self.owed = self.layout.zeros().flat
        owed = self.layout.views(self.owed) if rounds and self.owed is not None else [None] * len(xs)
        errors = []
        for name, x, value, lost in zip(self.layout.names, xs, values, owed, strict=True):
            if name not in frozen:
                x.copy_(value)
                if lost is not None:
                    errors.append((lost, x.to(value.dtype) - value))
        here = self._beside_anchor([error for _, error in errors])
        for (lost, _), error in zip(errors, here, strict=True):
            lost.add_(error.to(lost))

    def add_local_update(self, out: Tensor, starts: Sequence[Tensor] | None = None) -> Tensor:
        """Add this worker's local update to `out`, float[n], and return `out`.

        The local update is start - x, where x are the parameters and `start` is the point at which they continued after
        the last exchange, plus the part `owed` that this difference does not contain. `starts` has the start point of
        each parameter; if it is None, the current start points (see `starts`) are used.
        """
        starts = self.starts() if starts is None else starts
        for x, start, view in zip(self.values(), starts, self.layout.views(out), strict=True):
            view.add_(start.to(x).to(view) - x.to(view))
        return out if self.owed is None else out.add_(self.owed)


class OuterOptimizer:
    """The outer optimizer, which steps on the anchor, i.e. on the parameters on which all workers last agreed.

    `make` is a function of the anchor's tensors that returns the optimizer, and `anchor` has these tensors by parameter
    name. Raises TypeError if `make` does not return a torch optimizer, and ValueError if the optimizer's parameters are
    not exactly the anchor's tensors.
    """

    def __init__(self, make: Outer, anchor: Mapping[str, Tensor]) -> None:
        self.optimizer = optimizer = make(list(anchor.values()))
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"outer must be a function that returns a torch optimizer, got {type(optimizer).__name__}")
        if {id(p) for p in parameters_of([optimizer])} != {id(tensor) for tensor in anchor.values()}:
            raise ValueError("outer must return an optimizer of all tensors that it is given, and of no others")
        self._names = {id(tensor): name for name, tensor in anchor.items()}

    def field(self) -> Value:
        """Return the field of the saved state that contains the optimizer's state dict, its class, and the names of the
        parameters in each of its groups."""
        return Value(("outer",), dict[str, Any], self._state, self._load, self._check)

    @property
    def _groups(self) -> list[list[str]]:
        return [[self._names[id(p)] for p in group["params"]] for group in self.optimizer.param_groups]

    def _state(self) -> dict[str, Any]:
        return {"class": type(self.optimizer).__name__, "names": self._groups, **self.optimizer.state_dict()}

    def _check(self, saved: Mapping[str, Any]) -> None:
        """Raise ValueError unless `saved` is the state of an optimizer of the same class as this one, and each of its
        groups has the same parameters, in any order, as this optimizer's group with the same index."""
        name = type(self.optimizer).__name__
        if saved.get("class") != name:
            raise ValueError(f"outer must be the state of {name}, found that of {saved.get('class', 'nothing')}")
        found = saved.get("names", [])
        if list(map(sorted, found)) != list(map(sorted, self._groups)):
            raise ValueError(f"outer must be the state of groups of {shown(self._groups)}, found {shown(found)}")

    def _load(self, saved: Mapping[str, Any]) -> None:
        # torch assigns states to parameters by their order in the groups, which may differ here from the saved order.
        groups = []
        for group, theirs, ours in zip(saved["param_groups"], saved["names"], self._groups, strict=True):
            index = dict(zip(theirs, group["params"], strict=True))
            groups.append({**group, "params": [index[name] for name in ours]})
        # Copy the saved tensors, since `load_state_dict` does not, and the next step would change them in place.
        self.optimizer.load_state_dict(deepcopy({"state": saved["state"], "param_groups": groups}))


@dataclass(frozen=True)
class PseudoGradient(Update):
    """The local update of a worker, as the input of its error memory, float[n].

    The local update is (start - x) + owed. Here x are the parameters of the anchor `of`, `start` is the point at which
    they continued after the last exchange, and `owed` is the part that start - x does not contain (`Anchor.owed`).
    `noise` is added if it is not None. The update of the parameters whose names are in `frozen` is 0. For 16-bit
    parameters, `start` is rounded to 16 bits before x is subtracted. `decay` is the factor of the error memory in v.
    """

    of: Anchor
    decay: float
    noise: GaussianNoise | None
    frozen: Collection[str] = ()

    def add(self, base: Shaped, out: Shaped) -> None:
        """Set `out`, float[n], to v = decay e + (start - x) + owed + noise. Here e is the error memory, given as
        `base`, and (start - x) + owed is the local update of the parameters x. `out` and `base` must not share
        memory."""
        factor, xs = self.decay, self.of.values()
        # Compute v = decay e + (start - x). If start is a - e, v is (a - x) + (decay - 1) e, for which a - e need not
        # be computed.
        starts: Sequence[Tensor] = self.of.views
        # The start point of a 16-bit x is rounded, so a - e must be computed before x is subtracted.
        if self.of.keeps and self.of.is_rounded:
            starts = self.of.starts()
        elif self.of.keeps:
            factor -= 1.0
        for x, start, v in zip(xs, starts, out.views, strict=True):
            torch.sub(start.to(x.dtype).to(start.dtype), x, out=v)
        if factor:
            out.flat.add_(base.flat, alpha=factor)
        # At coordinates that this worker owns (averages for all workers) in a two-way exchange, the start point is the
        # anchor a, so v is decay e + a - x there.
        if factor != self.decay:
            out.flat[self.of.owned].add_(base.flat[self.of.owned])
        if self.of.owed is not None:
            out.flat.add_(self.of.owed)
        if self.noise is not None:
            self.of.layout.add_noise(out.flat, self.noise)
        for name, v in zip(self.of.layout.names, out.views, strict=True):
            if name in self.frozen:
                v.zero_()


def beside(x: Tensor, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return `value` on the device of x and in `dtype`, by default the dtype of x. If `value` is copied from the CPU to
    a GPU, the host does not wait for the copy."""
    value = value.to(dtype or x.dtype)
    return value if value.device == x.device else to_device(value, x.device)


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which new values of a parameter x are computed, before they are rounded to the dtype of x. It
    is at least float32."""
    return torch.promote_types(x.dtype, torch.float32)
