"""Stores for tests, and the contract that every store must satisfy."""

from .storage.stores.memory import MemoryStore as MemoryStore
from .storage.stores.testing import Call as Call
from .storage.stores.testing import RecordingStore as RecordingStore
from .storage.stores.testing import check_store as check_store
