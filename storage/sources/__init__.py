"""Checkpoints of other formats as sources: read by the same planner and the same reader as reshard's own."""
