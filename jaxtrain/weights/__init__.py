"""Weights of other toolkits, in and out: Hugging Face's configurations and tensor names, and the
files that they stand in."""

__all__ = ["config", "names"]
