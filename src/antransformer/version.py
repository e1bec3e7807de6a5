"""The version of the package, imported by everything that records it."""

__version__ = "0.1.0"
