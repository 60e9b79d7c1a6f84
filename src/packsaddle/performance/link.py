"""The link between workers, measured: small all-reduces tell its latency, large ones its rate.

Rates are read and written as people write them: 100mbit, 1gbit, 12.5MB/s.
"""

import re
import time
from collections.abc import Callable
from statistics import median

import torch

from packsaddle.comm.group import Group
from packsaddle.comm.launch import launch, local_device, process_group
from packsaddle.performance.step_time import Link

_SMALL = 20  # all-reduces of one element
_ENOUGH = 0.5  # seconds: an all-reduce that takes so long tells the rate
_MOST = 1 << 26  # bytes
_LARGE = 5  # all-reduces of the largest message


def probe(group: Group, device: torch.device | str = "cpu") -> Link:
    """Measure the link between the workers of a group; collective, and the same on every worker.

    Both ends of the fit are medians, so a worker that is late once does not count. Raises ValueError for one worker.
    """
    if group.size < 2:
        raise ValueError(f"measuring a link needs at least 2 workers, got {group.size}")
    hops = 2 * (group.size - 1)
    small = _seconds(group, 1, _SMALL, device)
    nbytes = 1 << 16
    while (large := _seconds(group, nbytes // 4, 1, device)) < _ENOUGH and nbytes < _MOST:
        nbytes *= 2
    large = _seconds(group, nbytes // 4, _LARGE, device)
    if large <= small:
        raise RuntimeError(f"no rate can be read: {nbytes} bytes took no longer than 4 ({large:.2g} s)")
    per_byte = (large - small) / (hops / group.size * (nbytes - 4))
    return Link(max(0.0, small / hops - 4 / group.size * per_byte), 1 / per_byte)


def _seconds(group: Group, elements: int, repeats: int, device: torch.device | str) -> float:
    """The median time of an all-reduce, averaged over workers so that all go on alike."""
    tensor = torch.zeros(elements, device=device)
    group.all_reduce(tensor)  # connects, allocates, and lets all begin together
    taken = torch.tensor(median(_clocked(lambda: group.all_reduce(tensor), tensor) for _ in range(repeats)))
    shared = taken.to(device)
    group.all_reduce(shared)
    return float(shared) / group.size


def _clocked(work: Callable[[], None], tensor: torch.Tensor) -> float:
    begin = time.perf_counter()
    work()
    tensor[:1].tolist()  # waits for a GPU's stream
    return time.perf_counter() - begin


def probe_locally(workers: int) -> Link:
    """Measure this machine's loopback between processes started for it, by gloo on the CPU (NCCL with enough GPUs)."""
    found: Link = launch(_probe_world, (), workers)
    return found


def _probe_world() -> Link:
    with process_group() as group:
        return probe(group, local_device())


_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_PATTERN = re.compile(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([kmgt]?)(bit(?:/s|ps)?|bps|b/s)\s*", re.IGNORECASE)


def parse_rate(text: str) -> float:
    """Return a rate in bits a second: "100mbit" (also Mbit/s, Mbps), or "12.5MB/s" in bytes, of 8 bits.

    Prefixes k, M, G, T are powers of 1000, in any case; a capital B in B/s is a byte, a small b in b/s a bit.
    Raises ValueError for anything else, and for a rate of 0.
    """
    match = _PATTERN.fullmatch(text)
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:  # two points, say
        number = 0.0
    if match is None or not 0 < number < float("inf"):
        raise ValueError(f"link must be a positive rate such as 100mbit, 1gbit or 12.5MB/s, got {text!r}")
    byte = match[3] == "B/s"
    return number * _PREFIXES[match[2].lower()] * (8 if byte else 1)


def format_rate(bits: float) -> str:
    """Return a rate in the form that `parse` reads, with three digits."""
    for prefix, unit in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if bits >= 0.9995 * unit:
            return f"{float(f'{bits / unit:.3g}'):g} {prefix}bit/s"
    return f"{bits:.3g} bit/s"
