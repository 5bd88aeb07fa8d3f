"""Source formats: how checkpoints of other tools are read. Derive from `ForeignSource` to add another one."""

from .planner.entries import ITEMSIZES as ITEMSIZES
from .planner.entries import Encoding as Encoding
from .planner.entries import Entry as Entry
from .storage.formats.foreign import ForeignSource as ForeignSource
from .storage.formats.foreign import Shards as Shards
from .storage.formats.foreign import whole_tensor as whole_tensor
from .storage.formats.metadata_reader import MetadataReader as MetadataReader
from .storage.formats.source import Source as Source
from .storage.formats.source import Unreadable as Unreadable
