"""The errors of planning, and the base class of every error that reshard raises. The right column says what to do:

CheckpointError
├── LayoutError                      fix the call: the layout does not fit these tensors
├── MissingTensorError (KeyError)    fix the call: the checkpoint has no tensor of that name
├── ShapeMismatchError               fix the call: the tensor has another shape in the checkpoint
├── InvalidPlanError                 fix the call: the text is not a saved plan
└── InvalidIndexError                do not use it: the checkpoint's metadata contradicts itself
"""

from __future__ import annotations

from .text import shown


class CheckpointError(Exception):
    """The base class of every error that reshard raises.

    `rank` is the rank on which the error occurred, if a collective call raised it on all ranks, and None otherwise.
    The message contains no secrets, no line breaks and no control characters (see `shown`).
    """

    rank: int | None = None

    def __init__(self, *args: object) -> None:
        super().__init__(*(shown(argument) if isinstance(argument, str) else argument for argument in args))

    def __str__(self) -> str:
        message = Exception.__str__(self)  # not that of KeyError, which shows the repr of the message
        return message if self.rank is None else f"rank {self.rank}: {message}"


class LayoutError(CheckpointError):
    """A layout is not valid, or does not fit the tensors that it is applied to."""


class MissingTensorError(CheckpointError, KeyError):
    """The checkpoint has no tensor or value of the requested name, or a pattern matches no name."""


class ShapeMismatchError(CheckpointError):
    """A box, or a destination, does not fit the shape of the tensor in the checkpoint."""


class InvalidPlanError(CheckpointError):
    """A text is not a plan that was saved as JSON."""


class InvalidIndexError(CheckpointError):
    """The metadata of a checkpoint contradicts itself."""
