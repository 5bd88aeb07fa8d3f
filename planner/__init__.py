"""Planning: from the metadata of a checkpoint to what each rank reads. Pure: numpy and the standard library only."""
