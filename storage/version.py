"""The version of reshard, as it is written into manifests."""

__version__ = "0.1.0"
