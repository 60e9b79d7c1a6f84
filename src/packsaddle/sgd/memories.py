"""The choice of the error memory of CompressedSGD."""

from packsaddle.feedback.memory import ErrorMemory, InPlaceMemory
from packsaddle.feedback.slices import FlatParameters

# Smallest number of coordinates for which the error memory may be updated in place. A smaller error memory has a second
# vector instead: both fit a cache, and a rollback is exact.
_LARGE = 1 << 20


def make_memory(flat: FlatParameters, *, spare: bool, revocable: bool) -> ErrorMemory:
    """Return the error memory of the parameters `flat`.

    Args:
        flat: the parameters.
        spare: True if an error memory must be able to roll back to its value before the current step.
        revocable: True if the update of a step can be computed again. A large error memory on a CPU then needs no
            second vector for a rollback, since it subtracts the update.
    """
    in_place = spare and revocable and flat.d >= _LARGE and flat.x.device.type == "cpu"
    return InPlaceMemory(flat) if in_place else ErrorMemory(flat, spare=spare)
