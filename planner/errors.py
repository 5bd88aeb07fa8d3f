"""The errors of planning, and the base of every error that reshard raises of its own.

CheckpointError
├── LayoutError          fix the call: the layout cannot be applied to these tensors
├── MissingTensorError   fix the call: the checkpoint has no tensor of that name
├── ShapeMismatchError   fix the call: the tensor has another shape in the checkpoint
├── InvalidPlanError     fix the call: what was to be read back is no saved plan
└── InvalidIndexError    refuse: the checkpoint's own metadata contradicts itself
"""

from __future__ import annotations

from .text import shown


class CheckpointError(Exception):
    """The base of every error that reshard raises of its own.

    `rank` is the rank on which it happened, once a collective call has spread it; None before. The message is as
    `shown` returns it, whatever it repeats: without secrets, in one line, without characters that a terminal obeys.
    """

    rank: int | None = None

    def __init__(self, *args: object) -> None:
        super().__init__(*(shown(argument) if isinstance(argument, str) else argument for argument in args))

    def __str__(self) -> str:
        message = super().__str__()
        return message if self.rank is None else f"rank {self.rank}: {message}"


class LayoutError(CheckpointError):
    """A layout is malformed, or does not fit the tensors that it is applied to."""


class MissingTensorError(CheckpointError):
    """The checkpoint has no tensor or object of a name that was asked for."""


class ShapeMismatchError(CheckpointError):
    """A box, or a destination, does not fit the shape of the tensor in the checkpoint."""


class InvalidPlanError(CheckpointError):
    """A value is not a plan that was saved as JSON."""


class InvalidIndexError(CheckpointError):
    """The metadata of a checkpoint contradicts itself."""
