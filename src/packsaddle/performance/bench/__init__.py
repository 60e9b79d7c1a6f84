"""Benchmarks: one subject per module, and everything that is compared is measured side by side in one run."""

from packsaddle.performance.bench.hosts import HostFailedError, Hosts, available

__all__ = [
    "HostFailedError",
    "Hosts",
    "available",
]
