"""Loggers below `reshard` that say on which rank something happened."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

from .ranks import is_distributed, rank_of


class _OfRank(logging.LoggerAdapter[logging.Logger]):
    """Gives every record the attribute `rank`, and, where there are several, begins the message with it."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        rank = rank_of(None)
        kwargs["extra"] = {**kwargs.get("extra", {}), "rank": rank}
        return (f"rank {rank}: {msg}" if is_distributed() else msg), kwargs


def logger_of(module: str) -> logging.LoggerAdapter[logging.Logger]:
    """The logger of a module of reshard, by its `__name__`."""
    return _OfRank(logging.getLogger(module), {})
