"""The tensor-parallel plan of a Hugging Face `config.json`."""

from __future__ import annotations

import json

from ..errors import CorruptCheckpointError, ObjectNotFoundError
from ..stores.base import Store

CONFIG_NAME = "config.json"
MAX_CONFIG_BYTES = 16 * 1024 * 1024
"""How much of a `config.json` is read."""
TP_PLAN_KEYS = ("base_model_tp_plan", "tp_plan")
"""The keys of plans. The names in the first one lack the prefix that a model with a head adds."""


def read_tp_plan(store: Store) -> dict[str, str]:
    """Read the tensor-parallel plan in the `config.json` of a store.

    Returns:
        Rules for a Layout: patterns of names, and words such as "colwise". Each pattern has a second form that matches
        names inside another module: `*.layers.*.up` for `layers.*.up`. Empty if there is no `config.json` or no plan in
        it.

    Raises:
        CorruptCheckpointError: the file is not a configuration.
        StoreError: the store cannot be read.
    """
    try:
        data = bytes(store.read(CONFIG_NAME, 0, MAX_CONFIG_BYTES))
    except ObjectNotFoundError:
        return {}
    try:
        config = json.loads(data)
        plan = {str(pattern): str(word) for key in TP_PLAN_KEYS for pattern, word in (config.get(key) or {}).items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(
            f"{CONFIG_NAME!r} in {store.location} is not a configuration: {error!r}"
        ) from error
    return {form: word for pattern, word in plan.items() for form in (pattern, f"*.{pattern}")}
