"""vLLM's own model code, run on lazy weights, loads the same parameters as its stock loader, from any checkpoint."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

import reshard
from tests import servers
from tests.docs.blocks import blocks
from tests.engines import workers
from tests.engines.conftest import Saved
from tests.engines.workers import Loaded
from tests.ranks import RankFailed, RankPool
from tests.servers import Server

ROOT = Path(__file__).parent.parent.parent
GUIDE = ROOT / "docs" / "guides" / "vllm.md"
OPTIONS = ("uri", "prefix", "format", "storage_options")
Stock = Callable[[int, bool], list[Loaded]]


@pytest.fixture(scope="session")
def stock(saved: Saved, vllm_ranks: RankPool) -> Stock:
    """Return what vLLM's stock loader loads from the Hugging Face folder, by ranks and expert parallelism."""

    @functools.cache
    def load(tp: int, experts: bool) -> list[Loaded]:
        return run(vllm_ranks, tp, saved.folder, "auto", {}, experts)

    return load


def run(
    ranks: RankPool, tp: int, folder: Any, load_format: str, extra: dict[str, Any], experts: bool = False
) -> list[Loaded]:
    """Load a model on ranks with tensor parallelism, for `experts` with expert parallelism."""
    return ranks.run(tp, workers.load, str(folder), load_format, extra, uuid.uuid4().hex, experts)


def sizes(extra: dict[str, Any], within: str = "") -> tuple[int, int]:
    """Return the stored bytes of the tensors of a checkpoint, and their bytes in memory.

    Args:
        within: a part of the names of the tensors that count.
    """
    checkpoint = reshard.open(extra["uri"], storage_options=extra.get("storage_options"))
    infos = [info for name, info in checkpoint.tensors.items() if within in name]
    return sum(info.stored_bytes for info in infos), sum(math.prod(info.shape) * info.dtype.itemsize for info in infos)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("store", ["disk", "s3"])
@pytest.mark.parametrize("format", workers.FORMATS)
def test_parameters_equal_those_of_the_stock_loader(
    saved: Saved, stock: Stock, vllm_ranks: RankPool, format: str, store: str, tp: int
) -> None:
    extra = saved.extra(format, store)
    stored, size = sizes(extra)
    ranks = run(vllm_ranks, tp, saved.config, "reshard", extra)
    for mine, theirs in zip(ranks, stock(tp, False), strict=True):
        assert mine.tensors == theirs.tensors
        share = mine.parameter_bytes * stored / size
        assert 0.9 * share < mine.bytes_fetched <= 1.05 * share


@pytest.mark.parametrize("saved", workers.WITH_EXPERTS, indirect=True)
@pytest.mark.parametrize("format", workers.FORMATS)
def test_parameters_equal_with_expert_parallelism(
    saved: Saved, stock: Stock, vllm_ranks: RankPool, format: str
) -> None:
    ranks = run(vllm_ranks, 2, saved.config, "reshard", saved.extra(format, "disk"), experts=True)
    assert [mine.tensors for mine in ranks] == [theirs.tensors for theirs in stock(2, True)]


@pytest.mark.parametrize("saved", ["mixtral"], indirect=True)
@pytest.mark.parametrize("format", workers.FORMATS)
def test_each_of_4_ranks_reads_its_own_experts(saved: Saved, vllm_ranks: RankPool, format: str) -> None:
    extra = saved.extra(format, "disk")
    stored, size = sizes(extra)
    experts, _ = sizes(extra, ".experts.")
    for rank in run(vllm_ranks, 4, saved.config, "reshard", extra, experts=True):
        others = (rank.parameter_bytes - rank.expert_bytes) * stored / size
        share = (rank.bytes_fetched - others) / experts  # includes the metadata, and the over-read of other weights
        assert 0.25 <= share <= 0.26


@pytest.mark.parametrize("store", ["disk", "s3"])
def test_training_checkpoint_in_float32_is_loaded_by_its_prefix(
    saved: Saved, stock: Stock, vllm_ranks: RankPool, store: str
) -> None:
    extra = {**saved.extra("training", store), "prefix": "model"}
    stored, size = sizes(saved.extra("reshard", "disk"))  # the heads of float32 are as large as bfloat16
    ranks = run(vllm_ranks, 2, saved.config, "reshard", extra)
    for mine, theirs in zip(ranks, stock(2, False), strict=True):
        assert mine.tensors == theirs.tensors
        assert mine.bytes_fetched <= 1.05 * mine.parameter_bytes * stored / size


def test_model_folder_with_weights_needs_no_options(saved: Saved, stock: Stock, vllm_ranks: RankPool) -> None:
    (mine,) = run(vllm_ranks, 1, saved.folder, "reshard", {})
    assert mine.tensors == stock(1, False)[0].tensors
    assert mine.bytes_fetched


