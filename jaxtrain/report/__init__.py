"""What a run shows and writes: the terminal, metrics.jsonl, trackers, and report.html."""

__all__ = [
    "metrics_file",
    "page",
    "terminal",
    "trackers",
]
