"""Checkpoints: states written durably, with a manifest of checksums, and verified before they are
read; and the lock on a run's folder."""

__all__ = [
    "arrays",
    "checkpoints",
    "committed",
    "lock",
    "manifest",
]
