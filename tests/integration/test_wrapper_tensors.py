"""Tensors that consist of other tensors, such as quantised weights and optimizer states of torchao."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_reduce
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor

import reshard
from reshard import errors
from reshard.testing import MemoryStore
from tests.integration.wrappers import Flattened, Scaled
from tests.ranks import RankPool

logging.getLogger("torchao").setLevel(logging.ERROR)  # it logs which of its extensions need a GPU
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torchao.float8
    import torchao.optim
    import torchao.quantization as quantization

CONFIGS: dict[str, Any] = {
    "int8": quantization.Int8WeightOnlyConfig(),
    "float8": quantization.Float8WeightOnlyConfig(),
    "int8 activations": quantization.Int8DynamicActivationInt8WeightConfig(),
    "int8 in groups": quantization.IntxWeightOnlyConfig(granularity=quantization.PerGroup(32)),
}
OPTIMIZERS: dict[str, Any] = {
    "8 bits": torchao.optim.AdamW8bit,
    "4 bits": torchao.optim.AdamW4bit,
    "float8": torchao.optim.AdamWFp8,
}
UNHASHABLE = "ignore:.*does not implement _stable_hash_for_caching"


def model_of(value: float | None = None, width: int = 128) -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 64))
    if value is not None:
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, value)
    return model


def quantised(config: Any, value: float | None = None, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    model = model_of(value).to(dtype)
    quantization.quantize_(model, config)
    return model


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("save", [reshard.save, lambda state, uri: reshard.async_save(state, uri).result()])
def test_quantised_models_round_trip(name: str, save: Callable[[Any, Any], Any], tmp_path: Path) -> None:
    model = quantised(CONFIGS[name])
    save(model.state_dict(), tmp_path / "c")
    loaded = quantised(CONFIGS[name], 0.5)
    values = torch.randn(3, 128, dtype=torch.bfloat16)
    assert not loaded(values).equal(model(values))
    report = reshard.load(loaded.state_dict(), tmp_path / "c")
    assert loaded(values).equal(model(values))
    assert report.unexpected_keys == report.missing_keys == ()


def step_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.manual_seed(3)
    model(torch.randn(4, 128)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Run without the compiler, which the steps of torchao's optimizers would use."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.filterwarnings(UNHASHABLE)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.usefixtures("uncompiled")
def test_quantised_optimizer_states_round_trip(name: str, tmp_path: Path) -> None:
    model = model_of()
    optimizer = OPTIMIZERS[name](model.parameters(), lr=1e-2)
    step_of(model, optimizer)
    reshard.save(reshard.training_state(model, optimizer), tmp_path / "c")
    other = model_of(0.5)
    resumed = OPTIMIZERS[name](other.parameters(), lr=1e-2)
    reshard.load(reshard.training_state(other, resumed), tmp_path / "c")
    for each in ((model, optimizer), (other, resumed)):
        step_of(*each)
    assert all(a.equal(b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_tensors_inside_are_stored_under_their_attributes() -> None:
    store = MemoryStore()
    pair = TwoTensor(torch.ones(2), TwoTensor(torch.zeros(2), torch.full((2,), 2.0)))
    reshard.save({"x": {"w": pair}, "v": torch.ones(3)}, store)
    checkpoint = reshard.open(store)
    assert set(checkpoint.tensors) == {"x.w.a", "x.w.b.a", "x.w.b.b", "v"}
    assert checkpoint.read_value("x.w.__class__") == (
        '{"class": "TwoTensor", "tensors": {"a": null, "b": {"class": "TwoTensor", "tensors": {"a": null, "b": null}, '
        '"settings": [null]}}, "settings": [null]}'
    )
    found = TwoTensor(torch.zeros(2), TwoTensor(torch.ones(2), torch.ones(2)))
    state = {"x": {"w": found}, "v": torch.zeros(3)}
    reshard.load(state, store)
    assert state["x"]["w"] is found  # type: ignore[index]
    assert [found.a.tolist(), found.b.a.tolist(), found.b.b.tolist()] == [[1, 1], [0, 0], [2, 2]]

    assert reshard.load(state, store).unexpected_keys == ()
    excluded = TwoTensor(torch.zeros(2), TwoTensor(torch.ones(2), torch.ones(2)))
    report = reshard.load({"x": {"w": excluded}, "v": torch.zeros(3)}, store, exclude="x.w")
    assert excluded.a.eq(0).all()
    assert report.unexpected_keys == report.unused_patterns == ()
    renamed = {"y": {"w": TwoTensor(torch.zeros(2), TwoTensor(torch.ones(2), torch.ones(2)))}, "v": torch.zeros(3)}
    reshard.load(renamed, store, rename={"x.*": "y.*"})
    assert renamed["y"]["w"].a.eq(1).all()  # type: ignore[index]


def test_a_quantised_tensor_receives_the_values_of_a_plain_one() -> None:
    store = MemoryStore()
    reshard.save({"w": torch.full((4, 4), 2.0, dtype=torch.bfloat16)}, store)
    found = Flattened.of(4, 4)
    reshard.load({"w": found}, store)
    assert found.q.eq(2).all()


class Renamed(Flattened):
    """One of another class."""


class Configured(Flattened):
    """One with settings."""

    settings: Any = None

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["q", "s"], self.settings


class Shifted(Flattened):
    """One that may have an offset, too."""

    o: torch.Tensor | None = None

    @classmethod
    def of(cls, *shape: int) -> Shifted:
        tensor = super().of(*shape[:2])
        tensor.o = torch.zeros(()) if len(shape) > 2 else None
        return tensor

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["q", "s"] + ["o"] * (self.o is not None), None


def wide(tensor: Scaled) -> Scaled:
    tensor.q = tensor.q.to(torch.int16)
    return tensor


def with_block(*block: int) -> Configured:
    tensor = Configured.of(4, 4)
    tensor.settings = {"block": block}
    return tensor


@pytest.mark.parametrize(
    ("saved", "found", "error", "message"),
    [
        (
            Flattened.of(4, 4),
            Renamed.of(4, 4),
            errors.DestinationError,
            "'w' is of the class Renamed",
        ),
        (Flattened.of(4, 4), Flattened.of(4, 5), errors.ShapeMismatchError, r"'w\.q' has shape \(4, 4\)"),
        (Flattened.of(4, 4), wide(Flattened.of(4, 4)), errors.DtypeError, r"'w\.q' is stored as torch\.int8"),
        (Shifted.of(4, 4), Shifted.of(4, 4, 1), errors.DestinationError, "consists of o, q, s in the state dict"),
        (Shifted.of(4, 4, 1), Shifted.of(4, 4), errors.DestinationError, "and of o, q, s in the checkpoint"),
        (with_block(1, 4), with_block(2, 2), errors.DestinationError, r"block=\[2, 2\] in the state dict and \[1, 4\]"),
        (Flattened.of(4, 4), torch.zeros(4, 4), errors.MissingTensorError, "the checkpoint has no 'w'"),
    ],
)
def test_tensors_of_another_form_are_refused(
    saved: torch.Tensor, found: torch.Tensor, error: type[Exception], message: str
) -> None:
    store, other = MemoryStore(), torch.zeros(2)
    reshard.save({"w": saved, "other": torch.ones(2)}, store)
    with pytest.raises(error, match=message):
        reshard.load({"w": found, "other": other}, store)
    assert other.eq(0).all()
    if isinstance(found, Scaled):
        assert found.q.eq(0).all()


@pytest.mark.parametrize(
    ("saved", "found"),
    [
        ({"block": [1, 4], "kernel": object()}, {"block": [1, 4], "kernel": object()}),
        ({"block": [1, 4], "device": torch.device("cuda:0")}, {"block": [1, 4], "device": torch.device("cpu")}),
        ({"block": [1, 4]}, {"block": [1, 4], "of a newer version": 3}),
        (["bf16", 4], ["of a newer version", "bf16", 4]),
        ([True, torch.float32], [True, torch.float32]),
    ],
)
def test_settings_of_other_versions_and_ranks_are_not_compared(saved: Any, found: Any) -> None:
    store = MemoryStore()
    one, two = Configured.of(4, 4), Configured.of(4, 4)
    one.settings, two.settings = saved, found
    one.q.fill_(3)
    reshard.save({"w": one}, store)
    reshard.load({"w": two}, store)
    assert two.q.eq(3).all()


class OfOne(torch.Tensor):
    """One that presents a tensor inside, times a factor."""

    inside: torch.Tensor
    factor: float

    @staticmethod
    def __new__(cls, inside: torch.Tensor, factor: float = 1.0) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, inside.shape, dtype=inside.dtype)

    def __init__(self, inside: torch.Tensor, factor: float = 1.0) -> None:
        self.inside, self.factor = inside, factor

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["inside"], [self.factor]

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: Any, *_: Any) -> OfOne:
        return OfOne(inner["inside"], *context)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].inside, args[0].factor)
        if function is torch.ops.aten.copy_.default and isinstance(args[0], cls):
            args[0].inside.copy_(args[1] / args[0].factor)
            return args[0]

        def plain(value: Any) -> Any:
            return value.inside * value.factor if isinstance(value, cls) else value

        return function(*map(plain, args), **(kwargs or {}))


class WithCount(OfOne):
    """One that also counts."""

    def __init__(self, inside: torch.Tensor, factor: float = 1.0) -> None:
        super().__init__(inside, factor)
        self.count = torch.tensor(7)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["inside", "count"], [self.factor]


class WithNone(OfOne):
    """One whose second tensor may be missing."""

    scale: torch.Tensor | None = None

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["inside", "scale"], [self.factor]


def test_a_tensor_inside_may_be_missing() -> None:
    store = MemoryStore()
    reshard.save({"w": WithNone(torch.ones(3))}, store)
    found: Any = WithNone(torch.zeros(3))
    reshard.load({"w": found}, store)
    assert found.inside.eq(1).all()


@pytest.mark.parametrize("values", [torch.zeros(3), torch.arange(3.0), torch.tensor(2.0), torch.zeros(0, 4)])
def test_the_form_of_a_stored_tensor_depends_on_its_class_alone(values: torch.Tensor) -> None:
    for tensor, names in (
        (OfOne(values), {"w"}),
        (OfOne(values, 2.0), {"w.inside"}),
        (WithCount(values), {"w.inside", "w.count"}),
    ):
        store = MemoryStore()
        reshard.save({"w": tensor}, store)
        assert set(reshard.open(store).tensors) == names
        found: Any = type(tensor)(torch.full_like(values, 9.0), tensor.factor)
        if isinstance(found, WithCount):
            found.count.zero_()
        reshard.load({"w": found}, store)
        assert found.inside.equal(values)
        assert getattr(found, "count", 7) == 7


def test_parts_may_be_missing_or_excluded_as_other_names() -> None:
    store = MemoryStore()
    description = '{"class": "TwoTensor", "tensors": {"a": null, "b": null}, "settings": []}'
    reshard.save({"w": {"a": torch.ones(2), "__class__": description}}, store)

    def load(**options: Any) -> tuple[TwoTensor, reshard.Report]:
        pair = TwoTensor(torch.zeros(2), torch.zeros(2))
        return pair, reshard.load({"w": pair}, store, **options)

    with pytest.raises(errors.MissingTensorError, match=r"the checkpoint has no 'w\.b'"):
        load()
    for options in ({"strict": False}, {"allow_missing": "w.b"}):
        pair, report = load(**options)
        assert pair.a.eq(1).all()
        assert pair.b.eq(0).all()
        assert report.missing_keys == ("w.b",)
    assert load(exclude="w.b")[1].missing_keys == ()
    reshard.save({"w": {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int8)}}, store, overwrite=True)
    assert load(exclude="w.b")[0].a.eq(1).all()


def test_parts_without_a_description_are_loaded_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reshard.save({"w": TwoTensor(torch.ones(2), torch.ones(2))}, tmp_path / "native")
    reshard.convert(tmp_path / "native", tmp_path / "hf", format="safetensors")
    pair = TwoTensor(torch.zeros(2), torch.zeros(2))
    reshard.load({"w": pair}, tmp_path / "hf")
    assert pair.b.eq(1).all()
    assert "does not tell the classes of 'w'" in caplog.text
    with pytest.raises(errors.MissingTensorError, match=r"of which 'w' consisted: load into a tensor of the class"):
        reshard.load({"w": torch.zeros(2)}, tmp_path / "native")


def test_the_classes_of_many_tensors_are_read_with_few_requests() -> None:
    store = MemoryStore()
    state = {f"{i}": TwoTensor(torch.ones(100, 100), torch.ones(100, 100)) for i in range(50)}
    reshard.save(state, store, codec="none")
    report = reshard.load(state, store)
    assert report.total.requests < 10


def test_a_description_that_is_damaged_is_refused() -> None:
    store = MemoryStore()
    tensor = Flattened.of(4, 4)
    for text in ("{}", "[]", "5", "class", '{"class": "Flattened", "settings": 5}', 5):
        reshard.save({"w": {"q": tensor.q, "s": tensor.s, "__class__": text}}, store, overwrite=True)
        with pytest.raises(errors.CorruptCheckpointError, match="the class of 'w' is not described"):
            reshard.load({"w": tensor}, store)


def test_a_part_with_the_name_of_another_value_is_refused() -> None:
    with pytest.raises(errors.DestinationError, match=r"two values of the state dict have the name 'w\.q'"):
        reshard.save({"w": Flattened.of(4, 4), "w.q": torch.ones(1)}, MemoryStore())
    with pytest.raises(errors.DestinationError, match=r"two values of the state dict have the name 'w\.q'"):
        reshard.save({"w.q": torch.ones(1), "w": Flattened.of(4, 4)}, MemoryStore())


def save_the_result_of_a_collective(folder: str) -> None:
    world: Any = dist.group.WORLD
    with patch.object(AsyncCollectiveTensor, "wait", autospec=True, side_effect=AsyncCollectiveTensor.wait) as wait:
        reduced = all_reduce(torch.full((1000, 100), float(dist.get_rank() + 1)), "sum", world)
        assert isinstance(reduced, AsyncCollectiveTensor)
        reshard.save({"w": reduced}, folder)
    assert wait.called
    assert reshard.open(folder).read("w").eq(3).all()


def test_the_result_of_a_collective_is_waited_for(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_the_result_of_a_collective, str(tmp_path))


def train_in_float8(folder: str) -> list[torch.Tensor]:
    """Save FSDP parameters that torchao casts to float8 before it gathers them, and load them into plain ones."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = model_of()
    expected = copy.deepcopy(model.state_dict())
    config = torchao.float8.Float8LinearConfig(enable_fsdp_float8_all_gather=True)
    torchao.float8.convert_to_float8_training(model, config=config)
    fully_shard(model, mesh=mesh)
    weight: Any = model.state_dict()["0.weight"]
    assert "Float8" in type(weight._local_tensor).__name__
    reshard.save(model.state_dict(), f"{folder}/c")
    dcp.save(model.state_dict(), storage_writer=reshard.StorageWriter(f"{folder}/dcp"))
    dcp.save(model.state_dict(), checkpoint_id=f"{folder}/of torch")
    for uri in (f"{folder}/c", f"{folder}/dcp", f"{folder}/of torch"):
        plain = model_of(0.5)
        reshard.load(plain.state_dict(), uri)
        assert all(plain.state_dict()[name].equal(tensor) for name, tensor in expected.items())
        for parameter in model.parameters():
            parameter.data.copy_(distribute_tensor(torch.zeros(parameter.shape), mesh, parameter.placements))  # type: ignore[attr-defined]
        reshard.load(model.state_dict(), uri)
        for name, tensor in model.state_dict().items():
            assert isinstance(tensor, DTensor)
            local: Any = tensor._local_tensor
            rows = getattr(local, "_tensor", local)
            whole = DTensor.from_local(rows, mesh, tensor.placements).redistribute(placements=[Replicate()]).to_local()
            assert whole.equal(expected[name]), name
    return []


@pytest.mark.filterwarnings(UNHASHABLE)
def test_parameters_that_are_gathered_in_float8_are_stored_as_they_are(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, train_in_float8, str(tmp_path))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_storage_writer_refuses_tensors_of_several_parts() -> None:
    with pytest.raises(CheckpointException, match=r"'w' cannot be stored: its class .*TwoTensor"):
        dcp.save({"w": TwoTensor(torch.ones(2), torch.ones(2))}, storage_writer=reshard.StorageWriter(MemoryStore()))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_dcp_with_tensors_of_several_parts_is_not_reported_as_damaged(tmp_path: Path) -> None:
    dcp.save({"w": TwoTensor(torch.ones(2), torch.zeros(2)), "x": torch.ones(3)}, checkpoint_id=tmp_path)
    with torch.serialization.safe_globals([TwoTensor]):
        for read in (lambda: reshard.open(tmp_path).read("w"), lambda: reshard.load({"w": torch.zeros(2)}, tmp_path)):
            with pytest.raises(
                errors.UnsupportedFormatError, match=r"'w' cannot be read: .* got a TwoTensor, .*dcp\.load"
            ):
                read()
        assert reshard.open(tmp_path).read("x").equal(torch.ones(3))
