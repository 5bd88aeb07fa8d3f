"""Wrong arguments and damaged checkpoints raise a clear error of reshard and change nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import reshard
from reshard import errors
from reshard.storage.formats.native.manifest import MANIFEST_NAME
from reshard.storage.stores.local import LocalStore
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.stores.testing import Call, RecordingStore, failing
from tests.ranks import RankPool
from tests.samples import Custom

SAVED: dict[str, Any] = {"w": torch.arange(12.0).reshape(3, 4), "c": torch.ones(2, dtype=torch.complex64), "step": 3}


def saved() -> MemoryStore:
    store = MemoryStore()
    reshard.save(SAVED, store)
    return store


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({"v": torch.zeros(3)}, errors.MissingTensorError, r"no 'v'; it has 'c', 'step', 'w'"),
        ({"w": torch.zeros(4, 3)}, errors.ShapeMismatchError, r"'w' has shape \(3, 4\) in the checkpoint and \(4, 3\)"),
        (
            {"w": torch.zeros(3, 4, dtype=torch.int64)},
            errors.DtypeError,
            r"'w' is stored as torch.float32.*\.int64",
        ),
        ({"c": torch.zeros(2)}, errors.DtypeError, r"'c' is stored as torch.complex64.*torch.float32"),
        ({"w": None}, errors.DestinationError, r"'w' is a tensor of shape \(3, 4\) in the checkpoint and a NoneType"),
        ({"step": torch.zeros(1)}, errors.DestinationError, "'step' is a value in the checkpoint"),
        ({"w": torch.zeros(1, 4).expand(3, 4)}, errors.DestinationError, "'w' is expanded"),
        ({"w": torch.zeros(3, 4, device="meta")}, errors.DestinationError, "'w' is on the meta device"),
        ({"w": torch.zeros(3, 4).to_sparse()}, errors.DestinationError, "'w' has the layout torch.sparse_coo"),
        ({"a.b": 1, "a": {"b": 2}}, errors.DestinationError, "have the name 'a.b'"),
    ],
)
def test_state_dict_that_does_not_fit_raises(state: dict[str, Any], error: type[Exception], message: str) -> None:
    good = torch.zeros(3, 4)
    with pytest.raises(error, match=message):
        reshard.load({"x": {}, **state} | ({} if "w" in state else {"w": good}), saved())
    assert (good == 0).all(), "no tensor is changed before all are checked"


def test_error_says_if_the_state_dict_should_be_nested() -> None:
    store = MemoryStore()
    reshard.save({"model": {"up.weight": torch.zeros(3)}}, store)
    with pytest.raises(
        errors.MissingTensorError, match=r"it has 'model\.up\.weight': nest the state dict under 'model'"
    ):
        reshard.load({"up.weight": torch.zeros(3)}, store)


def damage(store: MemoryStore, change: Callable[[bytes], bytes], suffix: str) -> None:
    name = next(name for name in store.content if name.endswith(suffix))
    store.content[name] = change(store.content[name])


@pytest.mark.parametrize(
    ("suffix", "change", "error", "message"),
    [
        (".shard", lambda data: data[:-1], errors.CorruptCheckpointError, "cut short"),
        (".shard", lambda data: data[:12] + b"\xff" + data[13:], errors.CorruptCheckpointError, "checksum"),
        (MANIFEST_NAME, lambda data: data[:-1], errors.CorruptCheckpointError, "has .* bytes, but should have"),
        (MANIFEST_NAME, lambda data: data[:40] + b"\xff" + data[41:], errors.CorruptCheckpointError, "checksum"),
        (MANIFEST_NAME, lambda data: b"", errors.CorruptCheckpointError, "truncated: it has 0 bytes"),
        (MANIFEST_NAME, lambda data: data[:5], errors.CorruptCheckpointError, "truncated: it has 5 bytes"),
        (MANIFEST_NAME, lambda data: data[:12], errors.CorruptCheckpointError, "truncated: it has 12 bytes"),
        (
            MANIFEST_NAME,
            lambda data: data[:31],
            errors.CorruptCheckpointError,
            "truncated: it has 31 bytes, but should have at least 32",
        ),
        (MANIFEST_NAME, lambda data: data[:32], errors.CorruptCheckpointError, "has 32 bytes, but should have"),
        (MANIFEST_NAME, lambda data: b"RESH_RD", errors.CorruptCheckpointError, "not a manifest of reshard"),
        (MANIFEST_NAME, lambda data: b"PK\3\4" + data[4:], errors.CorruptCheckpointError, "not a manifest of reshard"),
        (
            MANIFEST_NAME,
            lambda data: data[:8] + b"\7" + data[9:],
            errors.CorruptCheckpointError,
            "version 7, which does not match its checksum",
        ),
    ],
)
def test_damaged_checkpoint_raises(
    suffix: str, change: Callable[[bytes], bytes], error: type[Exception], message: str
) -> None:
    store = saved()
    damage(store, change, suffix)
    state: dict[str, Any] = {"w": torch.full((3, 4), 7.0), "c": torch.zeros(2, dtype=torch.complex64), "step": 0}
    with pytest.raises(error, match=message) as caught:
        reshard.load(state, store)
    for name, before in (("w", 7), ("c", 0)):
        if suffix == MANIFEST_NAME or repr(name) in str(caught.value):
            assert (state[name] == before).all()
    assert state["step"] == 0


def test_missing_checkpoint_raises(tmp_path: Path) -> None:
    for open_or_load in (lambda uri: reshard.open(uri), lambda uri: reshard.load({"w": torch.zeros(1)}, uri)):
        with pytest.raises(errors.CheckpointNotFoundError, match=f"there is no checkpoint at {tmp_path}/x"):
            open_or_load(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_checkpoint_that_was_never_committed_raises(tmp_path: Path) -> None:
    reshard.save(SAVED, tmp_path)
    (tmp_path / MANIFEST_NAME).unlink()
    with pytest.raises(errors.NotCommittedError, match="was never committed: it has 1 data objects"):
        reshard.open(tmp_path)
    reshard.save(SAVED, tmp_path)
    assert reshard.open(tmp_path).read("w").equal(SAVED["w"])


def test_checkpoint_is_only_overwritten_with_overwrite(tmp_path: Path) -> None:
    reshard.save(SAVED, tmp_path)
    with pytest.raises(errors.CheckpointExistsError, match="overwrite=True"):
        reshard.save({"w": torch.zeros(1)}, tmp_path)
    assert reshard.open(tmp_path).read("w").equal(SAVED["w"])
    reshard.save({"w": torch.zeros(1)}, tmp_path, overwrite=True)
    assert reshard.open(tmp_path).read("w").equal(torch.zeros(1))
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2


def test_failed_overwrite_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    reshard.save(SAVED, tmp_path)
    for method in ("create", "write"):
        store = RecordingStore(LocalStore(tmp_path), failing(method))
        with pytest.raises(errors.StoreError, match="injected"):
            reshard.save({"w": torch.zeros(1)}, store, overwrite=True)
    store = RecordingStore(LocalStore(tmp_path), failing("put"))
    with pytest.raises(errors.CommitError, match="may or may not have been written"):
        reshard.save({"w": torch.zeros(1)}, store, overwrite=True)
    assert reshard.open(tmp_path).read("w").equal(SAVED["w"])


class LosingResponses(MemoryStore):
    """A store that writes the manifest but raises an error, as if the response was lost."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def put(self, name: str, data: bytes, *, overwrite: bool) -> None:
        super().put(name, data, overwrite=overwrite)
        raise self._error


