"""Saved states: declared fields, their saving, validation and loading, and conversion to another number of workers.

A state is nested dictionaries and lists of tensors and plain types. Its owner (the optimizer, a hook, local updates)
declares its fields once: a `Vector` is one tensor per parameter, validated by shape; a `Value` is validated by type.
Loading validates all fields before it changes any, and loads them in the order of declaration.

A `Rule` gives the kind of the entries at a path, not of a field, since the loading worker may lack some fields of the
state (such as a pending exchange). The kind determines what happens if the number of workers changes:

    shared      identical on all workers; copied
    error       averaged over workers: error memories, momenta, the parameters at the start of an exchange
    own         different on each worker; new workers get worker 0's
    constant    replaced by the value of that name in the new worker's identity (see `State`), or by the rule's value
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from packsaddle.errors import ConfigError
from packsaddle.options.schema import decode, dotted

FORMAT = 6  # version of the saved states of optimizers, hooks and local updates, and of elastic workers' files
ANY = "*"  # a key in a path that matches any key
Path = tuple[Any, ...]  # keys of an entry in nested dictionaries and lists, outermost first
Kind = Literal["shared", "error", "own", "constant"]


@dataclass(frozen=True)
class Rule:
    """The kind of all entries of a saved state whose path begins with `path`. The kind determines what happens to an
    entry if the number of workers changes (see the module's docstring)."""

    path: Path
    kind: Kind
    like: Path = ()  # for kind "error": path of the tensors that give the shapes of zeros if this entry is missing
    value: Any = None  # for kind "constant": the new value if `State.identity` has no value of that name


@dataclass(frozen=True)
class Vector:
    """A field of a saved state with one tensor per parameter; ANY in `path` stands for the parameter's key."""

    path: Path
    shapes: Mapping[Any, torch.Size | None]  # shape of each tensor, by key; None: any length, and may be missing
    get: Callable[[], Mapping[Any, Tensor]]  # returns tensors by key; a function, since a step may swap buffers
    # Loads the tensors, given by key; None: they are copied into the tensors that `get` returns.
    set: Callable[[Mapping[Any, Tensor]], None] | None = None
    optional: bool = False  # True if the whole field may be missing: it is then None in a state, and `get` returns {}

    def save(self, state: dict[str, Any]) -> None:
        """Write copies of the tensors into a state. No-op for entries of "state", which torch's optimizers save."""
        if self.path[-1] == ANY:
            found = {key: tensor.clone() for key, tensor in self.get().items()}
            _put(state, self.path[:-1], None if self.optional and not found else found)

    def read(self, state: Mapping[str, Any], names: Mapping[Any, str]) -> dict[Any, Tensor]:
        """Return the saved tensors by key. Raises ValueError unless they have the shapes of this field."""
        # Find the dictionary with one entry per parameter.
        at = self.path.index(ANY)
        (saved,) = (found for _, found in _matches(state, self.path[:at]))
        rest, name = self.path[at + 1 :], next(str(key) for key in reversed(self.path) if key != ANY)
        found: dict[Any, Tensor] = {}
        if self.optional and saved is None:
            return found
        if not isinstance(saved, Mapping):
            raise ValueError(f"{dotted(self.path[:at])} must be a dictionary, found {type(saved).__name__}")
        # Find each parameter's tensor, which is nested under the keys that follow ANY in `path`.
        for key, shape in self.shapes.items():
            tensor: Any = saved.get(key)
            for inner in rest:
                tensor = tensor.get(inner) if isinstance(tensor, Mapping) else None
            if tensor is not None or shape is not None:
                check_tensor(f"{name} of {names.get(key, key)}", tensor, shape)
                found[key] = tensor
        if unknown := [key for key in saved if key not in self.shapes]:
            raise ValueError(f"the state has {name} of {unknown[0]}, and there is no such parameter here")
        return found

    def load(self, saved: Mapping[Any, Tensor]) -> None:
        if self.set is not None:
            self.set(saved)
            return
        for key, tensor in self.get().items():
            tensor.copy_(saved[key])


@dataclass(frozen=True)
class Value:
    """A field of a saved state: a value of plain type, a dataclass, or tensors that belong to no parameter."""

    path: Path
    hint: Any  # type of the value, in the form of an annotation
    get: Callable[[], Any]
    load: Callable[[Any], object]
    check: Callable[[Any], None] | None = None  # raises ValueError if the saved value cannot be loaded here

    def save(self, state: dict[str, Any]) -> None:
        _put(state, self.path, _plain(self.get()))

    def read(self, state: Mapping[str, Any], names: Mapping[Any, str]) -> Any:
        """Return the saved value. Raises ValueError if it is missing or invalid, or if `path` matches entries with
        different values."""
        found = [typed(self.hint, value, path) for path, value in _matches(state, self.path)]
        if any(value != found[0] for value in found[1:]):
            raise ValueError(f"{dotted(self.path)} must have one value, found {found}")
        if self.check is not None:
            self.check(found[0])
        return found[0]


def attribute(path: Path, owner: Any, name: str, hint: Any) -> Value:
    return Value(path, hint, partial(getattr, owner, name), partial(setattr, owner, name))


class State:
    """The saved state of `owner`. It consists of fields, and of an identity: values that must be equal at saving and at
    loading.

    Args:
        owner: the name of the class that has the state, for error messages.
        rules: the kinds of the entries at all paths; the first rule that matches a path applies.
        identity: returns the identity by name.
        fields: returns the fields, in the order in which they are loaded.
        head: the path of the dictionary with the format and the values of the identity. If it is (), the format has the
            path ("format",), and the values of the identity are in a dictionary at ("identity",).
        names: the names of parameters in error messages, by key; by default the keys.
        only_with: advice in error messages, by name of an identity value. If there is any advice, the state cannot be
            converted to another number of workers, and `split` raises ValueError.
    """

    def __init__(
        self,
        owner: str,
        rules: Sequence[Rule],
        identity: Callable[[], Mapping[str, Any]],
        fields: Callable[[], Iterable[Vector | Value]],
        *,
        head: Path = (),
        names: Mapping[Any, str] | None = None,
        only_with: Mapping[str, str] | None = None,
    ) -> None:
        self._owner, self._rules, self._identity, self._fields = owner, rules, identity, fields
        self._head, self._where = head, head or ("identity",)
        self._names, self._only_with = names or {}, only_with or {}

    def save(self, state: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the state as tensors and plain types: a new dictionary, or `state`, if given, with entries added."""
        state = {} if state is None else state
        _put(state, (*self._head, "format"), FORMAT)
        for name, value in self._identity().items():
            _put(state, (*self._where, name), value)
        for field in self._fields():
            field.save(state)
        return state

    def validate(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError if `load` would reject the state. The error names the first entry that does not fit."""
        self._read(state)

    def load(self, state: Mapping[str, Any]) -> None:
        """Load a state. Raises ValueError, with nothing changed, if the state is invalid for its owner."""
        for field, value in self._read(state):
            field.load(value)

    def _read(self, state: Mapping[str, Any]) -> list[tuple[Any, Any]]:
        """Validate a state, and return a pair (field, saved value) for each field."""
        for found in self._saved_in(state, (*self._head, "format")):
            check_format(found, "the state")
        for name, here in self._identity().items():
            for saved in self._saved_in(state, (*self._where, name)):
                if saved != here:
                    remedy = f": {self._only_with[name]}" if name in self._only_with else ""
                    raise ValueError(f"{name} is {here} here, but the state was saved with {name} {saved}{remedy}")
        return [(field, field.read(state, self._names)) for field in self._fields()]

    def _saved_in(self, state: Mapping[str, Any], path: Path) -> list[Any]:
        try:
            return [value for _, value in _matches(state, path)]
        except ValueError as error:
            raise ValueError(f"{error}; was it saved by {self._owner}?") from None

    def rule(self, path: Path) -> Rule:
        for rule in self._rules:
            if _fits(path, rule.path):
                return rule
        raise ValueError(f"{dotted(path)} is in the state, and {self._owner} has no rule for it")

    def split(self, leaves: Mapping[Path, Any]) -> tuple[dict[Path, Tensor], dict[Path, Any]]:
        """Return the tensors of a saved state to average over workers, and its entries that are identical on all
        workers.

        `leaves` has the tensors and plain values of one worker's state by path, and the results are dicts by path, too.
        Raises ValueError if the format of the state is not `FORMAT`, or if the state cannot be split.
        """
        for path, value in leaves.items():
            if path[-1] == "format":
                check_format(value, "the state")
        for remedy in self._only_with.values():
            raise ValueError(remedy)
        kinds = {path: self.rule(path) for path in leaves}
        means = {path: leaves[path] for path, rule in kinds.items() if rule.kind == "error"}
        for rule in self._rules:
            if rule.like:
                for path in [path for path in means if _fits(path, rule.like)]:
                    means.setdefault(_filled(rule.path, path, rule.like), torch.zeros_like(means[path]))
        return means, {path: leaves[path] for path, rule in kinds.items() if rule.kind == "shared"}

    def merge(self, leaves: Mapping[Path, Any]) -> dict[Path, Any]:
        """Return the new values, by path, of all entries of kind "constant" (see `Rule`). They replace the saved values
        when the number of workers changes. `leaves` has the tensors and plain values of one worker's state by path."""
        identity, rules = self._identity(), {path: self.rule(path) for path in leaves}
        return {p: identity.get(p[-1], rule.value) for p, rule in rules.items() if rule.kind == "constant"}


def skip(saved: Any) -> None:
    """No-op, used as the `load` function of a field that the object with the state restores itself, after all other
    fields."""


def check_format(found: Any, what: str) -> None:
    if type(found) is not int or found != FORMAT:
        raise ValueError(
            f"{what} has format {found!r}, and this version of packsaddle reads format {FORMAT}: finish the run with "
            f"the packsaddle that saved it, or load the weights alone"
        )


def check_tensor(what: str, found: Any, shape: torch.Size | None, *, floating: bool = True) -> None:
    """Raise ValueError unless `found` is a tensor of shape `shape`, or a flat tensor if `shape` is None. The dtype must
    be floating-point if `floating` is True, and else an integer type. `what` names the tensor in the error."""
    if not isinstance(found, Tensor) or (found.ndim != 1 if shape is None else found.shape != shape):
        have = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else "nothing"
        raise ValueError(f"{what} must have shape {'(n,)' if shape is None else tuple(shape)}, found {have}")
    if found.is_floating_point() != floating:
        raise ValueError(f"{what} must be of {'floating-point' if floating else 'whole'} numbers, found {found.dtype}")


def typed(hint: Any, value: Any, path: Path = ()) -> Any:
    """Convert a saved value to the type `hint`, an annotation. Raises ValueError, naming the path, if the value has
    another type."""
    try:
        return decode(hint, value, path, saved=True)
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _matches(state: Any, pattern: Path, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield each path of a state that matches a pattern, with its value. Raises ValueError for a missing key."""
    if not pattern:
        yield path, state
        return
    key, *rest = pattern
    found = range(len(state)) if isinstance(state, list | tuple) else state if isinstance(state, Mapping) else ()
    if key != ANY and key not in found:
        raise ValueError(f"the state has no {dotted((*path, key))}")
    for each in found if key == ANY else (key,):
        yield from _matches(state[each], tuple(rest), (*path, each))


def _put(state: Any, path: Path, value: Any) -> None:
    key, *rest = path
    for each in range(len(state)) if key == ANY else (key,):
        if rest:
            _put(state.setdefault(each, {}) if isinstance(state, dict) else state[each], tuple(rest), value)
        else:
            state[each] = value


def _fits(path: Path, pattern: Path) -> bool:
    """Return True if a path, or a prefix of it, matches a pattern, in which ANY matches every key."""
    return len(path) >= len(pattern) and all(p in (ANY, key) for key, p in zip(path, pattern, strict=False))


def _filled(pattern: Path, path: Path, of: Path) -> Path:
    """Return the path `pattern` with its wildcards (ANY) replaced by keys. The keys are those of `path` at the
    wildcards of `of`, a pattern that `path` matches."""
    keys = iter([key for key, p in zip(path, of, strict=False) if p == ANY])
    return tuple(next(keys) if p == ANY else p for p in pattern)
