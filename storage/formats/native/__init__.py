"""reshard's own format."""
