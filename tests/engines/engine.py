"""Run the code blocks of the guide, with whole engines of vLLM, and print what their workers have after each block.

    python -m tests.engines.engine guide.md

The kernels of vLLM do not run on every CPU, so the weights are not packed for them, and nothing is generated.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.docs.blocks import blocks
from tests.engines import workers

SMALL = "kv_cache_memory_bytes=1 << 24, max_model_len=64, enforce_eager=True, skip_tokenizer_init=True"
"""Options that the guide does not mention, for an engine that starts soon."""

os.environ |= workers.ENVIRONMENT | {
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for collective_rpc with a function
    "VLLM_LOGGING_LEVEL": "INFO",
}


def main(page: Path) -> None:
    namespace: dict[str, Any] = {}
    for block in blocks(page):
        if block.language == "python":
            text = block.text.replace("tensor_parallel_size=2", f"tensor_parallel_size=2, {SMALL}")
            exec(compile(text, f"{page.name}:{block.line}", "exec"), namespace)
            print(json.dumps(namespace["llm"].collective_rpc(digests_of)), flush=True)
    namespace["llm"].llm_engine.engine_core.shutdown()


def digests_of(worker: Any) -> dict[str, tuple[str, str]]:
    return workers.digests(worker.get_model())


# Also in the processes of workers, which import this module.
importlib.import_module("tests.engines.preloaded")
workers.keep_unpacked()
if __name__ == "__main__":
    main(Path(sys.argv[1]))
