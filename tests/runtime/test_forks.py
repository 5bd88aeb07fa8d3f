"""A forked child process can make every call, or gets an error that says what to do. It never waits forever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import reshard
from reshard.storage.runtime import forks
from tests import servers
from tests.conftest import Place
from tests.failing_s3 import failing_s3
from tests.torture.faults import by_client

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MAX_S = 100
STATE = {f"layers.{i}": torch.full((64, 64), float(i)) for i in range(20)}
PRELUDE = """
import json, os, signal, sys, threading, time, traceback, warnings, torch, reshard
from reshard.storage.stores.open import open_store

warnings.simplefilter("ignore", DeprecationWarning)  # Python warns about forking a process with threads
MAX_S = 30

def state(value=0.0):
    return {f"layers.{i}": torch.full((64, 64), value) for i in range(20)}

def check(values):
    assert all(values[f"layers.{i}"].eq(i).all() for i in range(20))

def wait(pid):
    until = time.monotonic() + MAX_S
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            assert status == 0, status
            return
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("the child hangs")

def fork(*calls, leave=os._exit):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for call in calls:
                call()
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        leave(code)
    return pid

def in_child(*calls, leave=os._exit):
    wait(fork(*calls, leave=leave))

class Layers(torch.utils.data.Dataset):
    def __init__(self, checkpoint):
        self.checkpoint = checkpoint
    def __len__(self):
        return 20
    def __getitem__(self, i):
        return self.checkpoint.read(f"layers.{i}")

if __name__ == "__main__":
    uri, options = sys.argv[1], json.loads(sys.argv[2])
    arguments = {"storage_options": options} if options else {}
