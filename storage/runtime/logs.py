"""Loggers of reshard's modules, which add the rank to each message."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

from ...planner.text import shown


class _RankLogger(logging.LoggerAdapter[logging.Logger]):
    """Sets the attribute `rank` of each record. If there is a process group, the message begins with the rank."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        distributed: Any = sys.modules.get("torch.distributed")
        has_group = distributed is not None and distributed.is_available() and distributed.is_initialized()
        rank = distributed.get_rank() if has_group else 0
        kwargs["extra"] = {**kwargs.get("extra", {}), "rank": rank}
        return (f"rank {rank}: {msg}" if has_group else msg), kwargs


def _sanitize(record: logging.LogRecord) -> bool:
    """Escape control characters and mask secrets in the message of a record, as `shown` does. Keep the record."""
    record.msg, record.args = shown(record.getMessage()), ()
    return True


def logger_of(module: str) -> logging.LoggerAdapter[logging.Logger]:
    """Return the logger of a module of reshard. Its messages are escaped and masked by `shown`.

    Args:
        module: the `__name__` of the module.
    """
    logger = logging.getLogger(module)
    logger.addFilter(_sanitize)
    return _RankLogger(logger, {})
