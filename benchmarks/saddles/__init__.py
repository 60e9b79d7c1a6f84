"""Time out of saddles by optimizer: `python -m benchmarks.saddles`."""
