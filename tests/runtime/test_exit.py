"""A process whose call fails or is interrupted exits soon, even if its store does not answer."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import reshard
from tests.failing_s3 import FailingS3, failing_s3
from tests.torture.faults import CLIENTS, by_client

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MAX_S = 10.0
ANSWERS = {"503": 503, "none": 0}


def everything(method: str, key: str) -> bool:
    return True


def reads_of_data(method: str, key: str) -> bool:
    return method == "GET" and "/data/" in key


def writes(method: str, key: str) -> bool:
    return method in ("PUT", "POST", "DELETE")


CALLS = {
    "open": (everything, "reshard.open(uri, storage_options=options)"),
    "load": (reads_of_data, "reshard.load(state(), uri, storage_options=options)"),
    "verify": (reads_of_data, "reshard.open(uri, storage_options=options).verify()"),
    "save": (writes, "reshard.save(state(), uri, storage_options=options, overwrite=True)"),
    "convert from": (reads_of_data, "reshard.convert(uri, sys.argv[3], src_options=options)"),
    "convert to": (writes, "reshard.convert(sys.argv[2], uri + '-copy', dst_options=options)"),
}
OTHER_CALLS = {
    "save, no answer at all": (everything, "reshard.save(state(), uri, storage_options=options)"),
    "state_dict": (reads_of_data, "reshard.open(uri, storage_options=options).state_dict()"),
    "find_checkpoints": (everything, "reshard.find_checkpoints(uri, options)"),
    "StorageReader": (
        reads_of_data,
        "import torch.distributed.checkpoint; torch.distributed.checkpoint.load(state(), storage_reader="
        "reshard.StorageReader(uri, storage_options=options), no_dist=True)",
    ),
    "a large file": (
        writes,
        "import reshard.storage.stores.base; reshard.storage.stores.base.MAX_HELD_BYTES = 100_000; "
        "reshard.convert(sys.argv[2], uri + '-copy', dst_options=options, format='safetensors')",
    ),
    "metadata": (
        lambda method, key: key.endswith(".safetensors"),
        "reshard.open('s3://bucket/model', storage_options=options)",
    ),
}
CALLBACKS = {
    "load": (reads_of_data, "reshard.load(state(), uri, storage_options=options, progress=failing)"),
    "save": (writes, "reshard.save(state(), uri, storage_options=options, overwrite=True, progress=failing)"),
    "convert to": (
        lambda method, key: method == "PUT" and key.endswith(".shard"),
        "reshard.convert(sys.argv[2], uri + '-copy', dst_options=options, progress=failing)",
    ),
}
SCRIPT = """
import json, os, sys, torch
import reshard

def state():
    return {{f"layers.{{i}}": torch.zeros(64, 64) for i in range(40)}}

def failing(progress):
    if os.path.exists(sys.argv[4]):
        raise ValueError("the callback failed")

if __name__ == "__main__":
    uri, options = "s3://bucket/run", json.loads(sys.argv[1])
    print("begin", flush=True)
    {call}
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "run"
    reshard.save({f"layers.{i}": torch.randn(64, 64) for i in range(40)}, folder, codec="none")
    return folder


def content(saved: Path) -> dict[str, bytes]:
    names = ("model/a.safetensors", "model/b.safetensors")
    return dict.fromkeys(names, b"x" * 100) | {
        f"run/{p.relative_to(saved).as_posix()}": p.read_bytes() for p in saved.rglob("*") if p.is_file()
    }


