"""Benchmarks: one question per module, everything that is compared measured side by side in one run."""
