"""Benchmarks: everything that is compared is measured side by side in one run."""
