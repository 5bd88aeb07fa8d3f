"""Contents of state dicts other than tensors round-trip: keys, empty dicts, values, containers, renamed entries."""

from __future__ import annotations

import argparse
import datetime
import decimal
import enum
import fractions
import io
import pathlib
import random
import types
import uuid
from collections import OrderedDict, defaultdict, deque, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

import reshard
from reshard import errors
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.stores.testing import RecordingStore
from reshard.storage.tensors.plain_json import _READERS
from tests.samples import Custom, check_equal

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def stepped() -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5])
    for _ in range(2):
        model(torch.randn(5, 3)).sum().backward()
        optimizer.step()
        scheduler.step()
    return model, optimizer, scheduler


STATES: list[dict[Any, Any]] = [
    {1: torch.ones(2), (0, 1): torch.zeros(2), None: 3, False: torch.ones(1)},
    {"a": {1: torch.ones(2), "b": {(0, "x"): 1, None: {False: 2}}}},
    {"a": [{1: torch.ones(1)}, {}, [{2: {}}]]},
    {"a": [{}, torch.ones(2)], "state": {}},
    {"sgd": torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1).state_dict()},
    {"deep": {"er": {"est": {}}}, "list": [], "none": None},
]


@pytest.mark.parametrize("state", STATES, ids=range(len(STATES)))
@pytest.mark.parametrize("source", ["reshard", "torch", "reshard from dcp", "dcp", "reshard from torch"])
def test_keys_and_empty_dicts_round_trip(state: dict[Any, Any], source: str, tmp_path: Path) -> None:
    uri = str(tmp_path / "c")
    if "torch" in source:
        uri += ".pt"
        torch.save(state, uri)
    else:
        reshard.save(state, uri)
    if "dcp" in source:
        reshard.convert(uri, tmp_path / "dcp", format="dcp")
        uri = str(tmp_path / "dcp")
    if "from" in source:
        reshard.convert(uri, tmp_path / "again")
        uri = str(tmp_path / "again")
    check_equal(reshard.open(uri).state_dict(), state)


def test_a_conversion_to_dcp_with_typed_keys_is_read_by_dcp(tmp_path: Path) -> None:
    reshard.save({"state": {0: {"step": torch.tensor(3.0)}, "groups": [{}, torch.ones(2)]}}, tmp_path / "c")
    reshard.convert(tmp_path / "c", tmp_path / "dcp", format="dcp")
    state: dict[str, Any] = {"state": {0: {"step": torch.tensor(0.0)}, "groups": [{}, torch.zeros(2)]}}
    dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert state["state"][0]["step"].item() == 3
    assert state["state"]["groups"][1].eq(1).all()


def test_optimizers_and_schedulers_resume_from_a_state_dict() -> None:
    model, optimizer, scheduler = stepped()
    store = MemoryStore()
    reshard.save({"model": model.state_dict(), "optim": optimizer.state_dict(), "sched": scheduler.state_dict()}, store)
    found = reshard.open(store).state_dict()
    other, other_optimizer, other_scheduler = stepped()
    other_optimizer = torch.optim.Adam(other.parameters(), 0.5)
    other_optimizer.load_state_dict(found["optim"])
    other_scheduler = torch.optim.lr_scheduler.MultiStepLR(other_optimizer, [1])
    other_scheduler.load_state_dict(found["sched"])
    assert len(other_optimizer.state) == 4
    check_equal(other_optimizer.state_dict(), optimizer.state_dict())
    for _ in range(4):
        optimizer.step()
        scheduler.step()
        other_optimizer.step()
        other_scheduler.step()
        assert scheduler.get_last_lr() == other_scheduler.get_last_lr()


class Empty:
    """A Stateful without state."""

    loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state


def test_empty_stateful_round_trips() -> None:
    store = MemoryStore()
    reshard.save({"empty": Empty(), "w": torch.ones(1)}, store)
    assert reshard.open(store).state_dict()["empty"] == {}
    empty = Empty()
    reshard.load({"empty": empty, "w": torch.zeros(1)}, store)
    assert empty.loaded == {}


