"""Checkpoint formats: how each one says what it has, and where."""
