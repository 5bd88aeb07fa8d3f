"""Conversions that cannot succeed: they raise an error, commit nothing, and keep existing files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import reshard
from reshard.errors import (
    ArgumentError,
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CommitError,
    CorruptCheckpointError,
    MissingTensorError,
    StoreError,
    UnavailableError,
    UnsupportedURIError,
)
from reshard.storage.conversion.journal import CLAIM
from reshard.storage.formats.native.manifest import MANIFEST_NAME
from reshard.storage.stores.local import LocalStore
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.stores.testing import Call, RecordingStore, failing
from tests.conversion.samples import (
    COMMITS,
    KIB,
    SOURCES,
    assert_clean,
    assert_converted,
    by_name,
    cut_small,
    names_in,
    save_native,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
TARGETS = ("reshard", "dcp", "safetensors")
STATE = {
    "model": {"layers": {"0": {"up": torch.ones(3), "down": torch.zeros(2)}}, "norm": torch.full((2,), 5.0)},
    "optimizer": {"step": torch.tensor(3)},
}


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return save_native(STATE, tmp_path / "src")


def content_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names_in(folder)}


UP, DOWN, NORM, STEP = "model.layers.0.up", "model.layers.0.down", "model.norm", "optimizer.step"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": "model"}, {UP: UP, DOWN: DOWN, NORM: NORM}),
        ({"include": "*.up"}, {UP: UP}),
        ({"include": ["*.up", "model.norm"]}, {UP: UP, NORM: NORM}),
        ({"include": "model", "exclude": ["*.up", "*.down"]}, {NORM: NORM}),
        (
            {"include": "model", "rename": {"model.*": "*"}},
            {"layers.0.up": UP, "layers.0.down": DOWN, "norm": NORM},
        ),
        ({"rename": {"model.*": "*"}}, {"layers.0.up": UP, "layers.0.down": DOWN, "norm": NORM, STEP: STEP}),
        (
            {"rename": {"*.layers.0.up": "*.a", "*": "all.*"}},
            {"all.model.a": UP, **{f"all.{name}": name for name in (DOWN, NORM, STEP)}},
        ),
        (
            {"include": ["model.norm", STEP], "rename": {"model.norm": "n", "optimizer.*": "opt.*.x"}},
            {"n": NORM, "opt.step.x": STEP},
        ),
        ({"include": "*.up", "rename": {"model.layers.*.up": "up"}}, {"up": UP}),
    ],
)
def test_convert_selects_and_renames(
    options: dict[str, Any], expected: dict[str, str], src: Path, tmp_path: Path
) -> None:
    values = by_name(STATE)
    for format in TARGETS:
        report = reshard.convert(src, tmp_path / format, format=format, **options)
        assert_converted(tmp_path / format, {new: values[old] for new, old in expected.items()}, format)
        assert set(report.dropped) == set(values) - set(expected.values())


def test_star_in_a_name_is_not_a_pattern(tmp_path: Path) -> None:
    src = save_native({"a*": torch.ones(1), "ab": torch.zeros(1)}, tmp_path / "src")
    reshard.convert(src, tmp_path / "dst", rename={"a*": "x*"})
    assert set(reshard.open(tmp_path / "dst").tensors) == {"x*", "xb"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"include": "modle"}, MissingTensorError, r"the checkpoint has no name that matches 'modle'"),
        ({"include": ["model", "modle"]}, MissingTensorError, r"no name that matches 'modle'"),
        ({"include": []}, ArgumentError, r"include has no pattern"),
        ({"include": 3}, ArgumentError, r"include must be a pattern of names, or a list of patterns, got 3"),
        ({"include": {"model.*": "*"}}, ArgumentError, r"include must be a pattern of names"),
        ({"exclude": "modle"}, MissingTensorError, r"no name that matches 'modle'"),
        ({"rename": {"model": "*"}}, ArgumentError, r"rename: '\*' has more stars than the pattern 'model'"),
        ({"rename": {"mdel": "x", "x.*": "*"}}, MissingTensorError, r"no name that matches 'mdel', 'x\.\*'"),
        (
            {"rename": {"model.*": "*", "optim.*": "*"}},
            MissingTensorError,
            r"no name that matches 'optim\.\*'; nearest are 'optimizer\.\*'",
        ),
        (
            {"include": "model", "rename": {"optimizer.*": "*"}},
            MissingTensorError,
            r"no name that matches 'optimizer\.\*'",
        ),
        ({"include": "model.norn"}, MissingTensorError, r"matches 'model\.norn'; nearest are 'model\.norm'"),
        ({"include": "*.bias"}, MissingTensorError, r"matches '\*\.bias'; nearest are"),
        ({"include": "model.layers.7"}, MissingTensorError, r"matches 'model\.layers\.7'"),
        (
            {"rename": {"model.layers.0.*": "x"}},
            ArgumentError,
            r"'model\.layers\.0\..*' and .* would both be named 'x'",
        ),
        (
            {"rename": {"model.*": "*", "optimizer.step": "norm"}},
            ArgumentError,
            r"would both be named 'norm'",
        ),
        ({"rename": {"model.norm": ""}}, ArgumentError, r"'model\.norm' would be renamed to an empty name"),
        ({"format": "DCP"}, ArgumentError, r"format must be one of \('reshard', 'dcp', 'safetensors'\), got 'DCP'"),
        ({"format": "torch"}, ArgumentError, "format must be one of"),
        ({"codec": "lzma"}, ArgumentError, "codec must be 'zstd' or 'none'"),
        ({"src_format": "lzma"}, ArgumentError, "format must be one of"),
        ({"src_format": "dcp"}, CheckpointNotFoundError, "no checkpoint of format 'dcp'"),
        ({"dtype": torch.int32}, ArgumentError, r"dtype must be a floating-point dtype .*, got torch\.int32"),
        ({"dtype": torch.complex64}, ArgumentError, r"dtype must be .*, got torch\.complex64"),
        ({"dtype": torch.float4_e2m1fn_x2}, ArgumentError, r"dtype must be .*, got torch\.float4_e2m1fn_x2"),
        (
            {"max_file_bytes": 0},
            ArgumentError,
            "max_file_bytes must be a positive integer .*, got 0",
        ),
        ({"max_file_bytes": "5GB"}, ArgumentError, "max_file_bytes must be a positive integer or None"),
        (
            {"rename": {"model.norm": "__metadata__"}, "format": "safetensors"},
            ArgumentError,
            "safetensors cannot have a tensor named '__metadata__'",
        ),
    ],
)
def test_invalid_arguments_raise_before_anything_is_written(
    options: dict[str, Any], error: type[CheckpointError], message: str, src: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        reshard.convert(src, tmp_path / "dst", **options)
    assert not (tmp_path / "dst").exists()


def test_missing_source_raises_not_found_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="there is no checkpoint at"):
        reshard.convert(tmp_path / "absent", tmp_path / "dst")
    assert list(tmp_path.iterdir()) == []


def test_unknown_uri_scheme_of_destination_raises(src: Path) -> None:
    with pytest.raises(UnsupportedURIError):
        reshard.convert(src, "nowhere://x")


@pytest.mark.parametrize("format", TARGETS)
@pytest.mark.parametrize("existing", SOURCES)
def test_existing_checkpoint_is_not_changed(existing: str, format: str, src: Path, tmp_path: Path) -> None:
    dst = SOURCES[existing](STATE, tmp_path / "dst")
    before = content_of(dst)
    with pytest.raises(CheckpointExistsError, match=r"there is already a checkpoint, or a part of one, at .*dst"):
        reshard.convert(src, dst, format=format)
    assert content_of(dst) == before


@pytest.mark.parametrize("format", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_checkpoint_is_not_converted_in_place(source: str, format: str, tmp_path: Path) -> None:
    location = SOURCES[source](STATE, tmp_path / "src")
    before = content_of(location)
    with pytest.raises(CheckpointExistsError, match="there is already a checkpoint"):
        reshard.convert(location, location, format=format)
    assert content_of(location) == before


@pytest.mark.parametrize("format", TARGETS)
@pytest.mark.parametrize(
    "name", ["data/0.shard", "__0_0.distcp", "__3.metadata", "model-00001-of-00002.safetensors", "model.bin"]
)
def test_part_of_a_checkpoint_is_not_changed(name: str, format: str, src: Path, tmp_path: Path) -> None:
    file = tmp_path / "dst" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"precious")
    with pytest.raises(CheckpointExistsError, match=f"it has '{name}'"):
        reshard.convert(src, tmp_path / "dst", format=format)
    assert content_of(tmp_path / "dst") == {name: b"precious"}


def test_other_files_at_the_destination_are_kept(src: Path, tmp_path: Path) -> None:
    (tmp_path / "dst" / "deeper").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "README.md", "deeper/model.safetensors"):
        (tmp_path / "dst" / name).write_bytes(b"kept")
    reshard.convert(src, tmp_path / "dst", format="safetensors")
    assert_converted(tmp_path / "dst", by_name(STATE), "safetensors")
    assert list(content_of(tmp_path / "dst").values()).count(b"kept") == 4


def test_destination_that_is_a_file_raises_store_error(src: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for name in ("file", "file/deeper"):
        with pytest.raises(StoreError, match="file"):
            reshard.convert(src, tmp_path / name)
    assert (tmp_path / "file").read_bytes() == b"x"


@pytest.mark.parametrize(
    "other", [{"format": "dcp"}, {"codec": "none"}, {"include": "model"}, {"dtype": torch.float16}]
)
def test_unfinished_conversion_with_other_arguments_raises(other: dict[str, Any], src: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    with pytest.raises(CommitError, match=rf"'{MANIFEST_NAME}' may or may not have been written: injected"):
        reshard.convert(src, RecordingStore(LocalStore(dst), failing("put", after=3)))
    before = content_of(dst)
    assert len(before) == 3  # the claim, a note and its object
    with pytest.raises(CheckpointExistsError, match=r"another conversion has started at .*dst, with another source or"):
        reshard.convert(src, dst, **other)
    assert content_of(dst) == before
    reshard.convert(src, dst)
    assert_converted(dst, by_name(STATE), "reshard")
    assert_clean(names_in(dst), dst, "reshard")


@pytest.mark.parametrize("source", SOURCES)
def test_source_that_was_overwritten_is_another_source(source: str, tmp_path: Path) -> None:
    """Names and sizes are the same, but the values differ."""

    def save(value: float) -> Path:
        return SOURCES[source]({"a": {"w": torch.full((300, 300), value)}, "b": torch.ones(3)}, tmp_path / "src")

    dst = tmp_path / "dst"
    location = save(1.0)
    with pytest.raises(StoreError, match="injected"):
        reshard.convert(location, RecordingStore(LocalStore(dst), failing("put", after=2)), format="dcp")
    for name in names_in(location):
        (location / name).unlink()
    for folder in sorted(location.rglob("*"), reverse=True):
        folder.rmdir()
    location.rmdir()
    save(2.0)
    with pytest.raises(CheckpointExistsError, match="another conversion has started"):
        reshard.convert(location, dst, format="dcp")


@pytest.mark.parametrize("format", TARGETS)
@pytest.mark.parametrize("method", ["list", "read", "put", "create", "write", "delete", "size"])
def test_store_error_is_raised_and_the_next_run_completes(
    method: str, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_small(monkeypatch)
    state = {"large": torch.randn(500, 300), "small": torch.randn(5)}
    src = save_native(state, tmp_path / "src")
    options: dict[str, Any] = {"max_file_bytes": 200 * KIB}
    for after in (0, 1, 2, 4, 7):
        store = MemoryStore()
        message = ""
        try:
            reshard.convert(src, RecordingStore(store, failing(method, after=after)), format=format, **options)
        except StoreError as error:
            message = str(error)
        assert (COMMITS[format] in store.content) == (message == "")
        assert "injected" in message or not message
        if CLAIM in store.content or message:
            reshard.convert(src, store, format=format, **options)
        assert_converted(store, state, format)
        assert_clean(set(store.content), store, format)


@pytest.mark.parametrize("format", TARGETS)
def test_commit_with_a_lost_response_is_recognised(format: str, src: Path, tmp_path: Path) -> None:
    memory = MemoryStore()

    class Losing(RecordingStore):
        def put(self, name: str, data: bytes, *, overwrite: bool) -> None:
            super().put(name, data, overwrite=overwrite)
            if name in (COMMITS[format], CLAIM) and not overwrite:
                raise CheckpointExistsError(f"{name} exists")  # as a repeated try does

    reshard.convert(src, Losing(memory), format=format)
    assert_converted(memory, by_name(STATE), format)
    assert_clean(set(memory.content), memory, format)


def test_checkpoint_that_appeared_during_the_conversion_is_not_replaced(src: Path) -> None:
    memory = MemoryStore()

    def commit_before(call: Call) -> None:
        if call.method == "put" and call.name == MANIFEST_NAME:
            memory.content[MANIFEST_NAME] = b"of another program"

    with pytest.raises(CheckpointExistsError, match="there is already a checkpoint, or a part of one, at memory"):
        reshard.convert(src, RecordingStore(memory, commit_before))
    assert memory.content[MANIFEST_NAME] == b"of another program"
    with pytest.raises(CheckpointExistsError, match="there is already a checkpoint, or a part of one, at memory"):
        reshard.convert(src, memory)
    assert memory.content[MANIFEST_NAME] == b"of another program"


@pytest.mark.parametrize("unit", [50 * KIB, 10000 * KIB])
def test_run_stops_if_its_claim_was_removed(unit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run of the same conversion may finish first. The run stops at the next unit, or before the commit."""
    cut_small(monkeypatch, unit=unit)
    src = save_native({str(i): torch.randn(100, 200) for i in range(4)}, tmp_path / "src")
    memory = MemoryStore()

    def end_before(call: Call) -> None:
        if call.method == "create":
            memory.content.pop(CLAIM, None)

    store = RecordingStore(memory, end_before)
    with pytest.raises(CheckpointExistsError, match="no longer belongs to this conversion"):
        reshard.convert(src, store)
    assert MANIFEST_NAME not in memory.content
    assert sum(call.method == "create" for call in store.calls) == 1


