"""The version, for what must know it without importing the package."""

__version__ = "0.2.0"
