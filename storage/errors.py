"""The errors of storage. Together with the errors of planning they form one tree. The right column says what to do:

CheckpointError
├── StoreError (OSError)                            fix the store: it returned an error
│   ├── UnavailableError                            try again later: the store was slow, overloaded or unreachable
│   ├── ObjectNotFoundError (FileNotFoundError)
│   ├── AccessDeniedError (PermissionError)         fix the credentials or the permissions
│   └── CommitError                                 check the location: the manifest may have been written or not
├── CheckpointNotFoundError (FileNotFoundError)     fix the call: there is no checkpoint at this location
│   └── NotCommittedError                           save again: there is only what an unfinished save wrote
├── CheckpointExistsError (FileExistsError)         fix the call: pass overwrite=True to replace the checkpoint
├── RunInUseError                                   end the other run: two managers save to one location
├── UnsupportedURIError                             fix the call, or install the package for the protocol
├── UnsupportedVersionError                         upgrade: a newer reshard wrote the checkpoint
├── UnsupportedFormatError                          convert the checkpoint with the tool that wrote it
├── DtypeError                                      fix the call: the stored dtype cannot be cast to the requested one
├── DestinationError                                fix the call: the destination cannot be written in place
├── UnsupportedValueError                           fix the call: a value of the state dict cannot be stored
├── BusyError                                       wait: an asynchronous save of the same ranks is still running
├── ArgumentError (ValueError)                      fix the call: an argument is not valid
├── UnsafeValueError                                decide: reading the value would run pickled code
├── CorruptCheckpointError                          do not use it: bytes are damaged, missing or contradictory
└── RankError                                       fix that rank: an error from outside reshard occurred on it
    └── StoppedError                                (internal: this rank stopped because another one failed)

The names in parentheses are the built-in exceptions that an error also derives from.
"""

from __future__ import annotations

from ..planner.errors import CheckpointError


def nearest(error: CheckpointError) -> type[CheckpointError]:
    """Return the class of reshard that an error is, or derives from."""
    ours = (__name__, CheckpointError.__module__)
    return next(kind for kind in type(error).__mro__ if kind.__module__ in ours)


class StoreError(CheckpointError, OSError):
    """The store failed to read, write, list or delete."""

    may_have_written: bool = True
    """Whether the write that raised this may have succeeded, or may still succeed."""


def as_refusal(error: StoreError, message: str) -> StoreError:
    """Return an error of the class of another one, which says that nothing was written."""
    found = nearest(error)(message)
    assert isinstance(found, StoreError)
    found.may_have_written = False
    return found


class UnavailableError(StoreError):
    """The store timed out, closed the connection or asked to slow down. The same call may succeed later."""


class ObjectNotFoundError(StoreError, FileNotFoundError):
    """The store has no object of this name."""


class AccessDeniedError(StoreError, PermissionError):
    """The store refused the credentials, or they do not permit the operation."""

    may_have_written = False


class CommitError(StoreError):
    """The store failed while it wrote the manifest. The checkpoint may or may not exist."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint at this location."""


class NotCommittedError(CheckpointNotFoundError):
    """A save or a conversion to this location did not finish: there is data, but nothing that commits it."""


class CheckpointExistsError(CheckpointError, FileExistsError):
    """A checkpoint exists at this location, and `overwrite` is False."""


class RunInUseError(CheckpointError):
    """Another CheckpointManager saves to this location."""


class UnsupportedURIError(CheckpointError):
    """No filesystem for the protocol of the URI is known or installed."""


class UnsupportedVersionError(CheckpointError):
    """The checkpoint has a format version that this version of reshard cannot read."""


class UnsupportedFormatError(CheckpointError):
    """A checkpoint of another tool uses a part of its format that reshard cannot read."""


class DtypeError(CheckpointError):
    """A stored dtype cannot be cast to the dtype of the destination, or cannot be stored."""


class DestinationError(CheckpointError):
    """A tensor of the state dict cannot be written in place, or two of its values have the same name."""


class UnsupportedValueError(CheckpointError):
    """A value cannot be stored: pickle refuses it, or a tensor has no dense values (sparse, quantised, on meta)."""


class BusyError(CheckpointError):
    """A save is still running: of the same process group with `busy="refuse"`, or with the same StorageWriter."""


class ArgumentError(CheckpointError, ValueError):
    """An argument of a call is not valid."""


class UnsafeValueError(CheckpointError):
    """A value is pickled in a way that torch.load(weights_only=True) refuses."""


class CorruptCheckpointError(CheckpointError):
    """Stored bytes are damaged or missing, or contradict each other."""


class RankError(CheckpointError):
    """An error from outside reshard stopped a rank. `rank` is that rank; the message contains the error."""

    group_is_broken = False
    """Whether the ranks cannot communicate any more, so that this rank does not know what the others have done."""


class StoppedError(RankError):
    """This rank stopped because another one failed."""
