"""What a worker remembers between steps, by name."""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from packsaddle.ef21 import EstimateMemory
from packsaddle.feedback import ErrorMemory
from packsaddle.flat import FlatParameters
from packsaddle.gradmemory import GradientMemory

Memory = Literal["buffer", "gradient", "ef21"]


def make_memory(
    kind: str,
    flat: FlatParameters,
    rates: Callable[[], Sequence[float]],
    *,
    exchange: str,
    local_steps: int,
    spare: bool,
) -> ErrorMemory:
    """Return the memory of this kind, with a `spare` vector if it is to leave steps out and needs one.

    Raises ValueError for any other kind, and for what it does not go with.
    """
    if kind not in get_args(Memory):
        raise ValueError(f"memory must be one of {', '.join(get_args(Memory))}, got {kind!r}")
    if kind == "buffer":
        return ErrorMemory(flat, spare=spare)
    if exchange != "direct":  # others hold errors back, in the units that the messages had
        raise ValueError(f'memory="{kind}" is for exchange "direct", got {exchange!r}')
    if local_steps > 1:
        raise ValueError(f'memory="{kind}" is for local_steps=1, got {local_steps}; use memory="buffer"')
    return GradientMemory(flat, rates) if kind == "gradient" else EstimateMemory(flat, rates)


def kind_of(memory: ErrorMemory) -> Memory:
    """Return a memory's kind."""
    if isinstance(memory, GradientMemory):
        return "gradient"
    return "ef21" if isinstance(memory, EstimateMemory) else "buffer"
