"""Unusual destinations: tensor subclasses, tensors without dense memory, shared memory, and other dtypes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.testing._internal.two_tensor import TwoTensor

import reshard
from reshard import errors
from reshard.storage.reading import read_tensors
from reshard.storage.reading.executor import execute
from reshard.storage.stores.memory import MemoryStore
from tests.integration.wrappers import Deaf, Flattened, Logged, Refusing, Scaled, Tagged
from tests.ranks import RankPool

COMPLEX = torch.complex(torch.ones(3), torch.arange(3.0))


def saved(**tensors: torch.Tensor) -> MemoryStore:
    store = MemoryStore()
    reshard.save(tensors, store)
    return store


TWOS = torch.full((4, 4), 2.0, dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", [Scaled, Flattened])
@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: torch.nn.Parameter(t, requires_grad=False)])
def test_subclass_is_written_by_its_own_copy(kind: type[Scaled], wrap: Callable[[Scaled], Scaled]) -> None:
    destination = wrap(kind.of(4, 4))
    reshard.load({"w": destination}, saved(w=TWOS))
    assert destination.q.eq(2).all()
    reshard.open(saved(w=TWOS * 2)).read("w", out=destination)
    assert destination.q.eq(4).all()
    reshard.load({"w": destination}, saved(w=torch.full((4, 4), 3.0)))
    assert destination.q.eq(3).all()


def test_subclass_may_round_the_values() -> None:
    destination = Scaled.of(4, 4)
    reshard.load({"w": destination}, saved(w=TWOS * 0.1))
    assert destination.q.eq(0).all()


def test_subclass_of_two_tensors_is_written_completely() -> None:
    destination = TwoTensor(torch.zeros(4, 4), torch.zeros(4, 4))
    reshard.load({"w": destination}, saved(w=TWOS))
    assert destination.a.eq(2).all()
    assert destination.b.eq(2).all()


def test_subclass_with_dense_memory_is_written() -> None:
    tagged, logged = torch.zeros(4, 4).as_subclass(Tagged), Logged.of(4, 4)
    reshard.load({"t": tagged, "l": logged}, saved(t=TWOS, l=TWOS))
    assert tagged.as_subclass(torch.Tensor).eq(2).all()
    assert logged.as_subclass(torch.Tensor).eq(2).all()


@pytest.mark.parametrize("kind", [Deaf, Refusing])
def test_subclass_without_a_working_copy_is_refused(kind: type[Scaled]) -> None:
    plain = torch.zeros(4, 4)
    with pytest.raises(errors.DestinationError, match=rf"'w' is of the class .*{kind.__name__}, whose copy_"):
        reshard.load({"a": plain, "w": kind.of(4, 4)}, saved(a=TWOS, w=TWOS))
    assert plain.eq(0).all(), "no tensor was changed"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", [Scaled, Flattened])
def test_storage_reader_writes_to_a_subclass(kind: type[Scaled]) -> None:
    destination = kind.of(4, 4)
    dcp.load({"w": destination}, storage_reader=reshard.StorageReader(saved(w=TWOS)))
    assert destination.q.eq(2).all()
    with pytest.raises(CheckpointException, match=r"DestinationError: 'w' is of the class .*Deaf"):
        dcp.load({"w": Deaf.of(4, 4)}, storage_reader=reshard.StorageReader(saved(w=TWOS)))


def dtensor_of(local: torch.Tensor, mesh: DeviceMesh, dim: int) -> DTensor:
    """Return a DTensor that holds the local tensor itself. `from_local` would hold a view of it."""
    shape = [*local.shape]
    shape[dim] *= mesh.size()
    whole = torch.empty(shape, dtype=local.dtype, device="meta")
    spec = DTensorSpec(mesh, (Shard(dim),), TensorMeta(whole.shape, whole.stride(), whole.dtype))
    return DTensor(local, spec, requires_grad=False)


def load_sharded(uri: str) -> list[int]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    reshard.save({"w": distribute_tensor(torch.arange(32.0).reshape(8, 4), mesh, [Shard(0)])}, uri)
    rows = 8 // dist.get_world_size()
    found = []
    for load in (
        lambda state: reshard.load(state, uri),
        lambda state: dcp.load(state, storage_reader=reshard.StorageReader(uri)),
    ):
        local = Scaled.of(rows, 4)
        load({"w": dtensor_of(local, mesh, 0)})
        found.append(local.q.flatten().tolist())
    column = Scaled.of(8, 2)  # DCP reads this in several pieces
    dcp.load({"w": dtensor_of(column, mesh, 1)}, storage_reader=reshard.StorageReader(uri))
    assert column.q.tolist() == torch.arange(32).reshape(8, 4).chunk(2, 1)[dist.get_rank()].tolist()
    with pytest.raises(errors.DestinationError, match=r"'w' is of the class .*Deaf"):
        reshard.load({"w": dtensor_of(Deaf.of(rows, 4), mesh, 0)}, uri)
    with pytest.raises(errors.UnsupportedValueError, match=r"'w' cannot be stored: its class .*Scaled"):
        reshard.save({"w": dtensor_of(Scaled.of(rows, 4), mesh, 0)}, f"{uri}-2")
    with pytest.raises(CheckpointException, match=r"'w' cannot be stored: its class .*Scaled"):
        dcp.save({"w": dtensor_of(Scaled.of(rows, 4), mesh, 0)}, storage_writer=reshard.StorageWriter(f"{uri}-3"))
    both = {"emb": distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)])}
    both["head"] = distribute_tensor(torch.ones(8, 4), mesh, [Shard(1)])
    reshard.save(both, f"{uri}-4")
    tied = torch.zeros(8, 4)
    dcp.load({"emb": tied, "head": tied}, storage_reader=reshard.StorageReader(f"{uri}-4"))
    assert tied.eq(1).all()
    assert found[0] == found[1]
    return found[0]


def test_local_tensor_of_a_dtensor_may_be_a_subclass(ranks: RankPool, tmp_path: Path) -> None:
    found = ranks.run(2, load_sharded, str(tmp_path / "c"))
    assert found == [list(range(16)), list(range(16, 32))]


def unreadable() -> dict[str, tuple[Any, str]]:
    """Return tensors without values in dense memory, and words that the errors must contain."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        masked = torch.masked.masked_tensor(torch.ones(4, 4), torch.ones(4, 4, dtype=torch.bool))
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        jagged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
        quantised = torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, torch.quint8)
        csr = torch.ones(4, 4).to_sparse_csr()
    with FakeTensorMode():
        fake = torch.zeros(4, 4)
    freed = torch.ones(4, 4)
    freed.untyped_storage().resize_(0)
    return {
        "fake": (fake, "FakeTensor"),
        "masked": (masked, "MaskedTensor"),
        "lazy": (torch.nn.LazyLinear(4).weight, "UninitializedParameter"),
        "lazy buffer": (torch.nn.LazyBatchNorm1d().running_mean, "UninitializedBuffer"),
        "quantised": (quantised, "quantised"),
        "nested": (nested, "nested"),
        "jagged": (jagged, "nested"),
        "meta": (torch.zeros(4, 4, device="meta"), "meta device"),
        "sparse": (torch.ones(4, 4).to_sparse(), "torch.sparse_coo"),
        "csr": (csr, "torch.sparse_csr"),
        "freed": (freed, "no memory"),
        "zero": (torch._efficientzerotensor((4, 4)), "no memory"),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*unreadable()])
