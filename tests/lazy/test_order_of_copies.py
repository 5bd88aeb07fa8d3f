"""Copies keep the order of the code: with several blocks, threads, inference mode, and uses that torch does not see."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import io
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.utils import dlpack

import reshard
from reshard.errors import ArgumentError, CheckpointError
from reshard.storage.lazy import recorder
from reshard.storage.reading import read_tensors
from reshard.testing import MemoryStore


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(64, 32, generator=generator),
        "v": torch.randn(64, 32, generator=generator),
        "c": torch.randn(8, 8, generator=generator, dtype=torch.complex64),
        "order": torch.randperm(64, generator=generator),
    }


def checkpoint(seed: int) -> reshard.Checkpoint:
    store = MemoryStore()
    reshard.save(tensors(seed), store, codec="none")
    return reshard.open(store)


ONE, TWO = tensors(1), tensors(2)


def zeros() -> torch.Tensor:
    return torch.zeros(64, 32)


@pytest.fixture
def one() -> reshard.Checkpoint:
    return checkpoint(1)


@pytest.fixture
def two() -> reshard.Checkpoint:
    return checkpoint(2)


def test_the_later_of_two_copies_wins_whatever_block_it_is_of(one: reshard.Checkpoint, two: reshard.Checkpoint) -> None:
    outer_first, inner_first, at_once = zeros(), zeros(), zeros()
    without_block = two.lazy()
    with one.lazy() as first, two.lazy() as second:
        outer_first.copy_(first["w"])
        outer_first.copy_(second["w"])
        inner_first.copy_(second["w"])
        inner_first.copy_(first["w"])
        at_once.copy_(first["w"])
        at_once.copy_(without_block["w"])
    assert torch.equal(outer_first, TWO["w"])
    assert torch.equal(inner_first, ONE["w"])
    assert torch.equal(at_once, TWO["w"])


def test_copies_do_not_overwrite_tensors_that_a_load_takes_from_decoded_values(
    one: reshard.Checkpoint, tmp_path: Path
) -> None:
    """DCP stores a dict as one value if its planner does not flatten it."""
    planner = DefaultSavePlanner(flatten_state_dict=False)
    with warnings.catch_warnings(action="ignore"):
        dcp.save({"d": {"w": TWO["w"]}}, checkpoint_id=tmp_path, planner=planner, no_dist=True)
    loaded = zeros()
    with one.lazy() as weights:
        loaded.copy_(weights["w"])
        reshard.load({"d": {"w": loaded}}, tmp_path)
        assert torch.equal(loaded, TWO["w"])
    assert torch.equal(loaded, TWO["w"])


def test_functions_of_lazy_tensors_of_two_checkpoints(one: reshard.Checkpoint, two: reshard.Checkpoint) -> None:
    stacked, concatenated, pending = torch.zeros(2, 64, 32), torch.zeros(128, 32), zeros()
    parameter = nn.Parameter(torch.zeros(1))
    with one.lazy() as first, two.lazy() as second:
        stacked.copy_(torch.stack([first["w"], second["w"]]))
        concatenated.copy_(torch.cat([second["w"], first["w"]]))
        parameter.data = first["w"]
        pending.copy_(second["w"])
        assert torch.equal(pending + first["w"], ONE["w"] + TWO["w"])
    assert torch.equal(stacked, torch.stack([ONE["w"], TWO["w"]]))
    assert torch.equal(concatenated, torch.cat([TWO["w"], ONE["w"]]))
    assert torch.equal(parameter, ONE["w"])


def test_fill_reads_each_lazy_tensor_from_its_checkpoint(one: reshard.Checkpoint, two: reshard.Checkpoint) -> None:
    module = nn.ModuleDict({"a": nn.Linear(32, 64, bias=False), "b": nn.Linear(32, 64, bias=False)})
    with one.lazy() as first, two.lazy() as second:
        module["a"].weight = nn.Parameter(first["w"])
        module["b"].weight = nn.Parameter(second["w"])
        second.fill(module)
    assert torch.equal(module["a"].weight, ONE["w"])
    assert torch.equal(module["b"].weight, TWO["w"])


def test_names_that_are_assigned_the_same_lazy_tensor_share_memory(one: reshard.Checkpoint) -> None:
    module = nn.ModuleDict({"a": nn.Linear(32, 64, bias=False), "b": nn.Linear(32, 64, bias=False)})
    with one.lazy() as weights:
        module.load_state_dict({"a.weight": weights["w"], "b.weight": weights["w"]}, assign=True)
        weights.fill(module)
    assert len({parameter.data_ptr() for parameter in module.parameters()}) == 1
    assert weights.report.bytes_needed == ONE["w"].nbytes


def test_casting_a_lazy_module_reads_nothing_more(one: reshard.Checkpoint) -> None:
    module = nn.Linear(32, 64, bias=False)
    with one.lazy() as weights:
        module.load_state_dict({"weight": weights["w"]}, assign=True)
        module.to(torch.bfloat16)
        weights.fill(module)
    assert weights.report.bytes_needed == module.weight.nbytes
    with one.lazy() as weights, pytest.raises(ArgumentError, match="Module"):
        weights.fill(weights["w"])  # type: ignore[arg-type]


def _save_with_torch(tensor: torch.Tensor) -> Any:
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file)


def _save_with_reshard(tensor: torch.Tensor) -> Any:
    store = MemoryStore()
    reshard.save({"w": tensor}, store)
    return reshard.open(store).read("w")


def _from_capsule(tensor: torch.Tensor) -> Any:
    return np.from_dlpack(tensor).copy()


USES: dict[str, Callable[[torch.Tensor], Any]] = {
    "numpy": lambda tensor: tensor.numpy().copy(),
    "asarray": lambda tensor: np.asarray(tensor).copy(),
    "tolist": lambda tensor: tensor.tolist(),
    "a list": lambda tensor: torch.tensor([tensor[0, 0], tensor[1, 1]]),
    "data=": lambda tensor: torch.tensor(data=[tensor[0, 0], tensor[1, 1]]),
    "legacy list": lambda tensor: torch.FloatTensor([tensor[0, 0], 2.0]),
    "new": lambda tensor: torch.zeros(1).new([tensor[0, 0], tensor[0, 1]]),
    "sparse": lambda tensor: torch.sparse_coo_tensor(
        torch.tensor([[0, 1]]), [tensor[0, 0], tensor[0, 1]], check_invariants=True
    ).to_dense(),
    "apply_": lambda tensor: tensor.apply_(lambda value: value * 2).clone(),
    "map_": lambda tensor: tensor.map_(torch.ones(64, 32), lambda one, two: one + two).clone(),
    "map_ of another": lambda tensor: torch.ones(64, 32).map_(tensor, lambda one, two: one + two),
    "map2_": lambda tensor: torch.ones(64, 32).map2_(tensor, tensor, lambda one, two, three: one + two + three),
    "dlpack": _from_capsule,
    "data_ptr": lambda tensor: ctypes.string_at(tensor.data_ptr(), tensor.nbytes),
    "share_memory_": lambda tensor: tensor.share_memory_() + 0,
    "deepcopy": lambda tensor: copy.deepcopy(tensor) + 0,
    "storage": lambda tensor: bytes(tensor.untyped_storage()),
    "torch.save": _save_with_torch,
    "reshard.save": _save_with_reshard,
}


@pytest.mark.parametrize("name", USES)
def test_uses_that_are_not_dispatched_see_the_copied_values(one: reshard.Checkpoint, name: str) -> None:
    destination = zeros()
    with one.lazy() as weights:
        destination.copy_(weights["w"])
        found = USES[name](destination)
    assert np.array_equal(found, USES[name](ONE["w"].clone()))


@pytest.mark.parametrize("name", [name for name in USES if name != "reshard.save"])
@pytest.mark.parametrize("in_block", [True, False])
def test_uses_of_lazy_tensors_that_are_not_dispatched(one: reshard.Checkpoint, name: str, *, in_block: bool) -> None:
    weights = one.lazy()
    with weights if in_block else contextlib.nullcontext():
        found = USES[name](weights["w"])
    assert np.array_equal(found, USES[name](ONE["w"].clone()))


@pytest.mark.parametrize("show", [str, repr, "{}".format, "%s".__mod__, lambda tensor: str(nn.Parameter(tensor))])
def test_a_printed_destination_has_the_copied_values(one: reshard.Checkpoint, show: Callable[[Any], str]) -> None:
    destination = zeros()
    with one.lazy() as weights:
        destination.copy_(weights["w"])
        found = show(destination)
    assert found == show(ONE["w"])


OTHER_STORAGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "buffer": lambda whole: torch.frombuffer(whole.numpy(), dtype=torch.float32, offset=40 * 32 * 4).view(24, 32),
    "numpy": lambda whole: torch.from_numpy(whole.numpy()[40:]),
    "dlpack": lambda whole: dlpack.from_dlpack(whole[40:]),
}


@pytest.mark.parametrize("name", OTHER_STORAGES)
def test_several_storages_may_share_memory(one: reshard.Checkpoint, name: str) -> None:
    used, cleared, part_first = zeros(), zeros(), zeros()
    of_used, of_cleared, of_part = (OTHER_STORAGES[name](whole) for whole in (used, cleared, part_first))
    with one.lazy() as weights:
        used.copy_(weights["w"])
        cleared.copy_(weights["w"])
        of_part.copy_(weights["v"][:24])
        of_cleared.zero_()
        assert torch.equal(of_used + 0, ONE["w"][40:])
        assert torch.equal(part_first[:41].sum(0), ONE["v"][0])
    assert torch.equal(cleared, torch.cat([ONE["w"][:40], torch.zeros(24, 32)]))


def test_a_use_of_other_addresses_reads_nothing_yet(one: reshard.Checkpoint) -> None:
    rows, columns = zeros(), zeros()
    with one.lazy() as weights:
        for at in torch.randperm(32).tolist():
            rows[2 * at].copy_(weights["w"][2 * at])
            columns[:, at].copy_(weights["v"][:, at])
        for at in range(32):
            rows[2 * at + 1].fill_(at)
        assert weights.report.bytes_needed == 0
        assert torch.equal(columns[:, 7] + 0, ONE["v"][:, 7])
    assert torch.equal(columns, ONE["v"])
    assert torch.equal(rows[::2], ONE["w"][::2])
    assert torch.equal(rows[1::2, 0], torch.arange(32.0))


def test_copies_into_a_lazy_tensor_come_before_copies_of_it(one: reshard.Checkpoint) -> None:
    copied, filled = torch.zeros(8, 8, dtype=torch.complex64), nn.Parameter(torch.zeros(1, dtype=torch.complex64))
    with one.lazy() as weights:
        values = weights["c"]
        parts = torch.view_as_real(values)
        parts[..., 0].copy_(weights["w"][:8, :8])
        parts[..., 1].copy_(weights["v"][:8, :8])
        copied.copy_(values)
        parts[..., 1].copy_(weights["w"][:8, :8])
        filled.data = values
    assert torch.equal(copied, torch.complex(ONE["w"][:8, :8], ONE["v"][:8, :8]))
    assert torch.equal(filled, torch.complex(ONE["w"][:8, :8], ONE["w"][:8, :8]))


def test_a_tensor_may_share_the_memory_of_a_lazy_one(one: reshard.Checkpoint) -> None:
    shared = torch.zeros(1)
    with one.lazy() as weights:
        shared.set_(weights["w"])  # type: ignore[call-overload]
        shared.add_(1)
        assert torch.equal(weights["w"] + 0, ONE["w"] + 1)


def test_a_later_read_into_a_destination_wins() -> None:
    store = MemoryStore()
    reshard.save({"w": ONE["w"], "v": ONE["v"]}, store)
    one, read, loaded = reshard.open(store), zeros(), zeros()
    with one.lazy() as weights:
        read.copy_(weights["w"])
        one.read("v", out=read)
        loaded.copy_(weights["w"])
        reshard.load({"v": loaded}, store, strict=False)
    assert torch.equal(read, ONE["v"])
    assert torch.equal(loaded, ONE["v"])


def test_indexes_may_come_from_a_recorded_copy(one: reshard.Checkpoint) -> None:
    order, indexed, selected = torch.zeros(64, dtype=torch.int64), zeros(), zeros()
    with one.lazy() as weights:
        order.copy_(weights["order"])
        indexed.copy_(weights["w"][order])
    order.zero_()
    with one.lazy() as weights:
        order.copy_(weights["order"])
        selected.copy_(weights["w"].index_select(0, order))
    assert torch.equal(indexed, ONE["w"][ONE["order"]])
    assert torch.equal(selected, ONE["w"][ONE["order"]])


IN_INFERENCE_MODE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "reshape": lambda w: w.t().reshape(-1),
    "contiguous": lambda w: w.t().contiguous()[3:5],
    "flatten": lambda w: w.t().flatten(),
    "cast": lambda w: w.t().to(torch.float64),
    "chunks": lambda w: torch.cat(w.t().chunk(4)[1:]),
    "same": lambda w: nn.functional.dropout(w, training=False),
}


@pytest.mark.parametrize("name", IN_INFERENCE_MODE)
def test_functions_that_inference_mode_dispatches_as_a_whole(one: reshard.Checkpoint, name: str) -> None:
    take = IN_INFERENCE_MODE[name]
    with torch.inference_mode():
        destination, pending = torch.zeros_like(take(ONE["w"])), zeros()
        with one.lazy() as weights:
            destination.copy_(take(weights["w"]))
            pending.copy_(weights["w"])
            used = take(pending) + 0
        assert torch.equal(destination, take(ONE["w"]))
        assert torch.equal(used, take(ONE["w"]))


def test_a_thread_waits_for_copies_that_another_one_executes(
    one: reshard.Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute_reads, started = read_tensors.execute_reads, threading.Event()

    def slowly(*args: Any, **kwargs: Any) -> Any:
        started.set()
        time.sleep(0.3)
        return execute_reads(*args, **kwargs)

    monkeypatch.setattr(recorder, "execute_reads", slowly)
    destination, other = zeros(), zeros()
    with one.lazy() as weights:
        destination.copy_(weights["w"])
        other.copy_(weights["v"])
        thread = threading.Thread(target=lambda: torch.add(other, weights["w"]))
        thread.start()
        started.wait()
        found = destination + 0
        thread.join()
    assert torch.equal(found, ONE["w"])


def test_a_block_is_left_in_the_thread_that_entered_it(one: reshard.Checkpoint) -> None:
    destination, errors = zeros(), list[Exception]()
    with one.lazy() as weights:
        destination.copy_(weights["w"])

        def leave() -> None:
            try:
                weights.__exit__(None, None, None)
            except ArgumentError as error:
                errors.append(error)

        thread = threading.Thread(target=leave)
        thread.start()
        thread.join()
        assert "thread" in str(errors)
    assert torch.equal(destination, ONE["w"])


def test_copies_whose_error_was_caught_stay_recorded() -> None:
    store = MemoryStore()
    reshard.save(tensors(1), store, codec="none")
    name = max((name for name in store.content if name != "manifest"), key=lambda name: len(store.content[name]))
    content = store.content.pop(name)
    checkpoint = reshard.open(store)
    destination, other = zeros(), zeros()

    def load(*, repair: bool) -> None:
        with checkpoint.lazy() as weights:
            destination.copy_(weights["w"])
            other.copy_(weights["v"])
            with contextlib.suppress(CheckpointError):
                destination.sum()
            if repair:
                store.content[name] = content

    with pytest.raises(CheckpointError):
        load(repair=False)
    load(repair=True)
    assert torch.equal(destination, ONE["w"])
    assert torch.equal(other, ONE["v"])


def test_a_copy_to_a_conjugate_comes_after_a_recorded_one(one: reshard.Checkpoint) -> None:
    destination = torch.zeros(8, 8, dtype=torch.complex64)
    with one.lazy() as weights:
        destination.copy_(weights["c"])
        destination.conj().copy_(weights["c"].t())
    assert torch.equal(destination.resolve_conj(), ONE["c"].t().conj().resolve_conj())


def test_wrong_and_empty_views_behave_as_in_torch(one: reshard.Checkpoint) -> None:
    with one.lazy() as weights:
        assert weights["w"][[]].sum() == 0
        with pytest.raises(RuntimeError, match="out of bounds"):
            weights["w"].as_strided((4000,), (1,))
        assert torch.tensor([weights["w"][0, 0], 3.0]).tolist() == [ONE["w"][0, 0].item(), 3]
        assert f"{weights['w'][0, 0]:.2f}" == f"{ONE['w'][0, 0]:.2f}"


def test_one_overlap_among_many_copies_costs_little(one: reshard.Checkpoint) -> None:
    destinations = [torch.zeros(2) for _ in range(3000)]
    begin = time.perf_counter()
    with one.lazy() as weights:
        for destination in destinations:
            destination.copy_(weights["w"][0, :2])
        destinations[0][:1].copy_(weights["v"][0, :1])
    assert time.perf_counter() - begin < 30  # comparing all pairs takes minutes
    assert destinations[0].tolist() == [ONE["v"][0, 0].item(), ONE["w"][0, 1].item()]


def test_long_chains_of_functions_have_the_values_of_torch(one: reshard.Checkpoint) -> None:
    rows, cloned, doubled = torch.zeros(400, 32), zeros(), zeros()
    with one.lazy() as weights:
        chain, copied, stacked = weights["w"][:1], weights["w"], weights["v"]
        for at in range(1, 400):
            chain = torch.cat([chain, weights["w"][at % 64 : at % 64 + 1]])
            copied = copied.clone()
        for _ in range(40):
            stacked = torch.stack([stacked, stacked])[1]
        rows.copy_(chain)
        cloned.copy_(copied)
        doubled.copy_(stacked)
    assert torch.equal(rows, ONE["w"][torch.arange(400) % 64])
    assert torch.equal(cloned, ONE["w"])
    assert torch.equal(doubled, ONE["v"])


@pytest.mark.filterwarnings("ignore:.*lru_cache")  # of torch's compiler
def test_compiled_functions_see_the_copied_values(one: reshard.Checkpoint) -> None:
    pending = zeros()
    double = torch.compile(lambda tensor: tensor * 2, backend="eager")
    with one.lazy() as weights:
        pending.copy_(weights["w"])
        assert torch.equal(double(pending), ONE["w"] * 2)
        assert torch.equal(double(weights["v"]), ONE["v"] * 2)


class Scaled(torch.Tensor):
    """A tensor that consists of values and scales."""

    plain: torch.Tensor
    scales: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor, scales: torch.Tensor) -> Scaled:
        made: Scaled = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)
        made.plain, made.scales = values, scales
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default:
            args[0].plain.copy_(args[1])
            args[0].scales.fill_(1)
            return args[0]
        args = tuple(arg.plain * arg.scales[:, None] if isinstance(arg, Scaled) else arg for arg in args)
        return func(*args, **kwargs or {})


def test_tensors_inside_a_wrapper_may_be_destinations(one: reshard.Checkpoint) -> None:
    used, copied = (Scaled(torch.ones(64, 32), torch.ones(64)) for _ in range(2))
    with one.lazy() as weights:
        used.scales.copy_(weights["w"][:, 0])
        assert torch.equal(used + 0, ONE["w"][:, :1].expand(64, 32))
        copied.plain.copy_(weights["w"])
        copied.copy_(weights["v"])
    assert torch.equal(copied.plain, ONE["v"])
