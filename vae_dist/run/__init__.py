"""The folder of a run: paths and lock, checkpoints, and what a run begins from."""
