"""`Checkpoint`: reading tensors, values and plans of an open checkpoint."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp

import reshard
from reshard import Box, Checkpoint, Layout, errors
from reshard.layout import Shard
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.stores.testing import RecordingStore
from tests.conftest import Place


@pytest.fixture
def saved() -> tuple[RecordingStore, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    state = {
        "layers.0.up.weight": torch.randn(2048, 512).to(torch.bfloat16),
        "layers.0.down.weight": torch.randn(512, 2048).to(torch.bfloat16),
        "norm": torch.randn(512),
    }
    store = MemoryStore()
    reshard.save({**state, "step": 3, "config": {"lr": 0.1}}, store)
    return RecordingStore(store), state


def test_checkpoint_describes_its_contents(saved: tuple[RecordingStore, dict[str, torch.Tensor]]) -> None:
    store, state = saved
    checkpoint = reshard.open(store)
    assert list(checkpoint.tensors) == sorted(state)
    info = checkpoint.tensors["layers.0.up.weight"]
    assert (info.shape, info.dtype, info.chunks) == ((2048, 512), torch.bfloat16, 32)
    assert 0.6 < info.stored_bytes / (2048 * 512 * 2) < 0.8
    assert checkpoint.value_names == ("config.lr", "step")
    assert checkpoint.read_value("step") == 3
    assert checkpoint.info["codec"] == "zstd"
    assert checkpoint.location == "memory"
    assert "reshard: 3 tensors, 2 values" in repr(checkpoint)
    assert checkpoint._repr_html_().count("<tr>") == 1 + 3


def test_read_of_a_box_fetches_only_overlapping_chunks(saved: tuple[RecordingStore, dict[str, torch.Tensor]]) -> None:
    store, state = saved
    checkpoint = reshard.open(store)
    name = "layers.0.down.weight"
    box = Box((100, 512), (300, 256))
    store.calls.clear()
    assert checkpoint.read(name, box).equal(state[name][box.slices])
    fetched = sum(call.stop - call.start for call in store.calls)
    assert 0 < fetched <= checkpoint.tensors[name].stored_bytes / 4 * 1.1
    assert len(store.calls) == 1

    assert checkpoint.read(name, Box((0, 0), (0, 2048))).shape == (0, 2048)
    out = torch.zeros(512, 2048, dtype=torch.float64)
    assert checkpoint.read(name, out=out) is out
    assert out.equal(state[name].double())
    assert checkpoint.read("norm", dtype=torch.float16).equal(state["norm"].half())


def test_invalid_calls_raise(saved: tuple[RecordingStore, dict[str, torch.Tensor]]) -> None:
    checkpoint = reshard.open(saved[0])
    with pytest.raises(errors.MissingTensorError, match="'nothing'"):
        checkpoint.read("nothing")
    with pytest.raises(errors.ShapeMismatchError, match=r"'norm' has shape \(512,\), and \[500:520\]"):
        checkpoint.read("norm", Box((500,), (20,)))
    with pytest.raises(errors.ShapeMismatchError, match=r"out has shape \(3,\)"):
        checkpoint.read("norm", out=torch.zeros(3))
    with pytest.raises(errors.DtypeError, match=r"torch\.int64"):
        checkpoint.read("norm", dtype=torch.int64)
    with pytest.raises(errors.DestinationError, match=r"out has dtype torch\.float32"):
        checkpoint.read("norm", out=torch.zeros(512), dtype=torch.float16)
    with pytest.raises(errors.DestinationError, match="'step' is a value in the checkpoint"):
        checkpoint.read("step")
    with pytest.raises(errors.DestinationError, match="'norm' is a tensor"):
        checkpoint.read_value("norm")
    with pytest.raises(errors.LayoutError, match="'norm'"):
        checkpoint.plan(Layout(2, {"norm": Shard(1)}))


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_does_not_exist_is_refused(device: str) -> None:
    store = MemoryStore()
    reshard.save({"w": torch.ones(2)}, store)
    checkpoint = reshard.open(store)
    for read in (
        lambda: checkpoint.read("w", device=device),
        lambda: checkpoint.load_rank(Layout(1), 0, device=device),
        lambda: checkpoint.state_dict(device=device),
    ):
        with pytest.raises(errors.ArgumentError, match=f"device='{device}' cannot be used"):
            read()


def test_plan_reads_no_data_and_load_rank_follows_the_plan(
    saved: tuple[RecordingStore, dict[str, torch.Tensor]],
) -> None:
    store, state = saved
    checkpoint = reshard.open(store)
    layout = Layout({"dp": 2, "tp": 4}, {"*.up": "colwise", "*.down": "rowwise"})
    store.calls.clear()
    plans = checkpoint.plan(layout)
    assert store.calls == []
    assert len(plans) == 8
    for rank in range(8):
        tp = rank % 4
        store.calls.clear()
        tensors = checkpoint.load_rank(layout, rank)
        assert tensors["layers.0.up.weight"].equal(state["layers.0.up.weight"][tp * 512 : (tp + 1) * 512])
        assert tensors["layers.0.down.weight"].equal(state["layers.0.down.weight"][:, tp * 512 : (tp + 1) * 512])
        assert tensors["norm"].equal(state["norm"])
        assert sum(call.stop - call.start for call in store.calls) == plans[rank].report.bytes_fetched
        assert len(store.calls) == plans[rank].report.requests
    assert "dp 2 x tp 4: 8 ranks" in str(plans)
    assert "MB needed" in repr(plans[0])


def test_copied_checkpoint_is_readable(tmp_path: Path, s3: Place) -> None:
    state: dict[str, Any] = {"w": torch.randn(300, 300), "step": 3}
    reshard.save(state, tmp_path / "original")
    shutil.copytree(tmp_path / "original", tmp_path / "copy")
    shutil.rmtree(tmp_path / "original")
    uri, options = s3
    filesystem = fsspec.filesystem("s3", **options)
    filesystem.put(f"{tmp_path / 'copy'}/", f"{uri}/", recursive=True)
    for location, storage_options in ((tmp_path / "copy", None), (uri, options)):
        checkpoint = reshard.open(location, storage_options=storage_options)
        assert checkpoint.read("w").equal(state["w"])
        assert checkpoint.read_value("step") == 3
        assert checkpoint.verify() == []


@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_verify_lists_all_damaged_chunks(codec: str) -> None:
    store = MemoryStore()
    state = {"a": torch.randn(512, 512), "b": torch.randn(512, 512), "step": 3}
    reshard.save(state, store, codec=codec)
    checkpoint = reshard.open(store)
    assert checkpoint.verify() == []
    name = next(name for name in store.content if name.startswith("data/"))
    whole = store.content[name]
    store.content[name] = whole[:100] + bytes([whole[100] ^ 1]) + whole[101:-200]
    damaged_chunks = checkpoint.verify()
    assert {damage.tensor for damage in damaged_chunks} == {"a", "b", "step"}
    assert [damage.reason for damage in damaged_chunks if damage.tensor == "a"] == [
        "does not match its checksum: the bytes are damaged"
    ]
    assert all("cut short" in damage.reason for damage in damaged_chunks if damage.tensor != "a")
    del store.content[name]
    assert {damage.reason for damage in checkpoint.verify()} == {"the object is missing"}


def test_include_limits_plan_and_load_rank() -> None:
    store = MemoryStore()
    reshard.save({"model": {"w": torch.ones(4, 4)}, "optimizer": {"w": torch.zeros(4, 4)}}, store)
    checkpoint = reshard.open(store)
    layout = Layout(2, {"model.w": "rowwise"})
    assert list(checkpoint.load_rank(layout, 0, include="model")) == ["model.w"]
    assert [read.want.name for read in checkpoint.plan(layout, include="model")[1].reads] == ["model.w"]
    with pytest.raises(errors.MissingTensorError, match="matches 'modle'"):
        checkpoint.plan(layout, include="modle")
    with pytest.raises(errors.LayoutError, match="no pattern of the layout"):
        checkpoint.load_rank(Layout(2, {"*.fcx": "colwise"}), 0)
    assert list(checkpoint.load_rank(layout, 0)) == ["model.w", "optimizer.w"]


TWO_PARTS = {"model": {"up": torch.ones(4, 4), "norm": torch.ones(4)}, "opt": {"up": torch.ones(4, 4)}, "step": 1}


def two_parts() -> Checkpoint:
    store = MemoryStore()
    reshard.save(TWO_PARTS, store)
    return reshard.open(store)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    caplog.clear()
    return messages


def test_rule_that_matches_no_tensor_is_logged_beside_one_that_does(caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = two_parts()
    expected = (
        "1 of 2 patterns of the layout match no tensor of memory: 'model.nrom'; a tensor that no pattern matches is "
        "replicated"
    )
    layout = Layout(2, {"model.up": "rowwise", "model.nrom": "colwise"})
    checkpoint.plan(layout)
    assert warnings_of(caplog) == [expected], "once, not once per rank"
    assert checkpoint.load_rank(layout, 1)["model.norm"].shape == (4,)
    assert warnings_of(caplog) == [expected]
    renamed = Layout(2, {"up": "rowwise", "model.norm": "colwise"})
    checkpoint.load_rank(renamed, 0, include="model", rename={"model.*": "*"})
    assert "'model.norm'" in "".join(warnings_of(caplog)), "rules apply to the new names"


def test_empty_rules_are_logged_but_none_are_not(caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = two_parts()
    assert checkpoint.tp_plan == {}
    for layout in (Layout({"tp": 2}, checkpoint.tp_plan), copy.copy(Layout({"tp": 2}, {}))):
        checkpoint.load_rank(layout, 0)
        assert "each of 2 ranks reads every tensor of memory whole" in "".join(warnings_of(caplog))
    for layout in (Layout(2), copy.copy(Layout(2)), Layout(1, {})):
        checkpoint.load_rank(layout, 0)
        assert warnings_of(caplog) == []


def test_rule_for_a_tensor_that_is_not_selected_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = two_parts()
    layout = Layout(2, {"model.up": "rowwise", "opt.up": "colwise", "model.norm": "replicate"})
    selections: list[dict[str, Any]] = [{"include": "model.up"}, {"exclude": "opt"}, {"include": ["model", "opt"]}]
    for selection in selections:
        checkpoint.plan(layout, **selection)
        checkpoint.load_rank(layout, 0, **selection)
    checkpoint.plan(Layout(2))
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("options", [{}, {"include": "model", "exclude": "model.norm"}], ids=["all", "selected"])
def test_every_method_refuses_patterns_that_match_no_name(options: dict[str, Any]) -> None:
    checkpoint = two_parts()
    layout = Layout(2, {"*up": "rowwise"})
    of_layout: list[Callable[..., object]] = [
        lambda **wrong: checkpoint.plan(layout, **wrong),
        lambda **wrong: checkpoint.load_rank(layout, 0, **wrong),
        lambda **wrong: reshard.convert(checkpoint._source.store, MemoryStore(), **wrong),
    ]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"include": ["model", "modle"]}, r"no name that matches 'modle'; nearest are 'model\.\*'"),
        ({"exclude": ["model.norm", "nrom"]}, r"no name that matches 'nrom'"),
        ({"rename": {"model.*": "*", "modle.*": "*"}}, r"no name that matches 'modle\.\*'"),
    ]
    for wrong, message in cases:
        for call in (*of_layout, *([checkpoint.state_dict] if "rename" not in wrong else [])):
            with pytest.raises(errors.MissingTensorError, match=message):
                call(**{**options, **wrong})
    for call in of_layout:
        with pytest.raises(errors.MissingTensorError, match=r"no name that matches 'opt\.\*' and is selected"):
            call(include="model", rename={"opt.*": "*"})


def test_exclude_and_rename_may_match_values() -> None:
    checkpoint = two_parts()
    layout = Layout(2, {"*up": "rowwise"})
    options: dict[str, Any] = {"exclude": "opt", "rename": {"step": "n", "model.*": "*"}}
    assert list(checkpoint.load_rank(layout, 0, **options)) == ["norm", "up"]
    assert list(checkpoint.load_rank(layout, 0, exclude=["step", "opt"])) == ["model.norm", "model.up"]
    assert len(checkpoint.plan(layout, **options)) == 2
    assert list(checkpoint.state_dict(exclude=["step", "opt"])) == ["model"]


def test_allow_missing_allows_patterns_that_match_no_name() -> None:
    checkpoint = two_parts()
    layout = Layout(2, {"*up": "rowwise"})
    tensors = checkpoint.load_rank(layout, 0, include=["model.up", "head"], allow_missing="head")
    assert list(tensors) == ["model.up"]


def test_include_of_an_empty_checkpoint_must_match() -> None:
    store = MemoryStore()
    reshard.save({}, store)
    checkpoint = reshard.open(store)
    assert checkpoint.state_dict() == checkpoint.load_rank(Layout(1), 0) == {}
    for call in (checkpoint.state_dict, lambda include: checkpoint.load_rank(Layout(1), 0, include=include)):
        with pytest.raises(errors.MissingTensorError, match="no name that matches 'model'"):
            call(include="model")


def test_strided_layout_is_loaded_from_several_boxes() -> None:
    store = MemoryStore()
    values = torch.arange(8.0).reshape(8, 1)
    reshard.save({"w": values}, store)
    layout = Layout(2, {"w": reshard.layout.StridedShard(0, split_factor=2)})
    assert reshard.open(store).load_rank(layout, 1)["w"].flatten().tolist() == [2, 3, 6, 7]


def sort_dicts(value: Any) -> Any:
    """Return the same value with sorted dicts."""
    if isinstance(value, dict):
        return {key: sort_dicts(value[key]) for key in sorted(value)}
    return [sort_dicts(item) for item in value] if isinstance(value, list) else value


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_state_dict_returns_the_saved_state_for_every_format(tmp_path: Path) -> None:
    state: dict[str, Any] = {
        "model": {"a.b": torch.randn(64, 64), "layers": [{"w": torch.randn(8)}, {"w": torch.empty(0)}]},
        "optimizer": {"groups": [{"lr": 0.1, "betas": (0.9, 0.99)}], "step": torch.tensor(3.0)},
        "epoch": 7,
    }
    reshard.save(state, tmp_path / "native")
    dcp.save(state, checkpoint_id=tmp_path / "dcp")
    torch.save(state, tmp_path / "state.pt")
    for location in ("native", "dcp", "state.pt"):
        found = reshard.open(tmp_path / location).state_dict()
        assert str(sort_dicts(found)) == str(sort_dicts(state)), location
    reshard.convert(tmp_path / "native", tmp_path / "hf", format="safetensors")
    flat = reshard.open(tmp_path / "hf").state_dict(include="model")
    assert flat["model.a.b"].equal(state["model"]["a.b"])
    only = reshard.open(tmp_path / "native").state_dict(include="optimizer")
    assert only == {"optimizer": state["optimizer"]}
    with pytest.raises(errors.MissingTensorError, match="no name that matches 'modle'"):
        reshard.open(tmp_path / "native").state_dict(include="modle")
