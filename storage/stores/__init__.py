"""Where objects are kept: disks and object stores. Does not import torch."""
