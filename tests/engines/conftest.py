"""Fixtures of the tests with vLLM: ranks that have imported it, models, and their checkpoints on a disk and on S3."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.engines import workers
from tests.ranks import RankPool
from tests.servers import Server


@dataclass(frozen=True)
class Saved:
    """A model, saved in all formats."""

    kind: str
    """One of MODELS."""
    folder: Path
    """The Hugging Face folder with weights."""
    config: Path
    """The same without the weights."""
    checkpoints: Path
    """The folder of the other formats, by name."""
    bucket: str
    """The URI of a copy on S3, with the formats by name."""
    options: dict[str, Any]
    """The storage_options of this copy."""

    def extra(self, format: str, store: str) -> dict[str, Any]:
        """Return the model_loader_extra_config that loads the checkpoint of a format from a store."""
        if store == "s3":
            return {"uri": f"{self.bucket}/{format}", "storage_options": self.options}
        return {"uri": str(self.folder if format == "safetensors" else self.checkpoints / format)}


@pytest.fixture(scope="session")
def vllm_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Ranks that have imported vLLM."""
    os.environ.update(workers.ENVIRONMENT)
    with RankPool(workers.PRELOADED) as pool:
        yield pool


@pytest.fixture(scope="session", params=workers.MODELS)
def saved(
    request: pytest.FixtureRequest, vllm_ranks: RankPool, moto: Server, tmp_path_factory: pytest.TempPathFactory
) -> Saved:
    root = tmp_path_factory.mktemp(request.param)
    found = Saved(request.param, root / "model", root / "config", root / "saved", moto.place(root.name), moto.options)
    vllm_ranks.run(1, workers.make_model, request.param, str(found.folder))
    vllm_ranks.run(2, workers.save, str(found.folder), str(found.checkpoints))
    found.config.mkdir()
    for path in found.folder.glob("*config.json"):
        shutil.copy(path, found.config)
    s3 = fsspec.filesystem("s3", **moto.options)
    for name in ("reshard", "dcp", "training"):
        s3.put(str(found.checkpoints / name), f"{found.bucket}/{name}", recursive=True)
    s3.put(str(found.folder), f"{found.bucket}/safetensors", recursive=True)
    return found
