"""Seeing a run: writers and trackers of its numbers, the live line, plots, and the page at the end."""
