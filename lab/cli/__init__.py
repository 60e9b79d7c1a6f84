"""The commands of `python -m lab`, and functions that they share."""
