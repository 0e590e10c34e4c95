"""States on the disk: written durably, sealed by a manifest, verified before they are read."""

__all__ = [
    "arrays",
    "checkpoints",
    "committed",
    "lock",
    "manifest",
]
