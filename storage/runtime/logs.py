"""Loggers below `reshard` that say on which rank something happened."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

from ...planner.text import shown


class _OfRank(logging.LoggerAdapter[logging.Logger]):
    """Gives every record the attribute `rank`, and, where there are several, begins the message with it."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        distributed: Any = sys.modules.get("torch.distributed")
        is_one_of_many = distributed is not None and distributed.is_available() and distributed.is_initialized()
        rank = distributed.get_rank() if is_one_of_many else 0
        kwargs["extra"] = {**kwargs.get("extra", {}), "rank": rank}
        return (f"rank {rank}: {msg}" if is_one_of_many else msg), kwargs


def _as_shown(record: logging.LogRecord) -> bool:
    """Make a record's message one that may be shown, whatever it repeats."""
    record.msg, record.args = shown(record.getMessage()), ()
    return True


def logger_of(module: str) -> logging.LoggerAdapter[logging.Logger]:
    """Return the logger of a module of reshard, by its `__name__`. What it logs is as `shown` returns it."""
    logger = logging.getLogger(module)
    logger.addFilter(_as_shown)
    return _OfRank(logger, {})