@pytest.mark.parametrize("error", [errors.StoreError("timeout"), errors.CheckpointExistsError("412"), OSError("reset")])
@pytest.mark.parametrize("overwrite", [True, False])
def test_commit_with_a_lost_response_is_recognised(error: Exception, overwrite: bool) -> None:
    store = LosingResponses(error)
    reshard.save(SAVED, store, overwrite=overwrite)
    assert reshard.open(store).read("w").equal(SAVED["w"])


def test_first_of_two_concurrent_saves_wins() -> None:
    store = MemoryStore()

    def before(call: Call) -> None:
        if call.method == "put":
            reshard.save({"other": torch.ones(2)}, store)

    with pytest.raises(errors.CheckpointExistsError):
        reshard.save(SAVED, RecordingStore(store, before))
    assert list(reshard.open(store).tensors) == ["other"]
    assert len(store.content) == 2, "the objects of the other save are removed"


@pytest.mark.parametrize("error", [errors.StoreError("no"), OSError("no")])
def test_overwrite_succeeds_if_old_data_cannot_be_removed(error: Exception) -> None:
    store = MemoryStore()
    reshard.save({"w": torch.zeros(1)}, store)
    reshard.save(SAVED, RecordingStore(store, failing("delete", error=error)), overwrite=True)
    assert reshard.open(store).read("w").equal(SAVED["w"])
    assert len(store.content) == 3


