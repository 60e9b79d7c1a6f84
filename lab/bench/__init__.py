"""Benchmarks; all compared methods are measured side by side in one run."""
