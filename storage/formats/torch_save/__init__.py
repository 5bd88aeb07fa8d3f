"""Files that torch.save wrote."""