"""


def run(code: str, place: Place, tmp_path: Path, torch_threads: int = 1) -> str:
    """Run a script in a process with a time limit, which kills children that hang."""
    script = tmp_path / "script.py"
    script.write_text(PRELUDE + textwrap.indent(textwrap.dedent(code), "    "))
    done = subprocess.run(
        [sys.executable, str(script), place[0], json.dumps(place[1])],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch_threads)},
        capture_output=True,
        text=True,
        timeout=MAX_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def saved(place: Place) -> Place:
    uri, options = place
    reshard.save(STATE, uri, storage_options=options or None)
    return place


STORES = ["local", "moto", "moto by s3fs", "gcs", "azurite"]


@pytest.mark.parametrize("store_name", STORES)
def test_a_child_can_make_every_call(saved: Place, tmp_path: Path) -> None:
    code = """
    checkpoint = reshard.open(uri, **arguments)
    check(checkpoint.state_dict())
    store = open_store(uri, options)
    store.read("manifest.reshard", 0, 1)

    def with_the_parents_objects():
        assert checkpoint.read("layers.7").eq(7).all()
        check(checkpoint.state_dict())
        assert checkpoint.verify() == []
        assert store.size("manifest.reshard")

    def with_its_own_objects():
        check(reshard.open(uri, **arguments).state_dict())
        loaded = state()
        reshard.load(loaded, uri, **arguments)
        check(loaded)
        copy = f"{uri}-copy"
        reshard.save(loaded, copy, **arguments)
        reshard.save(loaded, copy, overwrite=True, **arguments)
        assert [row.is_complete for row in reshard.find_checkpoints(copy, options)] == [True]
        reshard.remove(copy, options)

    in_child(with_the_parents_objects, with_its_own_objects)
    leave = os._exit if uri.startswith("abfs:") else sys.exit  # adlfs waits for a thread of the parent in sys.exit
    in_child(with_its_own_objects, with_the_parents_objects, leave=leave)
    in_child(lambda: in_child(with_the_parents_objects))
    check(checkpoint.state_dict())
    with_its_own_objects()
    """
    run(code, saved, tmp_path)


@pytest.mark.parametrize("store_name", ["local"])
def test_a_child_does_not_wait_for_the_threads_that_torch_had_in_its_parent(saved: Place, tmp_path: Path) -> None:
    code = """
    large = {"i": torch.arange(500_000), "f": torch.rand(500_000)}
    other = {"i": large["i"], "f": large["f"] + 1}  # torch starts its threads
    for name, values in (("a", large), ("b", other)):
        reshard.save(values, f"{uri}-{name}")

    def compare():
        assert [found.changed for found in reshard.diff(f"{uri}-a", f"{uri}-b")] == [500_000]
        assert reshard.diff(f"{uri}-a", f"{uri}-a") == []

    def load_smaller_integers():
        loaded = {"i": torch.empty(500_000, dtype=torch.int32)}
        reshard.load(loaded, f"{uri}-a")
        assert (loaded["i"].numpy() == large["i"].numpy()).all()
        assert torch.get_num_threads() == 2

    in_child(compare)
    in_child(load_smaller_integers)
    assert torch.get_num_threads() == 2
    """
    run(code, saved, tmp_path, torch_threads=2)


@pytest.mark.parametrize("store_name", ["moto"])
def test_children_can_use_a_store_that_the_parent_has_not_used(saved: Place, tmp_path: Path) -> None:
    code = """
    store = open_store(uri, options)
    calls = [lambda: check(reshard.open(uri, **arguments).state_dict()), store.list]
    children = [fork(*calls) for _ in range(3)]
    for child in children:
        wait(child)
    check(reshard.open(uri, **arguments).state_dict())
    """
    run(code, saved, tmp_path)


@pytest.mark.parametrize("store_name", ["local", "moto", "moto by s3fs"])
def test_forked_workers_of_a_data_loader_can_read(saved: Place, tmp_path: Path) -> None:
    code = """
    checkpoint = reshard.open(uri, **arguments)
    checkpoint.read("layers.0")
    loader = torch.utils.data.DataLoader(
        Layers(checkpoint), num_workers=2, batch_size=5, multiprocessing_context="fork", timeout=30
    )
    for _ in range(2):
        values = torch.cat(list(loader))
        assert values.shape == (20, 64, 64) and all(values[i].eq(i).all() for i in range(20))
    """
    run(code, saved, tmp_path)


@pytest.mark.parametrize("store_name", ["local", "moto"])
def test_a_pool_of_forked_processes_can_read(saved: Place, tmp_path: Path) -> None:
    code = """
    import multiprocessing
    checkpoint = reshard.open(uri, **arguments)
    checkpoint.read("layers.0")

    def layer(i):
        return float(checkpoint.read(f"layers.{i}").mean())

    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(layer, range(20)).get(30) == list(range(20))
    """
    run(code, saved, tmp_path)


def test_calls_import_nothing(tmp_path: Path) -> None:
    """A fork during an import, in another thread, would leave the module locked in the child."""
    code = """
    save, load, checkpoint = reshard.save, reshard.load, reshard.open(uri)
    before = set(sys.modules)
    check(checkpoint.state_dict())
    loaded = state()
    load(loaded, uri)
    save(loaded, uri + "-again")
    assert set(sys.modules) == before, sorted(set(sys.modules) - before)
    """
    reshard.save(STATE, tmp_path / "c")
    run(code, (str(tmp_path / "c"), {}), tmp_path)


@pytest.mark.parametrize("store_name", ["local", "moto", "moto by s3fs"])
def test_a_fork_during_loads_of_other_threads(saved: Place, tmp_path: Path) -> None:
    code = """
    checkpoint = reshard.open(uri, **arguments)
    ended = threading.Event()
    counts = [0, 0]

    def keep_loading(number):
        while not ended.is_set():
            check(checkpoint.state_dict())
            loaded = state()
            reshard.load(loaded, uri, **arguments)
            check(loaded)
            counts[number] += 1

    threads = [threading.Thread(target=keep_loading, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    for delay in range(4):
        time.sleep(0.05 + delay / 100)
        in_child(
            lambda: check(checkpoint.state_dict()),
            lambda: check(reshard.open(uri, **arguments).state_dict()),
            leave=(os._exit, sys.exit)[delay % 2],
        )
    ended.set()
    for thread in threads:
        thread.join(30)
    assert all(counts), counts
    """
    run(code, saved, tmp_path)


@pytest.mark.parametrize("store_name", ["local"])
def test_a_fork_waits_for_an_import_of_another_thread(saved: Place, tmp_path: Path) -> None:
    """The import of `reshard.load` lasts until after the fork. The child imports it, too."""
    code = """
    import builtins

    original, begun = builtins.__import__, threading.Event()

    def slow_import(name, *arguments, **named):
        if threading.current_thread() is not threading.main_thread() and not begun.is_set():
            begun.set()
            time.sleep(1)
        return original(name, *arguments, **named)

    builtins.__import__ = slow_import
    assert "reshard.storage.load" not in sys.modules
    thread = threading.Thread(target=lambda: reshard.load)
    thread.start()
    assert begun.wait(30)
    in_child(lambda: reshard.load(state(), uri, **arguments))
    thread.join()
    assert "reshard.storage.load" in sys.modules
    """
    run(code, saved, tmp_path)


@pytest.mark.parametrize("store_name", ["local"])
def test_locks_held_by_another_thread_are_free_in_a_child(saved: Place, tmp_path: Path) -> None:
    code = """
    import torch.distributed.checkpoint as dcp
    from reshard.storage.runtime import forks
    warnings.simplefilter("ignore")
    dcp.save(state(3.0), checkpoint_id=uri + "-dcp", no_dist=True)
    checkpoints = [reshard.open(uri), reshard.open(uri + "-dcp")]
    for checkpoint in checkpoints:
        checkpoint.read("layers.3")
    locks = list(forks._locks)
    assert len(locks) > 6
    held, ended = threading.Event(), threading.Event()

    def hold():
        for lock in locks:
            lock.__enter__()
        held.set()
        ended.wait()
        for lock in locks:
            lock.__exit__(None, None, None)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()

    def read():
        for checkpoint in checkpoints:
            assert checkpoint.read("layers.3").eq(3).all()
            checkpoint.verify()
        check(reshard.open(uri).state_dict())

    try:
        in_child(read, leave=sys.exit)
    finally:
        ended.set()
        thread.join()
    read()
    """
    run(code, saved, tmp_path)


@pytest.mark.parametrize("store_name", ["moto"])
def test_the_error_says_what_to_do_if_no_client_works_in_a_child(saved: Place, tmp_path: Path) -> None:
    code = """
    sys.modules["s3fs"] = None
    checkpoint = reshard.open(uri, **arguments)
    checkpoint.read("layers.0")

    def refused(call):
        try:
            call()
        except reshard.errors.StoreError as error:
            assert "spawn or forkserver" in str(error) and "s3fs" in str(error), error
        else:
            raise AssertionError("no error")

    in_child(
        lambda: refused(lambda: checkpoint.read("layers.0")),
        lambda: refused(lambda: reshard.open(uri, **arguments)),
        lambda: refused(lambda: reshard.save(state(), uri + "-copy", **arguments)),
        lambda: refused(lambda: reshard.load(state(), uri, **arguments)),
        lambda: refused(checkpoint.verify),
    )
    check(checkpoint.state_dict())
    """
    run(code, saved, tmp_path)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_spawn_and_forkserver_work_as_the_error_says(method: str, s3: Place, tmp_path: Path) -> None:
    uri, options = s3
    reshard.save(STATE, uri, storage_options=options)
    code = f"""
    import multiprocessing
    check(reshard.open(uri, **arguments).state_dict())
    child = multiprocessing.get_context("{method}").Process(
        target=reshard.load, args=(state(), uri), kwargs=arguments
    )
    child.start()
    child.join(60)
    assert child.exitcode == 0, child.exitcode
    """
    run(code, s3, tmp_path)


def test_a_half_located_shard_of_dcp_is_located_again(tmp_path: Path) -> None:
    """A fork while a thread of the parent locates the values leaves the shard in such a state."""
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.save(STATE, checkpoint_id=tmp_path, no_dist=True)
    for column, value in (("starts", 10_000), ("lengths", 1), ("encodings", 0)):
        checkpoint = reshard.open(tmp_path)
        getattr(checkpoint._source._shards["layers.7"], column)[0] = value  # type: ignore[attr-defined]
        assert checkpoint.read("layers.7").equal(STATE["layers.7"])


def test_a_lock_that_is_held_is_free_in_a_child() -> None:
    before = forks.generation()
    lock = forks.fork_safe_lock()
    with lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if lock.acquire(timeout=10) and forks.generation() == before + 1 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert forks.generation() == before
    assert lock.acquire(timeout=0)


def test_an_http_uri_works_in_a_child(tmp_path: Path) -> None:
    reshard.save(STATE, tmp_path / "run")
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    content = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in files}
    code = """
    checkpoint = reshard.open(uri)
    check(checkpoint.state_dict())
    in_child(lambda: check(checkpoint.state_dict()), lambda: check(reshard.open(uri).state_dict()))
    """
    with failing_s3(content=content, fails=lambda method, key: False) as server:
        run(code, (f"{server.endpoint}/bucket/run", {}), tmp_path)


def test_storage_options_are_passed_in_a_child(moto: servers.Server, tmp_path: Path) -> None:
    uri, options = moto.place(uuid.uuid4().hex), by_client("s3fs", moto.options)
    code = """
    store = open_store(uri, options)
    store.put("x", b"x", overwrite=True)
    in_child(lambda: store.put("x", b"y", overwrite=True))
    assert bytes(store.read("x", 0, 1)) == b"y"
    """
    run(code, (uri, options), tmp_path)
