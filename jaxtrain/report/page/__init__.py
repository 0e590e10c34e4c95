"""The report of one run or several: curves, plots, and one HTML page."""

__all__ = [
    "history",
    "html",
    "plots",
    "prediction_plots",
    "style",
    "svg",
]