def test_a_read_only_mapping_beside_a_stateful_changes_nothing() -> None:
    store = MemoryStore()
    saved, model = nn.Linear(2, 2), nn.Linear(2, 2)
    reshard.save({"model": saved, "inner": {"model": nn.Linear(2, 2), "step": 3}, "step": 3}, store)
    before = model.weight.detach().clone()
    read_only = types.MappingProxyType
    for state in (
        read_only({"model": model, "inner": {"model": nn.Linear(2, 2), "step": 0}, "step": 0}),
        {"model": model, "inner": read_only({"model": nn.Linear(2, 2), "step": 0}), "step": 0},
    ):
        with pytest.raises(errors.DestinationError, match="in which values cannot be replaced"):
            reshard.load(state, store)  # type: ignore[arg-type]  # a read-only mapping
        assert torch.equal(model.weight, before)
    reshard.load(read_only({"model": model}), store)  # type: ignore[arg-type]
    assert torch.equal(model.weight, saved.weight)


def test_dicts_are_filled_in_place_when_a_scheduler_shares_a_tensor_with_its_optimizer() -> None:
    def state_of(step: int) -> dict[str, Any]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=torch.tensor(0.5))
        schedulers: list[torch.optim.lr_scheduler.LRScheduler]
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for _ in range(2)]
        scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, schedulers, milestones=[3])
        return {"optimizer": optimizer, "scheduler": scheduler, "extra": {"step": step, "list": [{"epoch": step}]}}

    store = MemoryStore()
    reshard.save(state_of(3), store)
    state = state_of(0)
    extra, first = state["extra"], state["extra"]["list"][0]
    reshard.load(state, store)
    assert state["extra"] is extra
    assert extra["list"][0] is first
    assert extra == {"step": 3, "list": [{"epoch": 3}]}


def test_classes_in_a_state_dict_are_values() -> None:
    store = MemoryStore()
    state = {"hparams": {"optimizer": torch.optim.Adam, "layers": [nn.Linear, {"kind": nn.ReLU}]}, "w": torch.ones(1)}
    reshard.save(state, store)
    loaded: dict[str, Any] = {"hparams": {"optimizer": None, "layers": [None, {"kind": None}]}, "w": torch.zeros(1)}
    reshard.load(loaded, store, allow_pickle=True)
    assert loaded["hparams"] == state["hparams"]


def test_a_state_dict_that_holds_itself_beside_a_stateful_is_refused() -> None:
    state: dict[str, Any] = {"model": nn.Linear(2, 2)}
    state["nested"] = {"again": state, "model": nn.Linear(2, 2)}
    with pytest.raises(reshard.errors.UnsupportedValueError, match="are nested"):
        reshard.save(state, MemoryStore())


def test_empty_dict_in_the_state_dict_needs_no_entry_in_the_checkpoint() -> None:
    store = MemoryStore()
    reshard.save({"optim": {"state": {0: torch.ones(1)}, "lr": 0.1}}, store)
    state: dict[str, Any] = {"optim": {"state": {}, "lr": 0}, "new": {}}
    report = reshard.load(state, store)
    assert state == {"optim": {"state": {}, "lr": 0.1}, "new": {}}
    assert report.unexpected_keys == ("optim.state.0",)


class Colour(enum.Enum):
    RED = 1


Point = namedtuple("Point", "x y")

PLAIN = [
    io.BytesIO(b"\x00abc"), np.float32(1.5), np.int64(3), np.bool_(True), np.arange(6).reshape(2, 3), np.array("text"),
    np.datetime64("2026-01-01"), np.complex64(1 + 2j), np.random.default_rng(0).bit_generator.state, random.getstate(),
    np.random.get_state(), frozenset({1, (2, "x")}), {1, 2}, deque([1, [2]], maxlen=5), deque(), range(1, 10, 3),
    datetime.datetime(2026, 1, 2, 3, 4, 5, 6), datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=-3))), datetime.date(2026, 1, 2),
    datetime.time(1, 2, 3), datetime.timedelta(days=-1, microseconds=3), Path("a/b"), pathlib.PurePosixPath("/x"),
    pathlib.PureWindowsPath("c:/x"), decimal.Decimal("1.10"), decimal.Decimal("NaN"), fractions.Fraction(1, 3),
    uuid.UUID(int=7), argparse.Namespace(lr=0.1, betas=(1, 2), path=Path("x")), types.SimpleNamespace(a=1),
    OrderedDict(b=1, a=2), bytearray(b"xyz"), slice(1, None, 2), ..., complex(1, float("inf")), float("nan"),
    {"$tuple": 1}, {"nested": [(1, {2: frozenset({None})})]},
]  # fmt: skip


