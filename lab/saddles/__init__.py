"""Time out of saddles by optimizer: `python -m lab.saddles`."""
