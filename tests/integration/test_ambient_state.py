"""Reads and writes work the same in every torch mode and with every torch default that a caller may set."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch._C._distributed_c10d import HashStore
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import reshard
from reshard.storage.maintenance.diff import diff
from reshard.storage.reading.blocks import Block
from reshard.storage.reading.destination import BlockWriter, Destination

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:You are using `torch.load`:FutureWarning"),
]

TENSORS: dict[str, torch.Tensor] = {
    "w": torch.randn(4, 6),
    "freqs": torch.randn(8, 8, dtype=torch.complex64),
    "half": torch.randn(5).bfloat16(),
    "ids": torch.arange(7),
}
STATE: dict[str, Any] = {**TENSORS, "step": 7, "betas": (0.9, 0.95)}


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Changing(TorchFunctionMode):
    """A mode that changes the result of every torch function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        is_plain = isinstance(found, torch.Tensor) and found.is_floating_point() and found.device.type != "meta"
        return found.double() + 1 if is_plain else found


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "device-meta": lambda: torch.device("meta"),
    "default-device": default_device,
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "inference": torch.inference_mode,
    "no-grad": torch.no_grad,
    "fake": FakeTensorMode,
    "function": Changing,
    "dispatch": Watching,
    "deterministic": deterministic,
    "autocast": lambda: torch.autocast("cpu"),
    "one-thread": one_thread,
}
FORMATS = ("native", "dcp", "safetensors", "torch")


@pytest.fixture(scope="module")
def locations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("ambient")
    found = {name: folder / name for name in FORMATS} | {"torch": folder / "m.pt"}
    reshard.save(STATE, found["native"])
    dcp.save(STATE, checkpoint_id=found["dcp"])
    found["safetensors"].mkdir()
    save_file(TENSORS, found["safetensors"] / "model.safetensors")
    torch.save(STATE, found["torch"])
    return found


def empty() -> dict[str, torch.Tensor]:
    return {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in TENSORS.items()}


