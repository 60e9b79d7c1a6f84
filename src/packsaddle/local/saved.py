"""The saved state of local updates: its fields, and rules for loading it if the number of workers has changed."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from packsaddle.comm.ledger import Bytes, Ledger, Totals
from packsaddle.feedback.state import ANY, Rule, State, Value, Vector, attribute
from packsaddle.local.after import Reactions
from packsaddle.local.elastic.workers import ElasticWorkers
from packsaddle.local.fixed import FixedWorkers
from packsaddle.local.fragment import Fragment
from packsaddle.local.options import LocalOptions
from packsaddle.local.outer import OuterOptimizer
from packsaddle.local.records import Baseline


def _rules(*, by_steps: bool) -> list[Rule]:
    """Return the rules of the saved state of local updates. A rule says if an entry is identical on all workers and, if
    it is not, how the entries of all workers are converted to another number of workers.

    `by_steps` is True if workers may make different numbers of steps, so that the entry "steps" differs between
    workers.
    """
    part = ("fragments", ANY)
    error = (*part, "error", ANY)
    return [
        Rule(error, "error"),
        Rule((*part, "owed", ANY), "error", like=error),
        Rule((*part, "shift", ANY), "error", like=error),
        Rule((*part, "exchange", "start", ANY), "error"),
        # With another number of workers this flag becomes False, since the next round checks the parameters again.
        Rule((*part, "exchange", "invalid"), "constant", value=False),
        *(Rule((*part, name), "own") for name in ("shift", "owed", "aggregator")),
        *(Rule((*part, name), "own") for name in ("contraction", "clipped", "trained")),
        *(Rule((*part, name), "shared") for name in ("rounds", "rejected", "anchor", "exchange")),
        *(Rule(("identity", name), "constant") for name in ("rank", "workers")),
        *(Rule((name,), "own") for name in ("skips", "ledger", "uncompressed", "share", "membership")),
        *(Rule((name,), "own") for name in ("pacing", "schedule")),
        Rule(("steps",), "own" if by_steps else "shared"),
        *(Rule((name,), "shared") for name in ("format", "identity", "outer", "escape")),
        Rule(("resets",), "shared"),
    ]


class Counted(Protocol):
    """An object that counts this worker's inner steps, i.e. a `LocalUpdates`."""

    steps: int


def saved_state(
    local: Counted,
    options: LocalOptions,
    names: Iterable[str],
    fragments: Sequence[Fragment],
    workers: FixedWorkers | ElasticWorkers,
    outer: OuterOptimizer | None,
    reactions: Reactions,
    baseline: Baseline,
) -> State:
    """Return the description of the saved state of `local`, a `LocalUpdates`: its fields, how each is read and loaded,
    and rules for loading with another number of workers. `names` are the names of the parameters."""
    ledger: Ledger = workers.channel.ledger

    def identity() -> dict[str, Any]:
        same: dict[str, Any] = {"seed": options.seed, "every": options.every, "delay": options.overlap.delay}
        same |= {"fragments": len(fragments), "keep_unsent": options.keep_unsent}
        same |= {"outer": outer is not None, "escape": options.escape is not None}
        same["parameters"] = "by number" if any(n.startswith("parameter ") for n in names) else "by name"
        return same | workers.identity()

    def uncompressed() -> Bytes:
        return baseline.bytes(local.steps, workers.channel.group.size)

    def load_uncompressed(saved: Bytes) -> None:
        baseline.load(saved, local.steps, workers.channel.group.size)

    def fields() -> list[Vector | Value]:
        return [
            *([] if outer is None else [outer.field()]),
            attribute(("steps",), local, "steps", int),
            *(field for i, part in enumerate(fragments) for field in part.fields(("fragments", i))),
            *reactions.fields(),
            Value(("ledger",), Totals, ledger.state_dict, ledger.load_state_dict),
            Value(("uncompressed",), Bytes, uncompressed, load_uncompressed),
            *workers.fields(),
        ]

    rules = _rules(by_steps=options.workers.weight == "steps")
    return State("LocalUpdates", rules, identity, fields)
