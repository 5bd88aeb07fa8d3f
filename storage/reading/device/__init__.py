"""Reads into tensors on a CUDA device: copies bytes to the device, and decodes and places them there."""
