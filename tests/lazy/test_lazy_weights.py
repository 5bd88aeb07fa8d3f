"""What a block of lazy tensors reads, when, and what it does with wrong input."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as save_safetensors
from torch import nn

import reshard
from reshard.errors import (
    ArgumentError,
    CheckpointError,
    CorruptCheckpointError,
    DestinationError,
    DtypeError,
    MissingTensorError,
)
from reshard.storage.lazy.tensor import LazyTensor
from reshard.testing import MemoryStore, RecordingStore

ROWS, COLUMNS = 1024, 512


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {
        f"layers.{i}.{p}": torch.randn(ROWS, COLUMNS, generator=generator).bfloat16() for i in (0, 1) for p in "qk"
    }
    state["scale"] = torch.tensor(0.5)
    state["ids"] = torch.arange(1000)
    state["wide"] = torch.randn(64, 64, generator=generator)
    return state


@pytest.fixture
def store() -> RecordingStore:
    memory = MemoryStore()
    reshard.save({**tensors(), "step": 7}, memory, codec="none")
    return RecordingStore(memory)


@pytest.fixture
def checkpoint(store: RecordingStore) -> reshard.Checkpoint:
    return reshard.open(store)


def reads(store: RecordingStore) -> int:
    return sum(call.stop - call.start for call in store.calls if call.method == "read")


def copy_all(checkpoint: reshard.Checkpoint, destinations: dict[str, list[torch.Tensor]]) -> None:
    with checkpoint.lazy() as weights:
        for name, tensors_of_name in destinations.items():
            for tensor in tensors_of_name:
                tensor.copy_(weights[name])


def test_nothing_is_read_before_the_end_of_the_block(store: RecordingStore, checkpoint: reshard.Checkpoint) -> None:
    fused = torch.zeros(2 * 256, COLUMNS, dtype=torch.bfloat16)
    opened = len(store.calls)
    with checkpoint.lazy() as weights:
        for at, part in enumerate("qk"):
            fused[256 * at : 256 * (at + 1)].copy_(weights[f"layers.0.{part}"].narrow(0, 256, 256))
        assert len(store.calls) == opened
        planned = weights.plan().report
        assert float(fused.sum()) != 0  # this uses the memory, so it is read now
        assert weights.plan().report.bytes_needed == 0
    state = tensors()
    assert torch.equal(fused, torch.cat([state[f"layers.0.{part}"][256:512] for part in "qk"]))
    assert planned.bytes_needed == fused.nbytes
    assert weights.report.bytes_needed == fused.nbytes
    assert planned.bytes_fetched < 1.1 * fused.nbytes


SLICES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows": lambda w: w.narrow(0, 256, 256),
    "columns": lambda w: w[:, :256],
    "rows of the transposed": lambda w: w.t()[:256],
    "heads": lambda w: w.view(8, 128, COLUMNS)[2:4],
    "a copy of heads": lambda w: w.view(8, 128, COLUMNS)[2:4].clone().reshape(-1, COLUMNS),
    "one part of a stack": lambda w: torch.stack([w, w]).select(0, 1)[:256],
    "interleaved halves of heads": lambda w: w.view(4, 2, 128, COLUMNS).transpose(1, 2).reshape(ROWS, COLUMNS)[256:512],
    "a part of a concatenation": lambda w: torch.cat([w, w])[ROWS : ROWS + 256],
    "rows by a list": lambda w: w[list(range(256, 512))],
    "a cast": lambda w: w.to(torch.float32)[256:512],
    "the same bits": lambda w: w.view(torch.int16)[256:512].view(torch.bfloat16),
}


@pytest.mark.parametrize("name", SLICES)
def test_only_the_slice_is_read(store: RecordingStore, checkpoint: reshard.Checkpoint, name: str) -> None:
    expected = SLICES[name](tensors()["layers.1.k"])
    destination = torch.zeros_like(expected)
    before = reads(store)
    with checkpoint.lazy() as weights:
        destination.copy_(SLICES[name](weights["layers.1.k"]))
    assert torch.equal(destination, expected)
    assert reads(store) - before <= 1.1 * expected.numel() * 2


def test_bytes_that_are_copied_twice_are_read_once(store: RecordingStore, checkpoint: reshard.Checkpoint) -> None:
    copies = [torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16) for _ in range(3)]
    with checkpoint.lazy() as weights:
        for destination in copies:
            destination.copy_(weights["layers.0.q"])
    assert all(torch.equal(destination, tensors()["layers.0.q"]) for destination in copies)
    assert weights.report.bytes_fetched < 1.1 * copies[0].nbytes


def test_values_that_are_needed_at_once_are_read_once_and_logged(
    store: RecordingStore, checkpoint: reshard.Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "reshard"), checkpoint.lazy() as weights:
        assert weights["scale"].item() == 0.5
        used = len(store.calls)
        assert float(weights["scale"] * 2) == 1
        assert bool(weights["scale"] > 0)
        assert len(store.calls) == used
    assert [record.getMessage() for record in caplog.records if "at once" in record.getMessage()] == [
        "aten._local_scalar_dense.default of 'scale' reads its values at once"
    ]


def test_masks_and_arithmetic_have_the_values_of_torch(checkpoint: reshard.Checkpoint) -> None:
    state = tensors()
    with checkpoint.lazy() as weights:
        wide = weights["wide"]
        assert torch.equal(wide[wide > 0], state["wide"][state["wide"] > 0])
        assert torch.equal(wide @ wide.t(), state["wide"] @ state["wide"].t())
        assert wide.numpy().shape == (64, 64)
        assert weights["ids"].tolist() == list(range(1000))
        assert torch.equal(torch.cat([wide, torch.zeros(1, 64)])[:64], state["wide"])


X = torch.linspace(-1, 1, 64).expand(64, 64).contiguous()
FUNCTIONAL: dict[str, Callable[[torch.Tensor], Any]] = {
    "vjp": lambda w: torch.func.vjp(lambda x: x @ w, X)[0],
    "vjp of views": lambda w: torch.func.vjp(lambda x: (x * w[:, 1:].t()[:64].sum()).sum(), X)[1](torch.tensor(1.0))[0],
    "jvp": lambda w: torch.stack(torch.func.jvp(lambda x: x @ w, (X,), (X,))),
    "grad": lambda w: torch.func.grad(lambda x: (x * w).sum())(X),
    "functionalize": lambda w: torch.func.functionalize(lambda x: x @ w)(X),
    "hessian": lambda w: torch.func.hessian(lambda x: (x * x * w[0]).sum())(X[0]),
    "vmap": lambda w: torch.vmap(lambda row: row @ w)(X),
    "vmap of grad": lambda w: torch.vmap(torch.func.grad(lambda row: (row * w[1]).sum()))(X),
    "a copy": lambda w: torch.func.vjp(lambda x: torch.zeros(64, 64).copy_(w) @ x, X)[0],
    "functional_call": lambda w: torch.func.functional_call(nn.Linear(64, 64, bias=False), {"weight": w}, (X,)),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by torch.func.jvp
@pytest.mark.parametrize("name", FUNCTIONAL)
def test_transforms_of_functions_have_the_values_of_torch(name: str, checkpoint: reshard.Checkpoint) -> None:
    expected = FUNCTIONAL[name](tensors()["wide"])
    with checkpoint.lazy() as weights:
        found = FUNCTIONAL[name](weights["wide"])
        torch.testing.assert_close(found, expected)
        assert torch.equal(weights["wide"].clone(), tensors()["wide"])


def test_a_new_tensor_is_on_the_device_of_the_lazy_one(checkpoint: reshard.Checkpoint) -> None:
    with checkpoint.lazy() as weights:
        made = weights["wide"].new_tensor([1, 2])
        assert (made.device.type, made.dtype, made.tolist()) == ("cpu", torch.float32, [1.0, 2.0])
        assert weights["ids"].new_tensor([3], dtype=torch.int8).tolist() == [3]


def test_index_select_refuses_negative_indexes_as_torch_does(checkpoint: reshard.Checkpoint) -> None:
    with checkpoint.lazy() as weights:
        with pytest.raises(IndexError, match="out of range"):
            weights["wide"].index_select(0, torch.tensor([1, -1]))
        with pytest.raises(IndexError, match="out of range"):
            weights["wide"].index_select(5, torch.tensor([1]))
        assert torch.equal(weights["wide"][torch.tensor([1, -1])], tensors()["wide"][[1, -1]])


@pytest.mark.parametrize("step", [2, 5])
def test_a_limit_of_the_over_read_applies_to_the_steps_of_views(step: int) -> None:
    values = torch.randn(256, 4096)
    store = MemoryStore()
    narrow = values.view(-1, 16)
    store.content["model.safetensors"] = save_safetensors({"w": values, "narrow": narrow.clone()})
    fetched = {}
    for limit in (None, 0.0):
        rows, columns = torch.zeros_like(values[::step]), torch.zeros_like(values[:, ::step])
        with reshard.open(store).lazy(max_over_read=limit) as weights:
            rows.copy_(weights["w"][::step])
        fetched[limit] = weights.report.bytes_fetched
        with reshard.open(store).lazy(max_over_read=limit) as weights:
            columns.copy_(weights["w"][:, ::step])
        assert torch.equal(rows, values[::step])
        assert torch.equal(columns, values[:, ::step])
        with reshard.open(store).lazy(max_over_read=limit) as weights:
            far = torch.zeros(4, 16).copy_(weights["narrow"][::20_000])
        assert torch.equal(far, narrow[::20_000])
        assert weights.report.bytes_fetched < 70_000
    assert fetched[None] > values.nbytes * 0.9
    assert fetched[0.0] < rows.nbytes + 70_000  # with the header


def test_changing_a_lazy_tensor_changes_its_views_and_not_its_copies(checkpoint: reshard.Checkpoint) -> None:
    original = tensors()["wide"]
    destination = torch.zeros(64, 64)
    with checkpoint.lazy() as weights:
        wide = weights["wide"]
        row, cloned = wide[3], wide.clone()
        destination.copy_(wide)
        wide.mul_(2)
        assert torch.equal(row, original[3] * 2)
        assert torch.equal(weights["wide"], original * 2)
        assert torch.equal(cloned, original)
    assert torch.equal(destination, original)


def test_a_later_copy_to_the_same_memory_wins(store: RecordingStore, checkpoint: reshard.Checkpoint) -> None:
    destination = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16)
    with checkpoint.lazy() as weights:
        destination.copy_(weights["layers.0.q"])
        destination.copy_(weights["layers.0.k"])
        destination[:10].copy_(weights["layers.1.k"][:10])
    expected = tensors()["layers.0.k"]
    expected[:10] = tensors()["layers.1.k"][:10]
    assert torch.equal(destination, expected)
    assert weights.report.bytes_needed < 1.1 * destination.nbytes  # the first copy is not read


def test_code_after_a_copy_sees_the_copied_values(checkpoint: reshard.Checkpoint) -> None:
    state = tensors()
    destination = torch.zeros(64, 64)
    with checkpoint.lazy() as weights:
        destination.copy_(weights["wide"])
        destination.mul_(3)
        other = destination.clone()
        destination[:32].copy_(weights["wide"][:32])
    assert torch.equal(other, state["wide"] * 3)
    assert torch.equal(destination, torch.cat([state["wide"][:32], state["wide"][32:] * 3]))


def test_changing_other_rows_of_a_destination_reads_nothing_yet(
    store: RecordingStore, checkpoint: reshard.Checkpoint
) -> None:
    padded = torch.full((80, 64), -1.0)
    with checkpoint.lazy() as weights:
        used = len(store.calls)
        padded[:64].copy_(weights["wide"])
        padded[64:].fill_(0)
        assert padded.shape == torch.empty_like(padded).shape
        assert len(store.calls) == used
    assert torch.equal(padded, torch.cat([tensors()["wide"], torch.zeros(16, 64)]))


def test_a_block_that_fails_reads_and_changes_nothing(store: RecordingStore, checkpoint: reshard.Checkpoint) -> None:
    destination = torch.zeros(64, 64)
    used = len(store.calls)
    weights = checkpoint.lazy()

    def fail() -> None:
        with weights:
            destination.copy_(weights["wide"])
            raise ValueError("from the block")

    with pytest.raises(ValueError, match="from the block"):
        fail()
    assert len(store.calls) == used
    assert not destination.any()
    destination.copy_(weights["wide"])  # outside of the block a copy is executed at once
    assert torch.equal(destination, tensors()["wide"])


def test_without_a_block_each_copy_is_executed_at_once(checkpoint: reshard.Checkpoint) -> None:
    weights = checkpoint.lazy()
    destination = torch.zeros(32, 64)
    destination.copy_(weights["wide"][32:])
    assert torch.equal(destination, tensors()["wide"][32:])
    parameter = nn.Parameter(torch.zeros(1))
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        parameter.data = weights["wide"]
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        nn.utils.vector_to_parameters(weights["wide"][0, :1], [parameter])
    assert parameter.tolist() == [0]


def test_another_thread_cannot_assign_a_lazy_tensor_to_data(checkpoint: reshard.Checkpoint) -> None:
    parameter, errors = nn.Parameter(torch.zeros(1)), list[Exception]()
    with checkpoint.lazy() as weights:

        def assign() -> None:
            try:
                parameter.data = weights["wide"]
            except RuntimeError as error:
                errors.append(error)

        thread = threading.Thread(target=assign)
        thread.start()
        thread.join()
    assert "incompatible tensor type" in str(errors)
    assert parameter.tolist() == [0]


def test_a_closed_checkpoint_is_an_error(checkpoint: reshard.Checkpoint) -> None:
    weights = checkpoint.lazy()
    wide = weights["wide"]
    checkpoint.close()
    assert weights.report.bytes_needed == 0
    for use in (lambda: torch.zeros(64, 64).copy_(wide), lambda: wide + 1, lambda: weights["ids"], checkpoint.lazy):
        with pytest.raises(ArgumentError, match="closed"):
            use()


def test_a_block_is_entered_once(checkpoint: reshard.Checkpoint) -> None:
    with checkpoint.lazy() as weights:
        with pytest.raises(ArgumentError, match="already"):
            weights.__enter__()
        with checkpoint.lazy() as others:
            destination = torch.zeros(64, 64)
            destination.copy_(others["wide"])
        assert torch.equal(destination, tensors()["wide"])
    with weights:
        destination.zero_()
        destination.copy_(weights["wide"])
    assert torch.equal(destination, tensors()["wide"])


@pytest.mark.parametrize(
    "arguments",
    [{"budget_bytes": 0}, {"budget_bytes": "1"}, {"max_over_read": -1}, {"cooperative": "yes"}, {"process_group": 3}],
)
def test_wrong_arguments_are_refused(checkpoint: reshard.Checkpoint, arguments: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        checkpoint.lazy(**arguments)


def test_names_are_those_of_the_tensors(checkpoint: reshard.Checkpoint) -> None:
    weights = checkpoint.lazy()
    assert list(weights) == list(checkpoint.tensors)
    assert len(weights) == len(tensors())
    assert "step" not in weights
    assert weights.get("nothing") is None
    assert weights["wide"] is weights["wide"]
    with pytest.raises(MissingTensorError, match="read_value"):
        _ = weights["step"]
    with pytest.raises(MissingTensorError, match=r"layers\.0\.qq"):
        _ = weights["layers.0.qq"]
    with pytest.raises(MissingTensorError, match="3 is not the name"):
        _ = weights[3]  # type: ignore[index]
    assert repr(weights["wide"]) == "LazyTensor('wide', shape=(64, 64), dtype=torch.float32, device='cpu')"


def test_names_that_nothing_has_used_are_listed(checkpoint: reshard.Checkpoint) -> None:
    with checkpoint.lazy() as weights:
        torch.zeros(64, 64).copy_(weights["wide"])
        weights["scale"].item()
        weights["ids"][:4].clone()
    assert set(weights.unused_names) == {"ids", "layers.0.q", "layers.0.k", "layers.1.q", "layers.1.k"}


WRONG: dict[str, tuple[type[Exception], Callable[[], torch.Tensor]]] = {
    "another shape": (RuntimeError, lambda: torch.zeros(63, 64)),
    "expanded": (RuntimeError, lambda: torch.zeros(1, 64).expand(64, 64)),
    "freed": (DestinationError, lambda: freed(64, 64)),
    "an integer dtype": (DtypeError, lambda: torch.zeros(64, 64, dtype=torch.int32)),
}


def freed(*shape: int) -> torch.Tensor:
    tensor = torch.zeros(shape)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_destination_is_refused_and_the_others_stay_unchanged(
    checkpoint: reshard.Checkpoint, name: str
) -> None:
    kind, make = WRONG[name]
    fine = torch.zeros(64, 64)
    with pytest.raises(kind):
        copy_all(checkpoint, {"wide": [fine, make()]})
    assert not fine.any()


def test_integers_that_do_not_fit_are_refused(checkpoint: reshard.Checkpoint) -> None:
    small = torch.zeros(1000, dtype=torch.int8)
    with pytest.raises(DtypeError, match="128"), checkpoint.lazy() as weights:
        small.copy_(weights["ids"])
    every_other = torch.zeros(500, dtype=torch.int8)
    with pytest.raises(DtypeError, match="128"), checkpoint.lazy() as weights:
        every_other.copy_(weights["ids"][::2])
    assert not small.any()
    assert not every_other.any()
    with checkpoint.lazy() as weights:  # this code says that it wants the low bits
        small.copy_(weights["ids"].to(torch.int8))
    assert torch.equal(small, torch.arange(1000).to(torch.int8))


def test_quantised_weights_are_not_cast_without_their_scales() -> None:
    store = MemoryStore()
    reshard.save({"w": torch.ones(8, 8).to(torch.float8_e4m3fn), "w_scale": torch.ones(8)}, store)
    takes: list[Callable[[torch.Tensor], torch.Tensor]] = [lambda w: w, lambda w: w[::3, ::3]]
    for take in takes:
        with pytest.raises(DtypeError, match="scale"), reshard.open(store).lazy() as weights:
            torch.zeros(take(torch.zeros(8, 8)).shape).copy_(take(weights["w"]))
    with reshard.open(store).lazy() as weights:
        destination = torch.zeros(8, 8, dtype=torch.bfloat16)
        destination.copy_(weights["w"].to(torch.bfloat16) * weights["w_scale"])
    assert torch.equal(destination, torch.ones(8, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_a_damaged_chunk_leaves_its_destination_unchanged(codec: str) -> None:
    store = MemoryStore()
    reshard.save(tensors(), store, codec=codec)
    name = max((name for name in store.content if name != "manifest"), key=lambda name: len(store.content[name]))
    data = bytearray(store.content[name])
    data[len(data) // 2] ^= 1
    store.content[name] = bytes(data)
    destinations = {key: torch.zeros_like(tensor) for key, tensor in tensors().items()}
    with pytest.raises(CorruptCheckpointError) as caught:
        copy_all(reshard.open(store), {key: [tensor] for key, tensor in destinations.items()})
    damaged = str(caught.value).split("'")[1]
    assert damaged in destinations
    assert not destinations[damaged].any()


def test_names_that_cannot_be_read_are_listed_and_raise_their_error() -> None:
    store = MemoryStore()
    reshard.save({"a": torch.ones(4), "b": torch.ones(4)}, store)
    checkpoint = reshard.open(store)
    unreadable = checkpoint.unreadable
    weights = checkpoint.lazy()
    assert set(weights) == {*checkpoint.tensors, *unreadable}
    assert len(weights) == len(list(weights))


def test_threads_may_record(checkpoint: reshard.Checkpoint) -> None:
    destinations = [torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16) for _ in range(4)]
    with checkpoint.lazy() as weights:
        names = [f"layers.{i}.{p}" for i in (0, 1) for p in "qk"]
        threads = [
            threading.Thread(target=lambda name=name, to=to: to.copy_(weights[name]))
            for name, to in zip(names, destinations, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(to, tensors()[name]) for name, to in zip(names, destinations, strict=True))


def test_progress_is_reported(checkpoint: reshard.Checkpoint) -> None:
    seen: list[reshard.Progress] = []
    with checkpoint.lazy(progress=seen.append) as weights:
        torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16).copy_(weights["layers.0.q"])
    assert seen
    assert seen[-1].done_bytes == seen[-1].total_bytes > 0


# Modules


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.zeros(64, 64))
        self.tied = self.wide
        self.register_buffer("ids", torch.zeros(1000, dtype=torch.int64))


def test_load_state_dict_copies_into_the_parameters(checkpoint: reshard.Checkpoint) -> None:
    module = Small()
    address = module.wide.data_ptr()
    with checkpoint.lazy() as weights:
        module.load_state_dict({"wide": weights["wide"], "tied": weights["wide"], "ids": weights["ids"]})
    assert module.wide.data_ptr() == address
    assert torch.equal(module.wide, tensors()["wide"])
    assert torch.equal(module.ids, tensors()["ids"])  # type: ignore[arg-type]


@pytest.mark.parametrize("in_block", [True, False])
@pytest.mark.parametrize("cast", [torch.float32, torch.bfloat16])
def test_fill_replaces_lazy_parameters_and_buffers(
    store: RecordingStore, checkpoint: reshard.Checkpoint, in_block: bool, cast: torch.dtype
) -> None:
    weights = checkpoint.lazy()
    with torch.device("meta"):
        module = Small()
    module.wide.mark = "kept"  # type: ignore[attr-defined]

    def load() -> None:
        module.load_state_dict({"wide": weights["wide"], "tied": weights["wide"], "ids": weights["ids"]}, assign=True)
        module.wide.mark = "kept"  # type: ignore[attr-defined]
        module.to(cast)
        assert all(isinstance(tensor, LazyTensor) for tensor in module.state_dict(keep_vars=True).values())
        used = len(store.calls)
        weights.fill(module)
        assert len(store.calls) > used

    if in_block:
        with weights:
            load()
    else:
        load()
    assert type(module.wide) is nn.Parameter
    assert module.wide.requires_grad
    assert module.wide.mark == "kept"  # type: ignore[attr-defined]
    assert torch.equal(module.wide, tensors()["wide"].to(cast))
    assert torch.equal(module.ids, tensors()["ids"])  # type: ignore[arg-type]


def test_parameters_that_share_a_lazy_tensor_stay_tied(checkpoint: reshard.Checkpoint) -> None:
    module = nn.ModuleDict({"a": nn.Linear(64, 64, bias=False), "b": nn.Linear(64, 64, bias=False)})
    with checkpoint.lazy() as weights:
        module["a"].weight = nn.Parameter(weights["wide"], requires_grad=False)
        module["b"].weight = module["a"].weight
        weights.fill(module)
    assert module["a"].weight is module["b"].weight
    assert not module["a"].weight.requires_grad
    assert torch.equal(module["a"].weight, tensors()["wide"])


def test_assigning_to_data_reads_into_a_new_tensor(store: RecordingStore, checkpoint: reshard.Checkpoint) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    used = len(store.calls)
    with checkpoint.lazy() as weights:
        parameter.data = weights["wide"].t()[:10]
        assert len(store.calls) == used
    assert torch.equal(parameter, tensors()["wide"].t()[:10])
    assert parameter.requires_grad
    (parameter * 2).sum().backward()
    assert parameter.grad is not None


def test_lazy_parameters_can_be_used_before_they_are_filled(checkpoint: reshard.Checkpoint) -> None:
    layer = nn.Linear(64, 64, bias=False)
    layer.weight = nn.Parameter(checkpoint.lazy()["wide"])
    assert torch.equal(layer(torch.eye(64)).detach(), tensors()["wide"].t())


def test_a_changed_lazy_tensor_may_become_a_parameter(checkpoint: reshard.Checkpoint) -> None:
    module, parameters = nn.Linear(64, 64, bias=False), list[nn.Parameter]()
    with checkpoint.lazy() as weights:
        weights["wide"].mul_(2)
        parameters.append(nn.Parameter(weights["wide"]))
        module.load_state_dict({"weight": weights["wide"]}, assign=True)
        weights["wide"].add_(1)
        assert torch.equal(parameters[0] + 0, tensors()["wide"] * 2 + 1)
        weights.fill(module)
    assert type(module.weight) is nn.Parameter
    assert torch.equal(module.weight, tensors()["wide"] * 2 + 1)


def test_a_lazy_parameter_shares_the_memory_of_its_new_data(checkpoint: reshard.Checkpoint) -> None:
    takes: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda new: new,
        lambda new: new[3:],
        lambda new: new.t(),
        lambda new: new[2:, ::2],
    ]
    for take in takes:
        new = torch.arange(48.0).reshape(8, 6)
        with checkpoint.lazy() as weights:
            parameter = nn.Parameter(weights["wide"], requires_grad=False)
            parameter.data = take(new)
            assert torch.equal(parameter + 0, take(new))
            new.add_(1)
            assert torch.equal(parameter + 0, take(new))
            parameter.mul_(2)
            assert take(new)[0, 0] == parameter[0, 0]


def test_lazy_weights_are_not_pickled(checkpoint: reshard.Checkpoint) -> None:
    weights = checkpoint.lazy()
    with pytest.raises(ArgumentError, match=r"pickle the Checkpoint, and call its lazy\(\)"):
        pickle.dumps(weights)
    assert copy.copy(weights).keys() == weights.keys()


def test_lazy_modules_can_be_copied_and_pickled(checkpoint: reshard.Checkpoint) -> None:
    weights = checkpoint.lazy()
    layer = nn.Linear(64, 64, bias=False)
    layer.weight = nn.Parameter(weights["wide"])
    copied = copy.deepcopy(layer)
    assert isinstance(copied.weight, LazyTensor)
    assert isinstance(copied.weight, nn.Parameter)
    layer.weight.data.zero_()
    assert not layer.weight.any()
    weights.fill(copied)
    assert torch.equal(copied.weight, tensors()["wide"])
    file = io.BytesIO()
    torch.save({"ids": weights["ids"][5:9]}, file)
    file.seek(0)
    assert torch.load(file)["ids"].tolist() == [5, 6, 7, 8]
    assert set(copy.deepcopy(weights)) == set(weights)


def test_saving_a_lazy_tensor_is_refused(checkpoint: reshard.Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="wide"):
        reshard.save({"wide": checkpoint.lazy()["wide"]}, MemoryStore())


def test_a_block_inside_inference_mode_fills_inference_tensors(checkpoint: reshard.Checkpoint) -> None:
    with torch.inference_mode():
        destination = torch.zeros(64, 64)
        parameter = nn.Parameter(torch.zeros(1), requires_grad=False)
        with checkpoint.lazy() as weights:
            destination.copy_(weights["wide"])
            parameter.data = weights["wide"][:3]
    assert torch.equal(destination, tensors()["wide"])
    assert torch.equal(parameter, tensors()["wide"][:3])


def test_other_default_dtypes_and_devices_do_not_matter(checkpoint: reshard.Checkpoint) -> None:
    destination = torch.zeros(64, 64)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), checkpoint.lazy() as weights:
            destination.copy_(weights["wide"][::2].repeat_interleave(2, 0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(destination, tensors()["wide"][::2].repeat_interleave(2, 0))


def test_a_function_that_changes_the_shape_in_place_is_refused(checkpoint: reshard.Checkpoint) -> None:
    with pytest.raises(ArgumentError, match="squeeze_"):
        checkpoint.lazy()["wide"].squeeze_()


def test_copying_to_the_meta_device_does_nothing(store: RecordingStore, checkpoint: reshard.Checkpoint) -> None:
    used = len(store.calls)
    with checkpoint.lazy() as weights:
        torch.zeros(64, 64, device="meta").copy_(weights["wide"])
        assert weights["wide"].to("meta").device.type == "meta"
    assert len(store.calls) == used


def test_recording_does_not_import_the_compiler_of_torch(tmp_path: Path) -> None:
    """It takes longer to import than many a checkpoint to load."""
    reshard.save(tensors(), tmp_path / "checkpoint")
    code = """
import sys, torch, reshard
destination = torch.empty(2, 1024, 256, dtype=torch.bfloat16)
with reshard.open(sys.argv[1]).lazy() as weights:
    q, k = (weights[f"layers.0.{part}"].chunk(2, 1)[1] for part in "qk")
    destination.copy_(torch.stack([q, torch.cat([k[:3], k[3:].clone().to(torch.bfloat16)])]))
print([module for module in ("torch._dynamo", "torch._inductor") if module in sys.modules])
"""
    command = [sys.executable, "-c", code, str(tmp_path / "checkpoint")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