def check_plain(found: Any, value: Any) -> None:
    assert type(found) is type(value)
    if isinstance(value, io.BytesIO):
        assert found.getvalue() == value.getvalue()
    elif isinstance(value, np.ndarray):
        assert found.dtype == value.dtype
        assert np.array_equal(found, value)
    elif isinstance(value, tuple) and any(isinstance(item, np.ndarray) for item in value):
        for one, other in zip(found, value, strict=True):
            check_plain(one, other)
    elif value != value:
        assert found != found
    else:
        assert found == value
        if isinstance(value, deque):
            assert found.maxlen == value.maxlen


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("by_dcp", [False, True], ids=["reshard", "dcp"])
def test_plain_data_needs_no_pickle(value: Any, *, by_dcp: bool) -> None:
    store = MemoryStore()
    state = {"x": {"value": value}} if not isinstance(value, dict) else {"x": {"value": (value,)}}
    if by_dcp:
        dcp.save(state, storage_writer=reshard.StorageWriter(store, allow_pickle=False))
    else:
        assert reshard.save(state, store, allow_pickle=False).pickled == ()
    found = reshard.open(store).state_dict()["x"]["value"]
    check_plain(found[0] if isinstance(value, dict) else found, value)
    if not isinstance(value, dict):
        loaded: dict[str, Any] = {"x": {"value": None}}
        dcp.load(loaded, storage_reader=reshard.StorageReader(store))
        check_plain(loaded["x"]["value"], value)


@pytest.mark.parametrize("value", [Colour.RED, Custom(3), Point(1, 2), (defaultdict(list),), [Custom(1)]], ids=str)
@pytest.mark.parametrize("by_dcp", [False, True], ids=["reshard", "dcp"])
def test_values_that_need_pickle_are_warned_about_once(
    value: Any, caplog: pytest.LogCaptureFixture, *, by_dcp: bool
) -> None:
    store = MemoryStore()
    state = {"x": {"value": value, "again": value}, "t": torch.ones(2), "safe": (torch.ones(1), 2)}
    if by_dcp:
        dcp.save(state, storage_writer=reshard.StorageWriter(store))
    else:
        assert set(reshard.save(state, store).pickled) == {"x.again", "x.value"}
    warnings = [record for record in caplog.records if "allow_pickle=True" in record.getMessage()]
    assert len(warnings) == 1
    assert "'x.again', 'x.value'" in warnings[0].getMessage()
    with pytest.raises(errors.UnsafeValueError, match=r"'x\.(value|again)'.*allow_pickle=True"):
        reshard.open(store).state_dict()
    assert reshard.open(store).state_dict(allow_pickle=True)["x"]["value"] == value


@pytest.mark.parametrize("by_dcp", [False, True], ids=["reshard", "dcp"])
def test_save_with_allow_pickle_false_raises_for_values_that_need_pickle(*, by_dcp: bool) -> None:
    store = MemoryStore()
    state = {"x": {"value": Custom(1)}, "t": torch.ones(2)}
    if by_dcp:
        with pytest.raises(CheckpointException, match=r"'x\.value' needs pickle"):
            dcp.save(state, storage_writer=reshard.StorageWriter(store, allow_pickle=False))
    else:
        with pytest.raises(errors.UnsupportedValueError, match=r"'x\.value'.* needs pickle"):
            reshard.save(state, store, allow_pickle=False)
    assert not store.content