def test_tensors_without_dense_memory_are_refused_by_name(name: str) -> None:
    tensor, word = unreadable()[name]
    store = MemoryStore()
    with pytest.raises(errors.UnsupportedValueError, match=rf"'x\.w' cannot be stored: it .*{word}"):
        reshard.save({"x": {"w": tensor}}, store)
    assert not store.content
    plain = torch.zeros(4, 4)
    with pytest.raises(errors.DestinationError, match=rf"'w' .*{word}"):
        reshard.load({"a": plain, "w": tensor}, saved(w=TWOS, a=TWOS))
    assert plain.eq(0).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [name for name in unreadable() if "lazy" not in name and name not in ("nested", "jagged", "masked")]
)
def test_storage_writer_refuses_tensors_without_dense_memory(name: str) -> None:
    tensor, _ = unreadable()[name]
    with pytest.raises(CheckpointException, match=r"'w' cannot be stored"):
        dcp.save({"w": tensor}, storage_writer=reshard.StorageWriter(MemoryStore()))


def test_save_refuses_subclasses_that_encode_their_values() -> None:
    store = MemoryStore()
    with pytest.raises(errors.UnsupportedValueError, match=r"'x\.w' cannot be stored: its class"):
        reshard.save({"x": {"w": Scaled.of(4, 4)}, "v": torch.ones(2)}, store)
    assert not store.content


