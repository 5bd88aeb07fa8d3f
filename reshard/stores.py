"""Stores: where objects are kept. Implement `Store` to add another one."""

from .storage.stores.base import AsyncReads as AsyncReads
from .storage.stores.base import Capabilities as Capabilities
from .storage.stores.base import MultipartUpload as MultipartUpload
from .storage.stores.base import ObjectWriter as ObjectWriter
from .storage.stores.base import Store as Store
from .storage.stores.base import buffered_writer as buffered_writer
from .storage.stores.local import LocalStore as LocalStore
from .storage.stores.open import open_store as open_store
from .storage.stores.retry import RetryingStore as RetryingStore