def child(call: str, server: FailingS3, client: str, saved: Path, tmp_path: Path) -> subprocess.Popen[str]:
    """Start a process that makes a call. It handles SIGINT like a process that was started in a terminal."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(call=call))
    arguments = [
        json.dumps(by_client(client, server.options)),
        str(saved),
        str(tmp_path / "copy"),
        str(tmp_path / "fail"),
    ]
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


CASES = [
    (call, client, list(ANSWERS)[(i + j) % len(ANSWERS)])
    for i, call in enumerate(CALLS)
    for j, client in enumerate(CLIENTS)
]


@pytest.mark.parametrize(("call", "client", "answers"), CASES)
def test_an_interrupted_call_ends_the_process(
    call: str, client: str, answers: str, saved: Path, tmp_path: Path
) -> None:
    fails, code = CALLS[call]
    interrupted(fails, code, client, answers, saved, tmp_path)


@pytest.mark.parametrize(("client", "answers"), [("obstore", "none")])
@pytest.mark.parametrize("call", OTHER_CALLS)
def test_other_interrupted_calls_end_the_process(
    call: str, client: str, answers: str, saved: Path, tmp_path: Path
) -> None:
    fails, code = OTHER_CALLS[call]
    interrupted(fails, code, client, answers, saved, tmp_path)


def interrupted(
    fails: Callable[[str, str], bool], code: str, client: str, answers: str, saved: Path, tmp_path: Path
) -> None:
    with failing_s3(content=content(saved), fails=fails, answers=ANSWERS[answers]) as server:
        process = child(code, server, client, saved, tmp_path)
        assert server.failing.wait(60), process.communicate(timeout=60)
        time.sleep(0.5)
        assert process.poll() is None, process.communicate()
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=150)
        took = time.monotonic() - begin
    assert took < MAX_S, errors
    by_dcp = "StorageReader" in code  # DCP raises its own error, whose message contains the interrupt
    assert process.returncode == (1 if by_dcp else -signal.SIGINT), errors
    assert errors.rstrip().endswith("KeyboardInterrupt"), errors
    check_end(errors)


def check_end(errors: str) -> None:
    assert "Fatal" not in errors, errors
    assert "Exception ignored" not in errors, errors
    assert "Task was destroyed" not in errors, errors


@pytest.mark.parametrize(("client", "answers"), [("obstore", "none"), ("s3fs", "503")])
@pytest.mark.parametrize("call", CALLBACKS)
def test_a_callback_that_raises_ends_the_process(
    call: str, client: str, answers: str, saved: Path, tmp_path: Path
) -> None:
    fails, code = CALLBACKS[call]
    with failing_s3(content=content(saved), fails=fails, answers=ANSWERS[answers]) as server:
        process = child(code, server, client, saved, tmp_path)
        assert server.failing.wait(60), process.communicate(timeout=60)
        (tmp_path / "fail").touch()
        begin = time.monotonic()
        _, errors = process.communicate(timeout=150)
        took = time.monotonic() - begin
    assert took < MAX_S, errors
    assert process.returncode == 1, errors
    assert "the callback failed" in errors
    check_end(errors)


@pytest.mark.parametrize(("client", "answers"), [("obstore", "none"), ("obstore", "503"), ("s3fs", "none")])
def test_a_daemon_thread_that_loads_ends_with_the_process(
    client: str, answers: str, saved: Path, tmp_path: Path
) -> None:
    code = (
        "import threading, time; threading.Thread(target=reshard.load, args=(state(), uri), "
        "kwargs={'storage_options': options}, daemon=True).start(); "
        "[time.sleep(0.1) for _ in range(600) if not os.path.exists(sys.argv[4])]"
    )
    with failing_s3(content=content(saved), fails=reads_of_data, answers=ANSWERS[answers]) as server:
        process = child(code, server, client, saved, tmp_path)
        assert server.failing.wait(60), process.communicate(timeout=60)
        (tmp_path / "fail").touch()
        begin = time.monotonic()
        _, errors = process.communicate(timeout=150)
        took = time.monotonic() - begin
    assert took < MAX_S, errors
    assert process.returncode == 0, errors
    check_end(errors)


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_an_interrupted_command_ends(command: str, saved: Path, tmp_path: Path) -> None:
    code = (
        "from reshard.cli import main; sys.argv[1:] = ['" + command + "', uri, '-o', 'key=k', '-o', 'secret=s', '-o', "
        "'client_kwargs.region_name=us-east-1', '-o', "
        "'client_kwargs.endpoint_url=' + options['client_kwargs']['endpoint_url']]; main()"
    )
    fails = everything if command == "inspect" else reads_of_data
    with failing_s3(content=content(saved), fails=fails, answers=0) as server:
        process = child(code, server, "obstore", saved, tmp_path)
        assert server.failing.wait(60), process.communicate(timeout=60)
        time.sleep(0.5)
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=150)
        took = time.monotonic() - begin
    assert took < MAX_S, errors
    assert process.returncode in (1, 130), errors
    check_end(errors)
