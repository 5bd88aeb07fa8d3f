"""All errors that reshard raises of its own, from the planner and the storage: one tree below CheckpointError."""

from .planner.errors import CheckpointError as CheckpointError
from .planner.errors import InvalidIndexError as InvalidIndexError
from .planner.errors import InvalidPlanError as InvalidPlanError
from .planner.errors import LayoutError as LayoutError
from .planner.errors import MissingTensorError as MissingTensorError
from .planner.errors import ShapeMismatchError as ShapeMismatchError
from .storage.errors import AccessDeniedError as AccessDeniedError
from .storage.errors import ArgumentError as ArgumentError
from .storage.errors import BusyError as BusyError
from .storage.errors import CheckpointExistsError as CheckpointExistsError
from .storage.errors import CheckpointNotFoundError as CheckpointNotFoundError
from .storage.errors import CommitError as CommitError
from .storage.errors import CorruptCheckpointError as CorruptCheckpointError
from .storage.errors import DestinationError as DestinationError
from .storage.errors import DtypeError as DtypeError
from .storage.errors import NotCommittedError as NotCommittedError
from .storage.errors import ObjectNotFoundError as ObjectNotFoundError
from .storage.errors import RankError as RankError
from .storage.errors import RunInUseError as RunInUseError
from .storage.errors import StoreError as StoreError
from .storage.errors import UnavailableError as UnavailableError
from .storage.errors import UnsafeValueError as UnsafeValueError
from .storage.errors import UnsupportedFormatError as UnsupportedFormatError
from .storage.errors import UnsupportedURIError as UnsupportedURIError
from .storage.errors import UnsupportedValueError as UnsupportedValueError
from .storage.errors import UnsupportedVersionError as UnsupportedVersionError
