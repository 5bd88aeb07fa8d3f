"""The errors of storage. With those of planning they make one tree, by what the caller would do:

CheckpointError
├── StoreError               mend the store: it did not answer as it should
│   ├── UnavailableError     retry: it was slow, overloaded or out of reach, and stayed so
│   ├── ObjectNotFoundError
│   ├── AccessDeniedError    mend the credentials or the permissions
│   └── CommitError          look: the manifest may or may not have been written
├── CheckpointNotFoundError  fix the call: there is no checkpoint at this place
│   └── NotCommittedError    ... but the remains of a save that never finished
├── CheckpointExistsError    fix the call: a checkpoint is there and overwriting was not asked for
├── UnsupportedURIError      fix the call, or install what the protocol needs
├── UnsupportedVersionError  upgrade: a newer reshard wrote it
├── UnsupportedFormatError   rewrite it: reshard does not read this part of another tool's format
├── DtypeError               fix the call: the stored dtype cannot be cast to the one asked for
├── DestinationError         fix the call: the destination cannot be written in place
├── UnsupportedValueError    fix the call: a value of the state dict cannot be stored
├── ArgumentError            fix the call: an argument is none of those that there are
├── UnsafeValueError        decide: reading the object would run pickled code
├── CorruptCheckpointError   refuse: bytes are damaged, cut short or contradict themselves
└── RankError                look there: something that is not of reshard failed on a rank
    └── StoppedError         (between ranks only: what is raised is the error of the rank that failed)
"""

from __future__ import annotations

from ..planner.errors import CheckpointError


def nearest(error: CheckpointError) -> type[CheckpointError]:
    """The class of reshard that an error is, or that somebody's own subclass derives from."""
    ours = (__name__, CheckpointError.__module__)
    return next(kind for kind in type(error).__mro__ if kind.__module__ in ours)


class StoreError(CheckpointError):
    """The store failed to read, write, list or delete."""


class UnavailableError(StoreError):
    """The store timed out, broke the connection or asked to slow down: it may pass if it is tried again."""


class ObjectNotFoundError(StoreError):
    """The store has no object of this name."""


class AccessDeniedError(StoreError):
    """The store refused the credentials, or they do not permit the operation."""


class CommitError(StoreError):
    """The store failed while the manifest was being put: the checkpoint may or may not stand."""


class CheckpointNotFoundError(CheckpointError):
    """There is no checkpoint at this place."""


class NotCommittedError(CheckpointNotFoundError):
    """A save began at this place, but never finished: there is data, but no manifest."""


class CheckpointExistsError(CheckpointError):
    """A checkpoint is there already, and the save was not told to overwrite it."""


class UnsupportedURIError(CheckpointError):
    """No filesystem is known, or installed, for the protocol of the URI."""


class UnsupportedVersionError(CheckpointError):
    """The checkpoint has a format version that this reshard cannot read."""


class UnsupportedFormatError(CheckpointError):
    """Another tool's checkpoint holds what reshard cannot read of its format, and the tool itself can."""


class DtypeError(CheckpointError):
    """A stored dtype cannot be cast to the dtype of the destination, or cannot be stored."""


class DestinationError(CheckpointError):
    """A destination tensor cannot be written in place."""


class UnsupportedValueError(CheckpointError):
    """A value that is no tensor cannot be stored, not even by pickle."""


class ArgumentError(CheckpointError, ValueError):
    """An argument of a call is none of those that there are."""


class UnsafeValueError(CheckpointError):
    """An object is pickled in a way that torch.load(weights_only=True) refuses."""


class CorruptCheckpointError(CheckpointError):
    """Stored bytes are damaged, cut short, or contradict themselves."""


class RankError(CheckpointError):
    """An error that is not of reshard stopped a rank; `rank` names it, and the message says what it was."""


class StoppedError(RankError):
    """This rank stopped because another had failed."""
