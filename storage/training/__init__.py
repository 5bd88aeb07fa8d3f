"""The checkpoints of a training run: when to save, which to keep, and which to continue from."""