def test_invalid_values_and_arguments_raise(tmp_path: Path) -> None:
    with pytest.raises(errors.UnsupportedValueError, match=r"'hooks\.f', of .*function.*lambda"):
        reshard.save({"hooks": {"f": lambda: 0}}, tmp_path)
    with pytest.raises(errors.ArgumentError, match="codec must be 'zstd' or 'none'"):
        reshard.save(SAVED, tmp_path, codec="lzma")
    with pytest.raises(errors.ArgumentError, match="expected a path, a URI or a Store, got 3"):
        reshard.open(3)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


class Model(torch.nn.Linear):
    """Users may pass a module instead of its state dict."""


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ([1], errors.ArgumentError, "expected a state dict, a mapping of names to values, got list"),
        (Model(2, 2), errors.ArgumentError, "got Model"),
        (
            {"m": {"s": torch.eye(3).to_sparse()}},
            errors.UnsupportedValueError,
            r"'m\.s' cannot be stored: .*sparse_coo",
        ),
        ({"m": torch.zeros(2, device="meta")}, errors.UnsupportedValueError, "'m' cannot be stored: .*meta"),
        ({"a.b": 1, "a": {"b": 2}}, errors.DestinationError, r"have the name 'a\.b'"),
    ],
)
def test_invalid_state_dict_or_unsupported_tensor_raises(state: Any, error: type[Exception], message: str) -> None:
    store = MemoryStore()
    with pytest.raises(error, match=message):
        reshard.save(state, store)
    assert store.content == {}


def test_missing_tensor_error_shows_similar_names() -> None:
    store = MemoryStore()
    reshard.save({"model": {"fc1.weight": torch.zeros(2)}, "hp": {"lr": 1}}, store)
    with pytest.raises(errors.MissingTensorError, match=r"nearest are 'model\.fc1\.weight'"):
        reshard.open(store).read("model.fc1.weigth")
    with pytest.raises(errors.MissingTensorError, match=r"it has 'model\.fc1\.weight', \.\.\.; pass allow_missing="):
        reshard.load({"model": {"fc9.weight": torch.zeros(2)}}, store)
    with pytest.raises(errors.MissingTensorError, match="nested too deeply, remove the outer key 'state'"):
        reshard.load({"state": {"model": {"fc1.weight": torch.zeros(2)}}}, store)
    reshard.save({"w": 1, "model": {"a": 1, "weight": 2}}, store, overwrite=True)
    with pytest.raises(errors.MissingTensorError, match=r"no 'model\.w'; it has .*'model\.weight'"):
        reshard.load({"model": {"a": 0, "w": 0}}, store)
    with pytest.raises(
        errors.MissingTensorError, match=r"has 2 items .* and 1 .*, and it has .*'model\.weight'.*: use"
    ):
        reshard.load({"model": {"wieght": 0}}, store)
    reshard.save({"lr": 1, "groups": [{"lr": 1}]}, store, overwrite=True)
    with pytest.raises(errors.MissingTensorError, match="the list 'groups' has 1 items in the checkpoint and 2 in"):
        reshard.load({"groups": [{"lr": 0}, {"lr": 0}]}, store)


def test_location_that_cannot_be_created_raises() -> None:
    with pytest.raises(errors.StoreError, match=r"cannot write .* cannot be created|no permission to write"):
        reshard.save(SAVED, "/proc/no-such-folder/x")


def test_folder_of_checkpoints_is_not_an_uncommitted_checkpoint(tmp_path: Path) -> None:
    reshard.save(SAVED, tmp_path / "step-1")
    with pytest.raises(errors.CheckpointNotFoundError, match="there is no checkpoint at"):
        reshard.open(tmp_path)