def test_missing_object_is_found_before_the_commit(src: Path) -> None:
    memory = MemoryStore()

    def lose_before(call: Call) -> None:
        if call.method == "put" and call.name.endswith("-000000.json"):
            for name in [name for name in memory.content if name.startswith("data/")]:
                del memory.content[name]

    with pytest.raises(CorruptCheckpointError, match=r"'data/.*shard', which the conversion has written, is missing"):
        reshard.convert(src, RecordingStore(memory, lose_before))
    assert MANIFEST_NAME not in memory.content
    reshard.convert(src, memory)
    assert_converted(memory, by_name(STATE), "reshard")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"7", b'{"conversion": "0", "unit": 0, "done": {}}'])
def test_damaged_note_or_claim_raises(content: bytes, src: Path) -> None:
    memory = MemoryStore()
    with pytest.raises(CommitError):
        reshard.convert(src, RecordingStore(memory, failing("put", after=3)))
    memory.content[".reshard-convert-000000.json"] = content
    with pytest.raises(CorruptCheckpointError, match=r"'\.reshard-convert-000000\.json' in memory is not from"):
        reshard.convert(src, memory)
    memory.content[CLAIM] = content
    with pytest.raises(
        (CorruptCheckpointError, CheckpointExistsError), match=r"is not from a conversion|another conversion"
    ):
        reshard.convert(src, memory)
    assert MANIFEST_NAME not in memory.content


