"""Byte ranges of objects into tensors."""
