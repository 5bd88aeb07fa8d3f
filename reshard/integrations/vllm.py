"""The plugin for vLLM: `load_format="reshard"`. vLLM calls `register` in each of its processes."""

import importlib


def register() -> None:
    """Register the load format "reshard" with vLLM. Calling this again has no effect.

    Raises:
        ImportError: vLLM is not installed.
    """
    importlib.import_module(".vllm_loader", __package__)
