"""Tensors and state dicts of this process."""
