"""What `reshard.convert` writes: one module for each format."""
