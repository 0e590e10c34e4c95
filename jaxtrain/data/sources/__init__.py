"""Data sources: each opens a data set as tables."""

__all__ = [
    "arrays",
    "digits",
    "images",
    "markov",
    "records",
    "synthetic",
    "text",
    "tfds_sets",
]
