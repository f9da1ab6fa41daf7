"""Training runs: the loop, its checkpoints, curves and stages."""