def test_subclass_with_dense_memory_is_saved() -> None:
    assert reshard.open(saved(w=TWOS.as_subclass(Tagged))).read("w").equal(TWOS)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_one_subclass_tensor_under_two_names(tmp_path: Path) -> None:
    shared = Scaled.of(4, 4)
    for other in (shared, shared.detach(), shared.q):
        stored = {"w": TWOS, "v": TWOS * 2 if other is not shared.q else torch.ones(4, 4, dtype=torch.int8)}
        with pytest.raises(errors.DestinationError, match="'w' and 'v'"):
            reshard.load({"w": shared, "v": other}, saved(**stored))
    reshard.load({"w": shared, "v": shared}, saved(w=TWOS, v=TWOS))
    assert shared.q.eq(2).all()
    scale = torch.tensor(1.0, dtype=torch.bfloat16)
    two = [Scaled(torch.zeros(4, 4, dtype=torch.int8), scale) for _ in range(2)]
    reshard.load({"w": two[0], "v": two[1]}, saved(w=TWOS, v=TWOS * 2))
    assert two[1].q.eq(4).all(), "two tensors may share a scale"


# Destinations that share memory


def pairs() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    whole = torch.zeros(8)
    return {
        "one tensor": (whole[:4], whole[:4]),
        "partly": (whole[:4], whole[3:7]),
        "another dtype": (whole[:4], whole.view(torch.int32)[:4]),
        "reversed strides": (whole.reshape(2, 4)[:, :2], whole.reshape(2, 4)[:, :2].t()),
        "interleaved": (whole[::2], whole[:4]),
    }


@pytest.mark.parametrize("name", [*pairs()])
def test_destinations_that_share_memory_are_refused(name: str) -> None:
    emb, head = pairs()[name]
    stored = {"emb": torch.ones(emb.shape, dtype=emb.dtype), "head": torch.full(head.shape, 2, dtype=head.dtype)}
    with pytest.raises(errors.DestinationError, match="'emb' and 'head'"):
        reshard.load({"emb": emb, "head": head}, saved(**stored))
    assert emb.eq(0).all()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_storage_reader_refuses_destinations_that_share_memory() -> None:
    shared = torch.zeros(4)
    with pytest.raises(CheckpointException, match=r"DestinationError: .*'emb' and 'head'"):
        dcp.load(
            {"emb": shared, "head": shared},
            storage_reader=reshard.StorageReader(saved(emb=torch.ones(4), head=torch.zeros(4))),
        )


def test_destination_that_overlaps_itself_is_refused() -> None:
    for tensor in (torch.zeros(16).as_strided((4, 4), (1, 1)), torch.zeros(8).unfold(0, 4, 2)):
        with pytest.raises(errors.DestinationError, match="'w' overlaps itself"):
            reshard.load({"w": tensor}, saved(w=torch.ones(tensor.shape)))
    with pytest.raises(errors.DestinationError, match="'w' is expanded"):
        reshard.load({"w": torch.zeros(1).expand(4)}, saved(w=torch.ones(4)))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("format", ["reshard", "dcp", "torch"])
def test_tied_weights_with_equal_values_load(format: str, tmp_path: Path) -> None:
    weight = torch.randn(300, 70)
    state = {"emb": weight, "head": weight}
    uri = str(tmp_path / "c")
    if format == "torch":
        torch.save(state, f"{uri}.pt")
        uri += ".pt"
    elif format == "dcp":
        dcp.save(state, checkpoint_id=uri, no_dist=True)
    else:
        reshard.save(state, uri)
    shared = torch.zeros(300, 70)
    report = reshard.load({"emb": shared, "head": shared}, uri)
    assert shared.equal(weight)
    if format == "reshard":
        assert report.total.bytes_fetched < 1.5 * weight.nbytes, "the values are read once"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_values_for_tied_destinations_are_compared_if_there_are_no_checksums(tmp_path: Path) -> None:
    dcp.save({"emb": torch.ones(4), "head": torch.zeros(4)}, checkpoint_id=tmp_path / "c", no_dist=True)
    shared = torch.zeros(4)
    with pytest.raises(errors.DestinationError, match="'emb' and 'head'"):
        reshard.load({"emb": shared, "head": shared}, tmp_path / "c")


