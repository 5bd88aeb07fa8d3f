"""Checkpoint formats: what a checkpoint contains, and where its bytes are."""
