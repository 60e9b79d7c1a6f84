"""Benchmarks: one question per module, everything that is compared measured side by side in one run."""

from packsaddle.performance.bench.hosts import HostFailedError, Hosts, available

__all__ = [
    "HostFailedError",
    "Hosts",
    "available",
]
