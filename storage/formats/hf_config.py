"""The tensor-parallel plan of a Hugging Face `config.json`."""

from __future__ import annotations

import json

from ..errors import CorruptCheckpointError, ObjectNotFoundError
from ..stores.base import Store

CONFIG_NAME = "config.json"
MAX_CONFIG_BYTES = 16 * 1024 * 1024
TP_PLAN_KEYS = ("base_model_tp_plan", "tp_plan")
"""What a plan is called: of the model below the head, whose names then lack the head's prefix, and of all."""


def read_tp_plan(store: Store) -> dict[str, str]:
    """The plan of the `config.json` in a store, as rules of a Layout: patterns and words; empty where there is none.

    A pattern also stands for what has it below another module: `layers.*.up` for `model.layers.0.up`.
    Raises CorruptCheckpointError where the file is not what it should be, StoreError.
    """
    try:
        data = bytes(store.read(CONFIG_NAME, 0, MAX_CONFIG_BYTES))
    except ObjectNotFoundError:
        return {}
    try:
        config = json.loads(data)
        plan = {str(pattern): str(word) for key in TP_PLAN_KEYS for pattern, word in (config.get(key) or {}).items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(f"{CONFIG_NAME!r} in {store.location} is no configuration: {error!r}") from error
    return {form: word for pattern, word in plan.items() for form in (pattern, f"*.{pattern}")}