def test_destinations_may_be_disjoint_views_of_one_tensor() -> None:
    fused = torch.zeros(6, 8)
    q, k = fused[:, :4], fused[:, 4:]
    reshard.load({"q": q, "k": k}, saved(q=torch.ones(6, 4), k=torch.full((6, 4), 2.0)))
    assert q.eq(1).all()
    assert k.eq(2).all()


def test_missing_name_of_a_tied_pair_names_the_other() -> None:
    shared = torch.zeros(4)
    with pytest.raises(errors.MissingTensorError, match="'head' shares its memory with 'emb'"):
        reshard.load({"emb": shared, "head": shared}, saved(emb=torch.ones(4)))
    report = reshard.load({"emb": shared, "head": shared}, saved(emb=torch.ones(4)), allow_missing="head")
    assert report.missing_keys == ("head",)
    assert shared.eq(1).all()


@pytest.mark.parametrize("budget", [None, 1000])
def test_integer_that_does_not_fit_changes_no_tensor_under_any_budget(budget: int | None) -> None:
    state = {str(i): torch.full((1000,), i) for i in range(5)}
    good = {name: torch.zeros(1000, dtype=torch.int32) for name in state}
    reshard.load(good, saved(**state), budget_bytes=budget)
    assert all(good[name].eq(int(name)).all() for name in state)
    state["4"][7] = 2**40
    bad = {name: torch.zeros(1000, dtype=torch.int32) for name in state}
    with pytest.raises(errors.DtypeError, match=r"'4' .*: 1099511627776 at \[7\] does not fit"):
        reshard.load(bad, saved(**state), budget_bytes=budget)
    assert all(tensor.eq(0).all() for tensor in bad.values())


