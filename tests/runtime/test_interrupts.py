"""A save that is interrupted at any step ends its process soon and leaves a complete checkpoint.

tests/runtime/test_exit.py interrupts the other calls, and a save while it writes.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import reshard
from reshard.storage.stores.memory import MemoryStore
from tests.failing_s3 import failing_s3
from tests.runtime.test_exit import ANSWERS, MAX_S, check_end, child, content, everything, interrupted, saved

pytestmark = pytest.mark.slow

__all__ = ["saved"]
SAVE = "reshard.save(state(), uri, storage_options=options, overwrite=True)"
BY_DCP = (
    "import torch.distributed.checkpoint; torch.distributed.checkpoint.save(state(), storage_writer="
    "reshard.StorageWriter(uri, storage_options=options), no_dist=True)"
)
IN_PARTS = "import reshard.storage.stores.base; reshard.storage.stores.base.MAX_HELD_BYTES = 100_000; "
LARGE = f"{IN_PARTS}reshard.save({{'w': torch.randn(2000, 1000)}}, uri, storage_options=options, overwrite=True)"


def of_the_manifest(method: str, key: str) -> bool:
    return method == "PUT" and key.endswith("manifest.reshard")


def removals(method: str, key: str) -> bool:
    return method == "DELETE" or (method == "POST" and not key)


def of_data(method: str, key: str) -> bool:
    return method in ("PUT", "POST") and key.endswith(".shard")


SAVES: dict[str, tuple[Callable[[str, str], bool], str]] = {
    "begin": (everything, SAVE),
    "commit": (of_the_manifest, SAVE),
    "removal of replaced objects": (removals, SAVE),
    "parts": (of_data, LARGE),
}


@pytest.mark.parametrize(
    ("step", "client", "answers"),
    [
        ("begin", "s3fs", "none"),
        ("commit", "obstore", "none"),
        ("commit", "s3fs", "none"),
        ("commit", "s3fs", "503"),
        ("removal of replaced objects", "obstore", "none"),
        ("removal of replaced objects", "s3fs", "503"),
        ("parts", "obstore", "503"),
        ("parts", "s3fs", "none"),
    ],
)
def test_an_interrupted_save_leaves_a_complete_checkpoint(
    step: str, client: str, answers: str, saved: Path, tmp_path: Path
) -> None:
    fails, code = SAVES[step]
    with failing_s3(content=content(saved), fails=fails, answers=ANSWERS[answers]) as server:
        process = child(code, server, client, saved, tmp_path)
        assert server.failing.wait(60), process.communicate(timeout=60)
        time.sleep(0.3)
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        took = time.monotonic() - begin
    assert took < MAX_S, errors
    assert process.returncode == -signal.SIGINT, errors
    assert errors.rstrip().endswith("KeyboardInterrupt"), errors
    check_end(errors)
    store = MemoryStore()
    store.content = {name.removeprefix("run/"): data for name, data in server.content.items() if name[:4] == "run/"}
    assert reshard.open(store).verify() == []
    assert len(reshard.open(store).tensors) == 40


def test_an_interrupted_removal_ends_the_process(saved: Path, tmp_path: Path) -> None:
    interrupted(removals, "reshard.remove(uri, options)", "s3fs", "none", saved, tmp_path)


def test_an_interrupted_save_by_dcp_ends_the_process(saved: Path, tmp_path: Path) -> None:
    with failing_s3(content=content(saved), fails=of_data, answers=0) as server:
        process = child(BY_DCP, server, "obstore", saved, tmp_path)
        assert server.failing.wait(60), process.communicate(timeout=60)
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        took = time.monotonic() - begin
    assert took < MAX_S, errors
    assert process.returncode in (1, -signal.SIGINT), errors
    assert "KeyboardInterrupt" in errors
    check_end(errors)


def test_a_large_object_is_written_again_after_a_failed_upload() -> None:
    """For an upload, obstore raises a plain OSError."""
    seen: list[str] = []

    def fails(method: str, key: str) -> bool:
        seen.append(key)
        return of_data(method, key) and sum(map(of_data, ["PUT"] * len(seen), seen)) <= 2

    with failing_s3(fails=fails) as server, pytest.MonkeyPatch.context() as patched:
        patched.setattr("reshard.storage.stores.base.MAX_HELD_BYTES", 100_000)
        values = torch.randn(1000, 1000)
        reshard.save({"w": values}, "s3://bucket/run", storage_options=server.options)
        assert reshard.open("s3://bucket/run", storage_options=server.options).read("w").equal(values)
    assert len({key for key in seen if key.endswith(".shard")}) == 2
