"""Data sources: each opens a data set as tables."""

__all__ = [
    "arrays",
    "digits",
    "images",
    "labelled_text",
    "markov",
    "records",
    "synthetic",
    "text",
    "tfds_sets",
]