def test_unexpected_keys_are_reported_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    reshard.save({"optimizer": {"state": {"0": torch.ones(3)}, "lr": 0.1}, "other": 1}, store)
    report = reshard.load({"optimizer": {"lr": 0}}, store)
    assert report.unexpected_keys == ("optimizer.state.0",)
    assert "1 names of the checkpoint are not in the state dict: 'optimizer.state.0'" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "unused"),
    [
        ({"exclude": "optimzer"}, ("optimzer",)),
        ({"exclude": ["optimizer", "modle.*"]}, ("modle.*",)),
        ({"rename": {"module.*": "*"}}, ("module.*",)),
        ({"rename": {"optimizer.*": "opt.*", "opt.*": "optimizer.*", "module.*": "*"}}, ("module.*",)),
        ({"exclude": "optimizer", "rename": {"model.*": "model.*"}}, ()),
        ({"allow_missing": "ema"}, ()),
    ],
)
def test_patterns_that_match_nothing_are_reported(
    arguments: dict[str, Any], unused: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    store = MemoryStore()
    saved = {"model": {"w": torch.ones(3)}, "optimizer": {"lr": 0.1}}
    reshard.save(saved, store)
    report = reshard.load({"model": {"w": torch.zeros(3)}, "optimizer": {"lr": 0}}, store, **arguments)
    assert report.unused_patterns == unused
    assert ("exclude or rename has patterns that match no name" in caplog.text) == bool(unused)
    assert "nothing was loaded" not in caplog.text


def load_stages(folder: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Only rank 1 has the last layer, as in a pipeline."""
    state = {("first", "last")[dist.get_rank()]: torch.zeros(3)}
    first = reshard.load(state, folder, exclude=["last", "lost"]).unused_patterns
    return first, reshard.load(state, folder, exclude="last").unused_patterns


def test_a_pattern_may_match_a_name_of_another_rank(ranks: RankPool, tmp_path: Path) -> None:
    reshard.save({"first": torch.ones(3), "last": torch.ones(3)}, tmp_path)
    assert ranks.run(2, load_stages, str(tmp_path)) == [(("lost",), ())] * 2


@pytest.mark.parametrize(("state", "exclude"), [({}, ()), ({"w": torch.zeros(3)}, "*"), ({"layers": {}}, ())])
def test_a_load_of_nothing_is_logged(state: dict[str, Any], exclude: Any, caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    reshard.save({"w": torch.ones(3)}, store)
    reshard.load(state, store, exclude=exclude)
    assert "nothing was loaded" in caplog.text


@pytest.mark.parametrize("uri", ["nosuch://bucket/x", "s3a+x://y"])
def test_unknown_protocol_raises(uri: str) -> None:
    for call in (
        lambda: reshard.open(uri),
        lambda: reshard.load({"w": torch.zeros(1)}, uri),
        lambda: reshard.save({"w": torch.zeros(1)}, uri),
    ):
        with pytest.raises(errors.UnsupportedURIError, match="cannot open"):
            call()


def test_wrong_credentials_raise_access_denied_error(
    s3: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, options = s3
    reshard.save(SAVED, uri, storage_options=options)
    secret = "a-secret-that-must-not-be-shown"
    wrong = {**options, "key": "AKIAWRONG", "secret": secret}
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)  # from now on, moto checks the credentials
    for call in (
        lambda: reshard.open(uri, storage_options=wrong),
        lambda: reshard.load({"w": torch.zeros(3, 4)}, uri, storage_options=wrong),
        lambda: reshard.save(SAVED, uri, storage_options=wrong, overwrite=True),
    ):
        with pytest.raises(errors.AccessDeniedError, match="check the credentials") as caught:
            call()
        assert secret not in str(caught.value)


def test_value_that_needs_pickle_requires_allow_pickle() -> None:
    store = MemoryStore()
    reshard.save({"when": Custom(2)}, store)
    state: dict[str, Any] = {"when": None}
    with pytest.raises(errors.UnsafeValueError, match=r"'when'.*allow_pickle=True"):
        reshard.load(state, store)
    assert state["when"] is None
    reshard.load(state, store, allow_pickle=True)
    assert state["when"] == Custom(2)
    assert reshard.open(store).read_value("when", allow_pickle=True) == state["when"]
