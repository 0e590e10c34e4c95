"""The report of one run or several: curves, plots, and one HTML page."""

__all__ = [
    "chart",
    "history",
    "html",
    "plots",
    "style",
]
