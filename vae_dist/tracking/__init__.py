"""Metrics and pictures of a run: log file, console, W&B, PNG grids."""
