"""Tensors into objects."""