@pytest.mark.parametrize("value", [lambda: 0, (x for x in range(2)), (Path(), lambda: 0)])
def test_error_names_the_value_that_cannot_be_pickled(value: Any) -> None:
    with pytest.raises(errors.UnsupportedValueError, match=r"'a\.f', of .* cannot be stored"):
        reshard.save({"a": {"f": value}}, MemoryStore())


# Containers that are one value in the checkpoint, and vice versa


def old_checkpoint(tmp_path: Path) -> str:
    """Save containers as values, as DCP does in torch 2.3 and earlier, or with flatten_state_dict=False."""
    groups = [{"lr": 0.1, "params": [0, 1], "betas": (0.9, 0.99), "t": torch.tensor([1.0, 2.0])}, {"lr": 0.2}]
    flat = {"opt.param_groups": groups, "opt.state": {0: {"step": 3}}, "w": torch.ones(2)}
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(flat, checkpoint_id=tmp_path / "old", planner=planner, no_dist=True)
    return str(tmp_path / "old")


def test_container_is_loaded_from_one_value(tmp_path: Path) -> None:
    t = torch.zeros(2, dtype=torch.float64)
    state: dict[str, Any] = {
        "opt": {
            "param_groups": [{"lr": 0, "params": [], "betas": None, "t": t}, {"lr": None}],
            "state": {0: {"step": 0}},
        },
        "w": torch.zeros(2),
    }
    report = reshard.load(state, old_checkpoint(tmp_path))
    assert state["opt"]["param_groups"][0]["lr"] == 0.1
    assert state["opt"]["param_groups"][0]["params"] == [0, 1]
    assert state["opt"]["param_groups"][0]["betas"] == (0.9, 0.99)
    assert state["opt"]["param_groups"][1]["lr"] == 0.2
    assert state["opt"]["state"] == {0: {"step": 3}}
    assert state["opt"]["param_groups"][0]["t"] is t
    assert t.tolist() == [1, 2]
    assert state["w"].eq(1).all()
    assert report.unexpected_keys == ()
    stored = sum(file.stat().st_size for file in (tmp_path / "old").iterdir())
    assert 0.5 * stored < report.ranks[0].bytes_fetched <= stored  # also of the values that contain others


def test_quantised_weights_in_a_value_are_not_cast(tmp_path: Path) -> None:
    stored = {"m": {"weight": torch.ones(2, 2, dtype=torch.int8), "weight_scale": torch.full((2,), 0.5)}}
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(stored, checkpoint_id=tmp_path, planner=planner, no_dist=True)
    weights = torch.zeros(2, 2)
    with pytest.raises(errors.DtypeError, match=r"'m\.weight'.* scale"):
        reshard.load({"m": {"weight": weights, "weight_scale": torch.zeros(2)}}, tmp_path)
    assert not weights.any()


def test_leaves_of_one_value_may_have_paths_of_different_lengths(tmp_path: Path) -> None:
    stored = {"a.b": {"c": torch.full((2,), 1.0), "c.d": torch.full((2,), 2.0), "e": {"f": torch.full((2,), 3.0)}}}
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(stored, checkpoint_id=tmp_path, planner=planner, no_dist=True)
    outer, inner, deep = torch.zeros(2), torch.zeros(2), torch.zeros(2)
    report = reshard.load({"a": {"b": {"c": outer}}, "a.b": {"c.d": inner, "e": {"f": deep}}}, tmp_path)
    assert [tensor.tolist() for tensor in (outer, inner, deep)] == [[1, 1], [2, 2], [3, 3]]
    assert report.unexpected_keys == report.missing_keys == ()


