"""A complete example on real data, small enough for a laptop. `reshard demo` runs it."""
