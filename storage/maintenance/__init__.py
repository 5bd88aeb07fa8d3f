"""Verify, compare, list and remove checkpoints."""
