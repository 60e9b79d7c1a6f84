"""Saved states: declared fields, their saving, validation and loading, and conversion to another number of workers.

A state consists of nested dictionaries and lists of tensors and plain types. Its owner (the optimizer, a hook, local
updates) declares the fields of the state once. A field is a `Vector`, i.e. one tensor per parameter, validated by
shape, or a `Value`, validated by type. To load a state, all fields are validated before any is changed, and then loaded
in the order of declaration.

If the number of workers changes, each entry of a state is converted by its kind. A `Rule` gives the kind of all entries
below a path. Rules are for paths and not for fields, since the worker that loads the state may not have all fields of
the state, such as a pending exchange. The kinds are:

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

FORMAT = 8  # version of the saved states of optimizers, hooks and local updates
ANY = "*"  # key of a pattern, i.e. of a path with wildcards; it matches every key
Path = tuple[Any, ...]  # the keys that lead to an entry in nested dictionaries and lists, outermost first
Kind = Literal["shared", "error", "own", "constant"]


@dataclass(frozen=True)
class Rule:
    """The kind of all entries of a saved state whose paths begin with `path`.

    The kind determines how an entry is converted if the number of workers changes (see the module's docstring).
    """

    path: Path
    kind: Kind
    like: Path = ()  # for "error": path of other entries; if an entry is missing, zeros of their shapes replace it
    value: Any = None  # for kind "constant": replaces the saved value of an entry that is not in `State`'s identity


@dataclass(frozen=True)
class Vector:
    """A field of a saved state: one tensor per parameter.

    In `path`, ANY stands for the key of the parameter, i.e. its name or index.
    """

    path: Path
    shapes: Mapping[Any, torch.Size | None]  # shape of each tensor, by key; None: flat of any length, may be missing
    get: Callable[[], Mapping[Any, Tensor]]  # returns the tensors by key; a function, since steps may swap buffers
    # Loads saved tensors, given by the parameter's key. None: they are copied into the tensors that `get` returns.
    set: Callable[[Mapping[Any, Tensor]], None] | None = None
    optional: bool = False  # True if the field may be missing: `get` then returns {}, and the saved value is None

    def save(self, state: dict[str, Any]) -> None:
        """Write copies of the tensors of this field into `state`, in a dict by the parameter's key.

        No-op if `path` does not end with ANY, e.g. if it is ("state", ANY, NAME). The tensors of this field are then in
        the optimizer's own state, which torch saves.
        """
        if self.path[-1] == ANY:
            found = {key: tensor.clone() for key, tensor in self.get().items()}
            _put(state, self.path[:-1], None if self.optional and not found else found)

    def read(self, state: Mapping[str, Any], names: Mapping[Any, str]) -> dict[Any, Tensor]:
        """Return the saved tensors in `state`, by the parameter's key.

        `names` has the names of parameters in messages, by key. Raises ValueError if a tensor is missing, has another
        shape than in `shapes`, or belongs to an unknown parameter.
        """
        # Find the dictionary with one entry per parameter.
        at = self.path.index(ANY)
        (saved,) = (found for _, found in _matches(state, self.path[:at]))
        rest, name = self.path[at + 1 :], next(str(key) for key in reversed(self.path) if key != ANY)
        found: dict[Any, Tensor] = {}
        if self.optional and saved is None:
            return found
        if not isinstance(saved, Mapping):
            raise ValueError(f"{dotted(self.path[:at])} must be a dictionary, found {type(saved).__name__}")
        # Find the tensor of each parameter. It may be nested: the keys that follow ANY in `path` lead to it.
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
    """A field of a saved state that is not one tensor per parameter: a value of plain type, a dataclass, or other
    tensors."""

    path: Path
    hint: Any  # type of the value, as in an annotation
    get: Callable[[], Any]
    load: Callable[[Any], object]
    check: Callable[[Any], None] | None = None  # raises ValueError for a value that cannot be loaded; None: no check

    def save(self, state: dict[str, Any]) -> None:
        _put(state, self.path, _plain(self.get()))

    def read(self, state: Mapping[str, Any], names: Mapping[Any, str]) -> Any:
        """Return the saved value in `state`.

        Raises ValueError if the value is missing or invalid, or if `path` matches several entries with different
        values.
        """
        found = [typed(self.hint, value, path) for path, value in _matches(state, self.path)]
        if any(value != found[0] for value in found[1:]):
            raise ValueError(f"{dotted(self.path)} must have one value, found {found}")
        if self.check is not None:
            self.check(found[0])
        return found[0]


def attribute(path: Path, owner: Any, name: str, hint: Any) -> Value:
    return Value(path, hint, partial(getattr, owner, name), partial(setattr, owner, name))


class State:
    """The saved state of an object, its owner.

    It consists of fields, and of an identity, i.e. values that must be equal when the state is saved and when it is
    loaded.

    Args:
        owner: the name of the owner's class, for messages.
        rules: the kinds of the entries at all paths. If several rules match a path, the first one applies.
        identity: returns the values of the identity, by name.
        fields: returns the fields, in the order in which they are loaded.
        head: the path of the dictionary that contains the format and the values of the identity. If it is (), the
            format has the path ("format",), and the values of the identity are in a dictionary with the path
            ("identity",).
        names: the names of parameters in messages, by key; by default the keys.
        only_with: advice for messages about values of the identity, by the value's name. If this is not empty, the
            state cannot be converted to another number of workers, and `split` raises ValueError.
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
        """Return the state of the owner as tensors and plain types.

        It is written into `state`, or into a new dictionary if `state` is None.
        """
        state = {} if state is None else state
        _put(state, (*self._head, "format"), FORMAT)
        for name, value in self._identity().items():
            _put(state, (*self._where, name), value)
        for field in self._fields():
            field.save(state)
        return state

    def validate(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError if `load` would reject the state. The message names the first entry that is missing or
        invalid."""
        self._read(state)

    def load(self, state: Mapping[str, Any]) -> None:
        """Load a state into the owner.

        Raises ValueError, with nothing changed, if the state is not valid for the owner.
        """
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
        """Return the entries of a saved state that a run with another number of workers needs.

        `leaves` has the tensors and plain values of one worker's state, by path. Returns two dictionaries by path: the
        tensors that must be averaged over workers, and the entries that are identical on all workers.

        Raises ValueError if the format of the state is not `FORMAT`, or if the state cannot be converted to another
        number of workers.
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
        """Return the new values, by path, of all entries of kind "constant" (see `Rule`), for a run with another number
        of workers.

        They replace the saved values. `leaves` has the tensors and plain values of one worker's state, by path.
        """
        identity, rules = self._identity(), {path: self.rule(path) for path in leaves}
        return {p: identity.get(p[-1], rule.value) for p, rule in rules.items() if rule.kind == "constant"}


def skip(saved: Any) -> None:
    """No-op. It is the `load` function of a field that is not loaded with the other fields, since its owner restores it
    after them."""


def check_format(found: Any, what: str) -> None:
    if type(found) is not int or found != FORMAT:
        raise ValueError(
            f"{what} has format {found!r}, and this version of packsaddle reads format {FORMAT}: finish the run with "
            f"the packsaddle that saved it, or load the weights alone"
        )


def check_tensor(what: str, found: Any, shape: torch.Size | None, *, floating: bool = True) -> None:
    """Raise ValueError if `found` is not a tensor of the given shape and kind of dtype. The message starts with `what`.

    If `shape` is None, `found` must be a flat tensor of any length. If `floating` is True, the dtype must be
    floating-point; otherwise it must not be.
    """
    if not isinstance(found, Tensor) or (found.ndim != 1 if shape is None else found.shape != shape):
        have = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else "nothing"
        raise ValueError(f"{what} must have shape {'(n,)' if shape is None else tuple(shape)}, found {have}")
    if found.is_floating_point() != floating:
        raise ValueError(f"{what} must be of {'floating-point' if floating else 'whole'} numbers, found {found.dtype}")


def typed(hint: Any, value: Any, path: Path = ()) -> Any:
    """Convert a saved value to the type `hint`, an annotation.

    Raises ValueError if the value does not have this type. The message names `path`.
    """
    try:
        return decode(hint, value, path)
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
    """Yield a pair (path, value) for each entry of a state whose path matches `pattern`, in which ANY matches every
    key.

    `path` is the path of `state` itself. Raises ValueError if the state has no entry for another key of the pattern.
    """
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
    """Return True if the first keys of `path` match `pattern`, in which ANY matches every key."""
    return len(path) >= len(pattern) and all(p in (ANY, key) for key, p in zip(path, pattern, strict=False))


def _filled(pattern: Path, path: Path, of: Path) -> Path:
    """Return the path `pattern` with each ANY replaced by a key of `path`.

    `of` is another pattern, which `path` matches. The keys of `path` at the positions of ANY in `of` replace the ANYs
    in `pattern`, in the same order.
    """
    keys = iter([key for key, p in zip(path, of, strict=False) if p == ANY])
    return tuple(next(keys) if p == ANY else p for p in pattern)
