"""The terminal: the live line and the tables."""

__all__ = [
    "progress",
    "tables",
]