def test_equal_values_do_not_share_containers(tmp_path: Path) -> None:
    parts: list[Any] = [(1, [2]), [3], {"a": 4}, 5.0, (6, "b"), True, 1, 1.0, None]
    values = {f"v{copy}.{at}": part for copy in range(2) for at, part in enumerate(parts)}
    dcp.save({**values, "w": torch.ones(1)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    reshard.save(values, tmp_path / "native")
    for checkpoint in map(reshard.open, (tmp_path / "dcp", tmp_path / "native")):
        found = checkpoint.state_dict()
        flat = {name: found[name] for name in values}
        assert [(value, type(value)) for value in flat.values()] == [(v, type(v)) for v in values.values()]
        for at in range(3):
            assert flat[f"v0.{at}"] is not flat[f"v1.{at}"]
        assert flat["v0.0"][1] is not flat["v1.0"][1]


def test_one_value_is_loaded_from_a_container() -> None:
    store = MemoryStore()
    groups = [{"lr": 0.1, 3: torch.ones(2)}, {}]
    reshard.save(
        {"opt": {"param_groups": groups, "state": {0: {"step": torch.tensor(3.0)}}}, "w": torch.ones(1)}, store
    )
    state: dict[str, Any] = {"opt": {"param_groups": None, "state": 0}, "w": torch.zeros(1)}
    reshard.load(state, store)
    check_equal(state["opt"], {"param_groups": groups, "state": {0: {"step": torch.tensor(3.0)}}})
    assert state["w"].eq(1).all()


def test_error_names_containers_that_grew_or_shrank(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = old_checkpoint(tmp_path)
    native = MemoryStore()
    reshard.save({"opt": {"groups": [{"lr": 0.1}, {"lr": 0.2}], "map": {"a": torch.ones(1)}}}, native)
    group: dict[str, Any] = {"lr": 0}
    grown: dict[str, Any] = {"opt": {"groups": [group, group.copy(), group.copy()]}}
    with pytest.raises(
        errors.MissingTensorError, match=r"'opt\.groups' has 2 items in the checkpoint and 3 in the state dict"
    ):
        reshard.load(grown, native)
    assert group["lr"] == 0
    with pytest.raises(errors.MissingTensorError, match=r"dict 'opt\.map' has 1 items in the checkpoint and 2 in"):
        reshard.load({"opt": {"map": {"a": torch.zeros(1), "b": torch.zeros(1)}}}, native)
    with pytest.raises(errors.MissingTensorError, match=r"'opt\.param_groups\.2\.lr'"):
        reshard.load({"opt": {"param_groups": [{"lr": 0}, {"lr": 0}, {"lr": 0}]}}, old)
    report = reshard.load({"opt": {"groups": [{"lr": 0}], "map": {"a": torch.zeros(1)}}}, native)
    assert report.unexpected_keys == ("opt.groups.1.lr",)
    assert "the list 'opt.groups' has 2 items in the checkpoint and 1 in the state dict" in caplog.text


def test_tensors_inside_a_value_are_checked_like_others(tmp_path: Path) -> None:
    t = torch.arange(4.0)
    flat = {"m": {"w": t, "b": torch.tensor([300])}, "r": [t, t], "d": {"x": 1, "y": 2}, "e": {"k": {}}}
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.save(flat, checkpoint_id=tmp_path / "c", planner=planner, no_dist=True)
    z = torch.zeros(4)
    meta, expanded = torch.zeros(4, device="meta"), torch.zeros(1).expand(4)
    for part, error, message in (
        ({"m": {"w": meta}}, errors.DestinationError, r"'m\.w' is on the meta device"),
        ({"m": {"w": expanded}}, errors.DestinationError, r"'m\.w' is expanded"),
        ({"m": {"w": torch.zeros(4).to_sparse()}}, errors.DestinationError, r"'m\.w' has the layout"),
        ({"m": {"w": z, "b": z[:1].view(torch.int32)}}, errors.DestinationError, r"'m\.w' and 'm\.b'"),
        ({"m": {"b": torch.zeros(1, dtype=torch.uint8)}}, errors.DtypeError, r"'m\.b'.*300 at \[0\] does not fit"),
        ({"d": {"x": 0, "y": 0, "z": 0}}, errors.MissingTensorError, r"'d' has 2 items in the checkpoint and 3"),
        ({"r": [z, z.clone(), z.clone()]}, errors.MissingTensorError, r"list 'r' has 2 items in the checkpoint and 3"),
        ({"e": {"k": {"x": 1}}}, errors.MissingTensorError, r"'e\.k' is an empty dict in the checkpoint"),
    ):
        with pytest.raises(error, match=message):
            reshard.load(part, tmp_path / "c")
    assert z.eq(0).all()
    w = torch.zeros(4, dtype=torch.bfloat16)
    assert reshard.load({"m": {"w": w}}, tmp_path / "c").cast == (("m.w", "float32", "bfloat16"),)
    assert w.equal(t.bfloat16())
    assert reshard.load({"r": [z]}, tmp_path / "c").unexpected_keys == ("r.1",)
    assert reshard.load({"d": {"x": 0}}, tmp_path / "c").unexpected_keys == ("d.y",)
    assert reshard.load({"r": [z, z]}, tmp_path / "c").unexpected_keys == ()


def test_mismatch_inside_a_value_raises(tmp_path: Path) -> None:
    old = old_checkpoint(tmp_path)
    w = torch.zeros(2)
    for group, error in (
        ({"t": torch.zeros(3)}, errors.ShapeMismatchError),
        ({"t": torch.zeros(2, dtype=torch.int64)}, errors.DtypeError),
        ({"t": 1.0}, errors.DestinationError),
        ({"lr": torch.zeros(1)}, errors.DestinationError),
    ):
        with pytest.raises(error, match=r"'opt\.param_groups\.0\.(t|lr)'"):
            reshard.load({"w": w, "opt": {"param_groups": [group]}}, old)
    assert w.eq(0).all()


# Names


def compiled() -> MemoryStore:
    store = MemoryStore()
    state = {
        "module._orig_mod.layers.0._checkpoint_wrapped_module.w": torch.full((2,), 1.0),
        "module._orig_mod.layers.1.w": torch.full((2,), 2.0),
        "head.w": torch.full((2,), 3.0),
        "extra": {"epoch": 3},
    }
    reshard.save(state, store)
    return store


RENAME = {"module.*": "*", "*_orig_mod.*": "**", "*_checkpoint_wrapped_module.*": "**", "extra.*": "meta.*"}


def test_rename_while_loading() -> None:
    state: dict[str, Any] = {
        "layers": {"0.w": torch.zeros(2), "1.w": torch.zeros(2)},
        "head": {"w": torch.zeros(2)},
        "meta": {"epoch": 0},
    }
    report = reshard.load(state, compiled(), rename=RENAME)
    assert [state["layers"]["0.w"][0], state["layers"]["1.w"][0], state["head"]["w"][0]] == [1, 2, 3]
    assert state["meta"]["epoch"] == 3
    assert report.unexpected_keys == ()
    with pytest.raises(errors.ArgumentError, match=r"would both be named 'x'"):
        reshard.load({"x": torch.zeros(2)}, compiled(), rename={"module.*": "x"})
    for bad in ({"a.*.*": "*.*.*"}, {"a": 1}, "a=b", {"*.*": "***"}):
        with pytest.raises(errors.ArgumentError, match="rename"):
            reshard.load({"x": torch.zeros(2)}, compiled(), rename=bad)  # type: ignore[arg-type]


def test_rename_for_a_rank_and_a_conversion(tmp_path: Path) -> None:
    layout = reshard.Layout({"tp": 2}, {"layers.*": reshard.layout.Shard(0)})
    tensors = reshard.open(compiled()).load_rank(layout, 1, rename=RENAME, exclude="head")
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"layers.0.w": [1.0], "layers.1.w": [2.0]}
    report = reshard.convert(compiled(), tmp_path / "c", rename=RENAME, exclude=["head.*"])
    checkpoint = reshard.open(tmp_path / "c")
    assert sorted(checkpoint.tensors) == ["layers.0.w", "layers.1.w"]
    assert checkpoint.read_value("meta.epoch") == 3
    assert report.dropped == ("head.w",)
    wrong: list[dict[str, Any]] = [{"rename": {"nothing.*": "*"}}, {"exclude": "nothing.*"}]
    for argument in wrong:
        with pytest.raises(errors.MissingTensorError, match=r"nothing\.\*"):
            reshard.convert(compiled(), tmp_path / "d", **argument)


def test_exclude_leaves_names_as_they_are() -> None:
    state: dict[str, Any] = {
        "a": {"w": torch.zeros(2), "v": torch.zeros(2)},
        "b": {"missing": torch.zeros(3)},
        "step": 0,
    }
    store = MemoryStore()
    reshard.save({"a": {"w": torch.ones(2), "v": torch.ones(2)}, "step": 3}, store)
    report = reshard.load(state, store, exclude=("a.v", "b"))
    assert state["a"]["w"].eq(1).all()
    assert state["a"]["v"].eq(0).all()
    assert state["step"] == 3
    assert report.missing_keys == report.unexpected_keys == ()
    for bad in (1, [1], {"a"}, ""):
        with pytest.raises(errors.ArgumentError, match="exclude must be a pattern"):
            reshard.load(state, store, exclude=bad)  # type: ignore[arg-type]


def test_names_may_be_missing_by_pattern() -> None:
    store = MemoryStore()
    reshard.save({"model": {"w": torch.ones(2)}}, store)
    state = {"model": {"w": torch.zeros(2)}, "optimizer": {"m": torch.zeros(2)}}
    report = reshard.load(state, store, allow_missing="optimizer.*")
    assert report.missing_keys == ("optimizer.m",)
    assert state["model"]["w"].eq(1).all()
    with pytest.raises(errors.MissingTensorError, match=r"no model\.v|no 'model\.v'"):
        reshard.load({"model": {"w": torch.zeros(2), "v": torch.zeros(2)}}, store, allow_missing=["optimizer.*"])


def test_value_replaces_none_under_another_name() -> None:
    store = MemoryStore()
    state = {"state": {0: {"m": torch.ones(1)}}, "groups": [{"lr": 0.1}]}
    reshard.save({"opt": state}, store)
    loaded: dict[str, Any] = {"q": None}
    reshard.load(loaded, store, rename={"opt.*": "q.*"})
    check_equal(loaded["q"], state)
    reshard.load(loaded := {"opt": None}, store, exclude="opt.state")
    check_equal(loaded["opt"], {"groups": [{"lr": 0.1}]})


def test_error_for_many_missing_names_is_fast() -> None:
    store = MemoryStore()
    reshard.save({str(i): torch.ones(1) for i in range(3000)}, store)
    state = {str(i): torch.zeros(1) for i in range(3000)} | {f"x{i}": torch.zeros(1) for i in range(3000)}
    with pytest.raises(errors.MissingTensorError, match="'x4' and 2995 more"):
        reshard.load(state, store)


def test_value_that_cannot_be_replaced_raises_before_anything_is_read() -> None:
    store = MemoryStore()
    reshard.save({"a": {"x": torch.ones(1), "y": 1}}, store)
    x = torch.zeros(1)
    with pytest.raises(errors.DestinationError, match=r"'a\.y' is in a mappingproxy"):
        reshard.load({"a": types.MappingProxyType({"x": x, "y": 0})}, store)
    assert x.eq(0).all()


def test_arguments_of_a_wrong_type_raise_argument_error() -> None:
    store = MemoryStore()
    reshard.save({"w": torch.ones(1)}, store)
    dtype: Any = "bfloat16"
    for call in (
        lambda: reshard.open(store).load_rank(reshard.Layout(1), 0, dtype=dtype),
        lambda: reshard.open(store).read("w", dtype=dtype),
        lambda: reshard.convert(store, MemoryStore(), dtype=dtype),
    ):
        with pytest.raises(errors.ArgumentError, match=r"dtype must be a torch\.dtype"):
            call()
    with pytest.raises(errors.DestinationError, match="'w': out is an UninitializedParameter"):
        reshard.open(store).read("w", out=nn.LazyLinear(1).weight)


@pytest.mark.parametrize("strict", ["m.*", 1, None, ("a",)])
def test_strict_must_be_true_or_false(strict: Any) -> None:
    with pytest.raises(errors.ArgumentError, match=r"strict must be True or False, got .*allow_missing"):
        reshard.load({"w": torch.zeros(2)}, MemoryStore(), strict=strict)


# Metadata of DCP


def test_read_metadata_matches_that_of_dcp(tmp_path: Path) -> None:
    state = {"w": torch.ones(2), "n": 1}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    expected = dcp.FileSystemReader(tmp_path / "dcp").read_metadata()
    reshard.save(state, tmp_path / "native")
    writer = reshard.StorageWriter(tmp_path / "written")
    dcp.save(state, storage_writer=writer)
    for name in ("dcp", "native", "written"):
        metadata = reshard.StorageReader(tmp_path / name).read_metadata()
        assert metadata.version == expected.version
        assert metadata.storage_meta is not None
        assert metadata.storage_meta.save_id
        assert metadata.storage_meta.load_id
    assert expected.storage_meta is not None
    found = reshard.StorageReader(tmp_path / "dcp").read_metadata().storage_meta
    assert found is not None
    assert found.save_id == expected.storage_meta.save_id
    found = reshard.StorageReader(tmp_path / "written").read_metadata().storage_meta
    assert found is not None
    meta = writer.storage_meta()
    assert meta is not None
    assert found.save_id == meta.save_id


# Requests for metadata


def megatron(modules: int) -> dict[str, Any]:
    """Return a state like Megatron's: every module has a value, and the order differs from that of the names."""
    names = [f"decoder.layers.{i}.{part}" for part in ("mlp.fc1", "attention.qkv", "norm") for i in range(modules)]
    random.Random(0).shuffle(names)
    state: dict[str, Any] = {}
    for name in names:
        state[f"{name}._extra_state"] = io.BytesIO(b"")
        state[f"{name}.weight"] = torch.ones(2)
        state[f"{name}.flag"] = {"fp8": None, "steps": [len(name)]}
    return state


@pytest.fixture(scope="module")
def large_manifest() -> MemoryStore:
    store = MemoryStore()
    reshard.save({"model": megatron(1000)}, store)
    assert len(store.content["manifest.reshard"]) > 1.3e6
    return store


@pytest.mark.slow
@pytest.mark.parametrize("how", ["load", "state_dict", "StorageReader", "some", "one by one"])
def test_thousands_of_values_take_few_requests(large_manifest: MemoryStore, how: str) -> None:
    store = RecordingStore(large_manifest)
    template = megatron(1000)
    state: dict[str, Any] = {"model": dict.fromkeys(template) | {n: torch.zeros(2) for n in template if "weight" in n}}
    if how == "load":
        for name in template:
            if name.endswith("flag"):
                state["model"][name] = {"fp8": 0, "steps": []}
        report = reshard.load(state, store)
        assert report.missing_keys == report.unexpected_keys == ()
        assert state["model"]["decoder.layers.7.norm.weight"].eq(1).all()
    elif how == "some":
        some = {name: value for name, value in state["model"].items() if "layers.7" in name and "flag" not in name}
        reshard.load({"model": some}, store)
    elif how == "state_dict":
        found = reshard.open(store).state_dict()["model"]
        assert set(found) == set(template)
    elif how == "StorageReader":
        state["model"] = {name: value for name, value in state["model"].items() if not name.endswith("flag")}
        dcp.load(state, storage_reader=reshard.StorageReader(store))
        assert isinstance(state["model"]["decoder.layers.7.norm._extra_state"], io.BytesIO)
    else:
        checkpoint = reshard.open(store)
        for name in template:
            if "_extra_state" in name and "layers.3" in name:
                checkpoint.read_value(f"model.{name}")
    manifest = [call for call in store.calls if call.method == "read" and call.name == "manifest.reshard"]
    assert len(manifest) <= (12 if how == "one by one" else 4), len(manifest)
    assert sum(call.stop - call.start for call in manifest) < 2 * len(large_manifest.content["manifest.reshard"])
    if how != "one by one":
        assert len(store.calls) < 40


def test_type_words_of_json_are_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "FORMAT.md").read_text()
    assert [word for word in _READERS if f"`{word}`" not in text] == []
