"""Devices as a mesh with named axes, and where each array lies on it."""

__all__ = [
    "fsdp",
    "mesh",
    "sharding",
]
