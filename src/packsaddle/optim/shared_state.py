"""The state that a worker which is behind gets from one that is not: what is the same on all workers after a round.

That is the anchor and its optimizer's state, by parameter, and what the roster has. The inner optimizer's state is the
sender's own, for a worker that has none yet.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from packsaddle.errors import ConfigError
from packsaddle.optim.fragment import Fragment
from packsaddle.optim.roster import Roster
from packsaddle.optim.saved_state import check_shape

FORMAT = 1  # of what is sent


def shared_state(
    steps: int, fragments: Sequence[Fragment], outer: Optimizer | None, inner: Optimizer | None, roster: Roster
) -> dict[str, Any]:
    """Return it, tensors and plain types; `steps` are the sender's inner steps, and `inner` None sends no state."""
    return {
        "format": FORMAT,
        "steps": steps,
        "fragments": [
            {"rounds": part.rounds, "anchor": {place.name: v.clone() for place, v in part.named(part.anchor.flat)}}
            for part in fragments
        ],
        "outer": None if outer is None else outer.state_dict(),
        "inner": None if inner is None else inner.state_dict(),
        **roster.state_dict(),
    }


def check_shared(state: Mapping[str, Any], fragments: Sequence[Fragment], outer: Optimizer | None) -> None:
    """Raise ConfigError, naming the first difference, unless another worker's state fits this one's parts."""
    if state.get("format") != FORMAT:
        raise ConfigError(f"the others' state has format {state.get('format')!r}, and this one reads {FORMAT}")
    given = {"fragments": len(fragments), "outer": None if outer is None else "an optimizer"}
    others = {"fragments": len(state["fragments"]), "outer": None if state["outer"] is None else "an optimizer"}
    for name, theirs in others.items():
        if given[name] != theirs:
            raise ConfigError(
                f"workers must be given the same arguments, but this one has {name}={given[name]} and the others have "
                f"{name}={theirs}"
            )
    for part, saved in zip(fragments, state["fragments"], strict=True):
        for place in part.places:
            try:
                check_shape(f"the others' {place.name}", saved["anchor"].get(place.name), place.parameter.shape)
            except ValueError as error:
                raise ConfigError(str(error)) from None


def take_anchor(part: Fragment, saved: Mapping[str, Any]) -> None:
    """Have a fragment's anchor, and its count of rounds, as others have them; x stays where it is."""
    part.flight = None
    part.rounds = saved["rounds"]
    for place, view in part.named(part.anchor.flat):
        view.copy_(saved["anchor"][place.name])


def take_inner(inner: Optimizer, state: dict[str, Any]) -> None:
    """Begin with another worker's inner optimizer's state: estimates from nothing would make wild first steps.

    Raises ConfigError if it is that of another optimizer.
    """
    try:
        inner.load_state_dict(state)
    except ValueError as error:
        raise ConfigError(f"workers must be given the same inner optimizer: {error}") from None