@pytest.mark.parametrize("format", TARGETS)
def test_damaged_source_raises_and_nothing_is_committed(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_small(monkeypatch)
    src = save_native({"large": torch.randn(500, 300), "small": torch.randn(5)}, tmp_path / "src")
    (data,) = (src / "data").iterdir()
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=r"'large': .*checksum"):
        reshard.convert(src, tmp_path / "dst", format=format)
    assert COMMITS[format] not in names_in(tmp_path / "dst")
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    reshard.convert(src, tmp_path / "dst", format=format)
    assert_clean(names_in(tmp_path / "dst"), tmp_path / "dst", format)


def test_missing_object_of_the_source_raises(tmp_path: Path) -> None:
    src = SOURCES["dcp"](STATE, tmp_path / "src")
    next(iter(sorted(src.glob("*.distcp")))).unlink()
    with pytest.raises(CorruptCheckpointError, match="missing"):
        reshard.convert(src, tmp_path / "dst")


def test_single_file_is_not_converted_into_its_own_folder(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointExistsError, match=r"it has 'model\.safetensors'"):
        reshard.convert(tmp_path / "model.safetensors", tmp_path)
    reshard.convert(tmp_path / "model.safetensors", tmp_path / "deeper")
    assert reshard.open(tmp_path / "deeper").read("w").tolist() == [1, 1, 1]


def test_unavailable_store_raises_after_the_retries(src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reshard.storage.stores import retry

    monkeypatch.setattr(retry, "RETRY_FOR_S", 0.1)
    memory = MemoryStore()
    with pytest.raises(UnavailableError, match="away"):
        reshard.convert(src, RecordingStore(memory, failing("create", error=UnavailableError("away"))))
    assert set(memory.content) == {CLAIM}
