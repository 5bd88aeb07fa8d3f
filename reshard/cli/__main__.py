"""`python -m reshard.cli` is `reshard`."""

from . import main

main()