def test_integers_of_a_tensor_that_exceeds_the_budget_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = torch.arange(120_000).reshape(300, 4, 100) % 100
    allocated: list[int] = []
    empty = torch.empty

    def record(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = empty(*args, **kwargs)
        allocated.append(made.nbytes if made.dtype is torch.int64 else 0)
        return made

    for to, budget in ((torch.int8, 200_000), (torch.float16, 10_000), (torch.int32, 1_000)):
        destination = torch.zeros(stored.shape, dtype=to)
        store = saved(n=stored)
        with monkeypatch.context() as context:
            context.setattr(torch, "empty", record)
            reshard.load({"n": destination}, store, budget_bytes=budget)
        assert destination.long().equal(stored)
        assert 0 < max(allocated) <= budget
        allocated.clear()


@pytest.mark.parametrize("budget", [None, 500])
def test_integer_that_does_not_fit_is_named_by_its_position_in_the_tensor(budget: int | None) -> None:
    stored = torch.zeros(50, 40, dtype=torch.int64)
    stored[33, 7] = 1000
    store = saved(n=stored)
    with pytest.raises(errors.DtypeError, match=r"1000 at \[33, 7\] does not fit"):
        reshard.load({"n": torch.zeros(50, 40, dtype=torch.int8)}, store, budget_bytes=budget)
    lower = torch.zeros(25, 40, dtype=torch.int8)
    with pytest.raises(errors.DtypeError, match=r"1000 at \[33, 7\] does not fit"):
        reshard.open(store).read("n", reshard.Box((25, 0), (25, 40)), out=lower)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_comparison_of_tied_weights_uses_the_options_of_the_load(tmp_path: Path) -> None:
    weight = torch.randn(500, 100)
    dcp.save({"emb": weight, "head": weight.clone()}, checkpoint_id=tmp_path / "c", no_dist=True)
    shared = torch.zeros(500, 100)
    with patch.object(read_tensors, "execute", wraps=execute) as executed:
        report = reshard.load({"emb": shared, "head": shared}, tmp_path / "c", budget_bytes=50_000)
    assert {call.kwargs["budget_bytes"] for call in executed.call_args_list} == {50_000}
    assert max(sum(tensor.nbytes for tensor in call.args[3]) for call in executed.call_args_list[:-1]) <= 50_000
    assert report.total.bytes_fetched >= 3 * weight.nbytes, "twice to compare them, and once to load them"


# Casts


@pytest.mark.parametrize(
    ("value", "stored", "to"),
    [
        (300, torch.int64, torch.uint8),
        (-1, torch.int64, torch.uint8),
        (-1, torch.int8, torch.uint8),
        (200, torch.uint8, torch.int8),
        (2**31, torch.int64, torch.int32),
        (-(2**31) - 1, torch.int64, torch.int32),
        (2**40, torch.int64, torch.int16),
        (2**16, torch.uint32, torch.uint16),
        (1001, torch.int64, torch.bfloat16),
        (70000, torch.int32, torch.float16),
        (2049, torch.int16, torch.float16),
        (2**24 + 1, torch.int64, torch.float32),
        (2**53 + 1, torch.int64, torch.float64),
        (-(2**24) - 1, torch.int32, torch.complex64),
    ],
)
def test_integer_that_does_not_fit_is_refused(value: int, stored: torch.dtype, to: torch.dtype) -> None:
    other, destination = torch.zeros(3), torch.zeros(2, 3, dtype=to)
    tensor = torch.zeros(2, 3, dtype=stored)
    tensor[1, 2] = value
    store = saved(a=torch.ones(3), n=tensor)
    with pytest.raises(
        errors.DtypeError, match=rf"'n' is stored as {stored}, .* {to}: {value} at \[1, 2\] does not fit"
    ):
        reshard.load({"a": other, "n": destination}, store)
    assert other.eq(0).all(), "no tensor was changed"
    assert destination.eq(0).all()
    with pytest.raises(errors.DtypeError, match="does not fit"):
        reshard.open(store).read("n", out=destination)


@pytest.mark.parametrize(
    ("value", "stored", "to"),
    [
        (255, torch.int64, torch.uint8),
        (-128, torch.int64, torch.int8),
        (2**31 - 1, torch.int64, torch.int32),
        (1000, torch.int64, torch.bfloat16),
        (2048, torch.int16, torch.float16),
        (2**24, torch.int64, torch.float32),
        (2**60, torch.int64, torch.float32),
        (True, torch.bool, torch.int8),
        (7, torch.uint8, torch.int64),
    ],
)
def test_integers_that_fit_are_cast(value: int, stored: torch.dtype, to: torch.dtype) -> None:
    destination = torch.zeros((), dtype=to)
    report = reshard.load({"n": destination}, saved(n=torch.tensor(value, dtype=stored)))
    assert destination.item() == value
    assert report.cast == ()


def test_lossy_casts_are_reported_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    store = saved(w=torch.tensor([70000.0, 1.0]), v=torch.ones(2, dtype=torch.bfloat16), u=torch.ones(2))
    state = {
        "w": torch.zeros(2, dtype=torch.float16),
        "v": torch.zeros(2),
        "u": torch.zeros(2, dtype=torch.bfloat16),
    }
    report = reshard.load(state, store)
    assert set(report.cast) == {("w", "float32", "float16"), ("u", "float32", "bfloat16")}
    assert caplog.text.count("2 tensors were cast to fewer bits") == 1
    assert "2 tensors cast to fewer bits" in report._repr_html_()


@pytest.mark.parametrize(
    ("stored", "to", "loses"),
    [
        (torch.float64, torch.float32, True),
        (torch.float16, torch.bfloat16, True),
        (torch.bfloat16, torch.float16, True),
        (torch.float32, torch.float8_e4m3fn, True),
        (torch.complex128, torch.complex64, True),
        (torch.bfloat16, torch.float32, False),
        (torch.float8_e5m2, torch.bfloat16, False),
        (torch.float32, torch.complex64, False),
    ],
)
def test_report_lists_casts_that_lose_bits(stored: torch.dtype, to: torch.dtype, *, loses: bool) -> None:
    report = reshard.load({"w": torch.zeros(2, dtype=to)}, saved(w=torch.ones(2).to(stored)))
    assert bool(report.cast) == loses


def test_dtype_casts_weights_but_not_counters(tmp_path: Path) -> None:
    store = saved(w=torch.ones(4), step=torch.tensor(1001.0), n=torch.tensor([5]))
    tensors = reshard.open(store).load_rank(reshard.Layout(1), 0, dtype=torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "w": torch.bfloat16,
        "step": torch.float32,
        "n": torch.int64,
    }
    reshard.convert(store, tmp_path / "c", dtype=torch.bfloat16)
    converted = reshard.open(tmp_path / "c")
    assert converted.tensors["w"].dtype is torch.bfloat16
    assert converted.read("step").item() == 1001.0


@pytest.mark.parametrize(
    ("weight", "scale"),
    [
        ("m.weight", "m.weight_scale_inv"),
        ("m.weight", "m.weight_scale"),
        ("m.weight", "m.scale"),
        ("m.weight", "m.weight.SCB"),
        ("m.weight", "m.SCB"),
        ("m.qdata", "m.qdata_scales"),
        ("w", "w_scale"),
        ("m.qdata", "m.scale"),
        ("m.w._data", "m.w._scale"),
        ("m.int_data", "m.scale"),
        ("m.w_q", "m.w_scale"),
        ("mlp.down_proj_blocks", "mlp.down_proj_scales"),
        ("m.qweight", "m.scales"),
        ("m.weight", "m.weight_quantizer._amax"),
        ("m.weight", "m.weight.quant_state.bitsandbytes__nf4"),
        ("m.weight", "m.weight.absmax"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_quantised_weights_with_scales_are_not_cast(
    weight: str, scale: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    store = saved(**{weight: torch.ones(4, 4).to(dtype), scale: torch.ones(1)})
    message = rf"'{weight}' is quantised: .*'{scale}' has its scale"
    with pytest.raises(errors.DtypeError, match=message):
        reshard.load({weight: torch.zeros(4, 4, dtype=torch.bfloat16)}, store)
    if dtype is not torch.int8:  # dtype= casts floating-point tensors only
        with pytest.raises(errors.DtypeError, match=message):
            reshard.open(store).load_rank(reshard.Layout(1), 0, dtype=torch.bfloat16)
        with pytest.raises(errors.DtypeError, match=message):
            reshard.convert(store, tmp_path / "c", dtype=torch.bfloat16)
    destination = torch.zeros(4, 4, dtype=dtype)
    reshard.load({weight: destination}, store)
    assert destination.float().eq(1).all()


def test_float8_weights_without_scales_are_cast() -> None:
    for other in ("m.input_scale", "m.k_scale", "n.weight_scale", "m.norm.weight_scale", "m.bias", "mm.scale"):
        store = saved(**{"m.weight": torch.ones(4).to(torch.float8_e4m3fn), other: torch.ones(1)})
        destination = torch.zeros(4, dtype=torch.bfloat16)
        reshard.load({"m.weight": destination}, store)
        assert destination.eq(1).all()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("codec", ["zstd", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autograd_notices_a_load(codec: str, dtype: torch.dtype) -> None:
    store = MemoryStore()
    reshard.save({"w": torch.ones(30, 20)}, store, codec=codec)
    for load in (
        lambda p: reshard.load({"w": p}, store),
        lambda p: reshard.open(store).read("w", out=p.detach()),
        lambda p: dcp.load({"w": p}, storage_reader=reshard.StorageReader(store), no_dist=True),
    ):
        parameter = torch.nn.Parameter(torch.zeros(30, 20, dtype=dtype))
        result = (parameter * parameter).sum()
        load(parameter)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.backward()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_the_memory_of_tensors_can_be_resized_after_a_save_and_a_load(codec: str, tmp_path: Path) -> None:
    """As FSDP1 does, which frees the memory of its parameters so."""
    values = {
        "w": torch.randn(300, 40),
        "half": torch.randn(7, 5).bfloat16(),
        "ids": torch.arange(9),
        "complex": COMPLEX,
    }
    saved_state = {name: value.clone() for name, value in values.items()}
    reshard.save(saved_state, tmp_path / "native", codec=codec)
    reshard.async_save(saved_state, tmp_path / "later", codec=codec, background="thread").result()
    dcp.save(saved_state, checkpoint_id=tmp_path / "dcp")
    states = [saved_state]
    for folder in ("native", "dcp"):
        states.append({name: torch.zeros_like(value) for name, value in values.items()})
        reshard.load(states[-1], tmp_path / folder)
        states.append({"w": torch.zeros(40, 300).t(), "half": torch.zeros(7, 5), "ids": torch.zeros(9)})
        reshard.load(states[-1], tmp_path / folder)
        checkpoint = reshard.open(tmp_path / folder)
        states += [checkpoint.state_dict(), {"w": checkpoint.read("w")}, checkpoint.load_rank(reshard.Layout(1), 0)]
        with checkpoint.lazy() as weights:
            states.append({"w": torch.zeros(300, 40).copy_(weights["w"])})
    for state in states:
        for name, tensor in state.items():
            assert torch.equal(tensor.to(values[name].dtype), values[name]), name
            tensor.untyped_storage().resize_(0)
            tensor.untyped_storage().resize_(values[name].nbytes * 4)
