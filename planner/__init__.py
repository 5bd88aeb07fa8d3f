"""Planning: compute from the metadata of a checkpoint what each rank reads.

The planner does no I/O and imports only numpy and the standard library.
"""
