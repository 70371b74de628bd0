"""Training: one step, the loop around it, and what keeps a run alive."""