def inference(make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        return make()


def check(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert type(found) is torch.Tensor
    assert (found.device.type, found.dtype) == ("cpu", expected.dtype)
    assert torch.equal(found, expected)


def check_all(found: dict[str, Any]) -> None:
    for name, tensor in TENSORS.items():
        check(found[name], tensor)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format", FORMATS)
def test_all_reads_work_in_every_mode(format: str, mode: str, locations: dict[str, Path]) -> None:
    location, loaded, others, by_dcp = locations[format], empty(), {"step": 0, "betas": None}, empty()
    cast = {"w": torch.zeros(4, 6, dtype=torch.float64), "ids": torch.zeros(7, dtype=torch.int32)}
    has_values = format != "safetensors"
    with MODES[mode]():
        checkpoint = reshard.open(location)
        read = {name: checkpoint.read(name) for name in TENSORS}
        box = checkpoint.read("freqs", reshard.Box((2, 3), (4, 5)))
        as_half = checkpoint.read("w", dtype=torch.bfloat16)
        state = checkpoint.state_dict()
        of_rank = checkpoint.load_rank(reshard.Layout({"tp": 2}, {"w": "rowwise"}), 1)
        damaged_chunks = checkpoint.verify()
        step = checkpoint.read_value("step") if has_values else 7
        reshard.load(loaded, location)
        reshard.load(cast, location)
        if has_values:
            reshard.load(others, location)
        dcp.load(by_dcp, storage_reader=reshard.StorageReader(location))
        differing = diff(location, locations["native"])
    check_all(read)
    check_all(state)
    check_all(loaded)
    check_all(by_dcp)
    check(box, TENSORS["freqs"][2:6, 3:8])
    check(as_half, TENSORS["w"].bfloat16())
    check(of_rank["w"], TENSORS["w"][:, 3:])
    check(cast["w"], TENSORS["w"].double())
    check(cast["ids"], TENSORS["ids"].int())
    assert damaged_chunks == []
    assert step == 7
    assert not has_values or (others == {"step": 7, "betas": (0.9, 0.95)} and state["step"] == 7)
    assert {found.what for found in differing} <= {"only in B"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format", FORMATS)
def test_conversions_work_in_every_mode(format: str, mode: str, locations: dict[str, Path], tmp_path: Path) -> None:
    with MODES[mode]():
        for to in ("reshard", "dcp", "safetensors"):
            reshard.convert(locations[format], tmp_path / to, format=to)
        reshard.convert(locations[format], tmp_path / "half", dtype=torch.bfloat16)
    for to in ("reshard", "dcp", "safetensors"):
        check_all({name: reshard.open(tmp_path / to).read(name) for name in TENSORS})
    check(reshard.open(tmp_path / "half").read("w"), TENSORS["w"].bfloat16())


@pytest.mark.parametrize("mode", MODES)
def test_saves_work_in_every_mode(mode: str, tmp_path: Path) -> None:
    made_in_inference = inference(lambda: {name: tensor.clone() for name, tensor in TENSORS.items()})
    with MODES[mode]():
        reshard.save(STATE, tmp_path / "a")
        reshard.save(made_in_inference, tmp_path / "b")
        found = reshard.find_checkpoints(tmp_path)
        if mode != "fake":  # DCP itself cannot save in this mode
            dcp.save(STATE, storage_writer=reshard.StorageWriter(tmp_path / "c"))
    assert [checkpoint.is_complete for checkpoint in found] == [True] * 2
    for name in sorted(path.name for path in tmp_path.iterdir()):
        check_all({tensor: reshard.open(tmp_path / name).read(tensor) for tensor in TENSORS})
    with MODES[mode]():
        reshard.remove(tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("mode", ["inference", "no-grad", "device-meta"])
@pytest.mark.parametrize("format", FORMATS)
def test_tensors_made_in_inference_mode_are_written(format: str, mode: str, locations: dict[str, Path]) -> None:
    loaded, out = inference(empty), inference(lambda: {"out": torch.zeros(8, 8, dtype=torch.complex64)})
    cast = inference(
        lambda: {"ids": torch.zeros(7, dtype=torch.int32), "freqs": torch.zeros(8, 8, dtype=torch.complex128)}
    )
    with MODES[mode]():
        reshard.load(loaded, locations[format])
        reshard.load(cast, locations[format])
        reshard.open(locations[format]).read("freqs", out=out["out"])
    assert all(tensor.is_inference() for tensor in (*loaded.values(), *cast.values()))
    check_all(loaded)
    check(out["out"], TENSORS["freqs"])
    check(cast["ids"], TENSORS["ids"].int())
    check(cast["freqs"], TENSORS["freqs"].to(torch.complex128))


def test_tensor_read_in_inference_mode_is_not_an_inference_tensor(locations: dict[str, Path]) -> None:
    with torch.inference_mode():
        found = reshard.open(locations["native"]).read("w")
    assert not found.is_inference()
    (found.requires_grad_() * 2).sum().backward()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("in_inference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_torch_writes_to_destinations_in_every_mode(dtype: torch.dtype, in_inference: bool, mode: str) -> None:
    values = torch.randn(4, 6).to(dtype)
    with torch.inference_mode(in_inference):
        tensor = torch.zeros(4, 6, dtype=dtype)
    with undisturbed_mode(mode):
        destination = Destination(tensor, dtype)
        block = Block(0, 0, 24, (4, 6), (slice(4), slice(6)), (slice(0, 4), slice(0, 6)))
        BlockWriter(destination, block).write_tensor((), values.reshape(-1))
    check(tensor, values)


@contextlib.contextmanager
def undisturbed_mode(mode: str) -> Iterator[None]:
    """Enter a mode, and suspend it as every call of reshard does."""
    from reshard.storage.runtime.torch_modes import without_torch_modes

    with MODES[mode](), without_torch_modes():
        yield


def test_modes_are_restored_after_a_call(locations: dict[str, Path]) -> None:
    with torch.device("meta"), MODES["dispatch"](), torch.inference_mode():
        for name in ("w", "nothing"):
            with contextlib.suppress(reshard.errors.MissingTensorError):
                reshard.open(locations["native"]).read(name)
            assert torch.empty(1).device.type == "meta"
            assert torch.is_inference_mode_enabled()
            assert torch._C._len_torch_dispatch_stack() == 1
    assert torch.empty(1).device.type == "cpu"
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("destination", ["meta", "fake"])
def test_destination_without_memory_raises_destination_error(destination: str, locations: dict[str, Path]) -> None:
    with MODES["device-meta" if destination == "meta" else "fake"]():
        state = {"w": torch.empty(4, 6)}
        with pytest.raises(reshard.errors.DestinationError, match=r"'w' is (on the meta device|a FakeTensor)"):
            reshard.load(state, locations["native"])


@pytest.mark.parametrize("mode", MODES)
def test_sharded_tensors_work_in_every_mode(mode: str, locations: dict[str, Path], tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        state = {name: distribute_tensor(torch.zeros_like(TENSORS[name]), mesh, [Shard(0)]) for name in ("w", "freqs")}
        with MODES[mode]():
            reshard.load(state, locations["native"])
            reshard.save(state, tmp_path / "c")
        for name, tensor in state.items():
            assert isinstance(tensor, DTensor)
            check(tensor.to_local().detach(), TENSORS[name])
            check(reshard.open(tmp_path / "c").read(name), TENSORS[name])
    finally:
        dist.destroy_process_group()
