"""How many bytes of torch's CPU memory a piece of work holds at most, counted allocation by allocation."""

from collections.abc import Callable
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity


def peak_bytes(work: Callable[[], object]) -> int:
    """Call `work`, and return the largest number of bytes that it has allocated and not freed at a time. Its result is
    kept until the end. Arrays of numpy are not counted."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = work()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    del kept
    return max(accumulate((size for _, size in changes), initial=0))