def test_weights_are_reloaded(saved: Saved, vllm_ranks: RankPool, tmp_path: Path) -> None:
    vllm_ranks.run(1, workers.make_model, saved.kind, str(tmp_path / "other"), 1)
    both = []
    for folder, load_format, extra in (
        (saved.folder, "auto", {}),
        (saved.config, "reshard", saved.extra("reshard", "disk")),
    ):
        arguments = str(folder), load_format, extra, str(tmp_path / "other"), uuid.uuid4().hex
        both.append(vllm_ranks.run(1, workers.reload, *arguments)[0])
    stock, ours = both
    for theirs, mine in zip(stock, ours, strict=True):
        assert mine.tensors == theirs.tensors
    _, again, other = ours
    assert again.tensors != other.tensors


def test_layers_are_processed_as_soon_as_they_are_loaded(saved: Saved, vllm_ranks: RankPool) -> None:
    stock, ours = (
        vllm_ranks.run(1, workers.load_by_layer, str(saved.folder), load_format, {}, uuid.uuid4().hex)[0]
        for load_format in ("auto", "reshard")
    )
    assert ours.tensors == stock.tensors
    (unprocessed,) = run(vllm_ranks, 1, saved.folder, "auto", {})
    assert ours.tensors != unprocessed.tensors


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown option": (
        {"uri": "{reshard}", "path": "x"},
        "model_loader_extra_config has the key 'path': the keys of load_format='reshard' are " + ", ".join(OPTIONS),
    ),
    "a wrong type": ({"uri": 3}, "'uri' in model_loader_extra_config must be a str, got int"),
    "no weights in the folder": (
        {},
        "The weights are read from the model folder, unless model_loader_extra_config has",
    ),
    "no prefix": (
        {"uri": "{training}"},
        "are under the keys 'model', 'optimizer': if the whole model is under one of them, pass this key as 'prefix'",
    ),
    "a wrong prefix": ({"uri": "{reshard}", "prefix": "module"}, "no name begins with the prefix 'module.'"),
    "another format": ({"uri": "{reshard}", "format": "dcp"}, "CheckpointNotFoundError"),
    "a missing weight": ({"uri": "{partial}"}, "not initialized from checkpoint: {'model.norm.weight'}"),
}


@pytest.mark.parametrize("saved", ["llama"], indirect=True)
@pytest.mark.parametrize("case", ERRORS)
def test_error_says_what_to_do(saved: Saved, vllm_ranks: RankPool, tmp_path: Path, case: str) -> None:
    extra, message = ERRORS[case]
    if case == "a missing weight":
        source = reshard.open(saved.folder)
        kept = {name: source.read(name) for name in source.tensors if name != "model.norm.weight"}
        reshard.save(kept, tmp_path / "partial")
    places = {"partial": tmp_path / "partial"}
    places |= {name: saved.checkpoints / name for name in ("reshard", "training")}
    extra = {key: value.format(**places) if key == "uri" and value != 3 else value for key, value in extra.items()}
    with pytest.raises(RankFailed, match=re.escape(message)):
        run(vllm_ranks, 1, saved.config, "reshard", extra)


@pytest.mark.parametrize("saved", ["llama"], indirect=True)
def test_guide(saved: Saved, stock: Stock, vllm_ranks: RankPool, moto: Server, tmp_path: Path) -> None:
    """A whole engine finds the load format by its entry point. Each of its workers logs what it reads."""
    vllm_ranks.run(1, workers.make_model, saved.kind, str(tmp_path / "other"), 1)
    (tmp_path / "llama").symlink_to(saved.config)
    s3 = fsspec.filesystem("s3", **moto.options)
    s3.mkdir("bucket")
    s3.put(str(saved.checkpoints / "reshard"), "s3://bucket/llama", recursive=True)
    s3.put(str(tmp_path / "other"), "s3://bucket/llama-step-2000", recursive=True)
    environment = os.environ | {
        "AWS_ACCESS_KEY_ID": servers.KEY,
        "AWS_SECRET_ACCESS_KEY": servers.SECRET,
        "AWS_ENDPOINT_URL": moto.endpoint,
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.engines.engine", str(GUIDE)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-20_000:]
    first, _, reloaded = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[{")]
    assert first == as_json(stock(2, False))
    assert reloaded == as_json(run(vllm_ranks, 2, tmp_path / "other", "auto", {}))
    (message,) = [block.text for block in blocks(GUIDE) if block.language == "text"]
    pattern = r"Loaded weights from \S+: [\d.]+ MB needed"
    assert re.findall(pattern, done.stdout + done.stderr) == re.findall(pattern, message) * 2


def as_json(ranks: list[Loaded]) -> Any:
    return json.loads(json.dumps([rank.tensors for rank in ranks]))


def test_guide_lists_the_options() -> None:
    page = GUIDE.read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == [*OPTIONS]
