"""Lazy tensors: tensors of a checkpoint without storage, which record what is copied from them."""
