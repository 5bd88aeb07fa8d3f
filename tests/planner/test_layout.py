import itertools
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate as TorchReplicate
from torch.distributed.tensor import Shard as TorchShard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard as TorchStridedShard

from reshard.planner.box import Box
from reshard.planner.errors import LayoutError
from reshard.planner.layout import (
    Layout,
    Mesh,
    Placement,
    Replicate,
    Shard,
    StridedShard,
    held_tensor,
    local_tensor,
    matches,
    unused_rules,
)
from tests.planner.boxes import paint


def torch_placement(placement: Placement) -> object:
    if isinstance(placement, StridedShard):
        return TorchStridedShard(placement.dim, split_factor=placement.split_factor)
    return TorchShard(placement.dim) if isinstance(placement, Shard) else TorchReplicate()


def placements(ndim: int) -> st.SearchStrategy[Placement]:
    dims = st.integers(0, ndim - 1)
    return st.one_of(st.just(Replicate()), st.builds(Shard, dims), st.builds(StridedShard, dims, st.integers(1, 4)))


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Placement, ...]]:
    shape = tuple(draw(st.lists(st.integers(0, 13), min_size=1, max_size=3)))
    mesh = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    return shape, mesh, tuple(draw(placements(len(shape))) for _ in mesh)


@given(cases())
def test_local_boxes_agree_with_dtensor(case: tuple[tuple[int, ...], tuple[int, ...], tuple[Placement, ...]]) -> None:
    """Local shapes always agree. Offsets agree if one offset can describe the shard. All shards together tile the
    tensor."""
    shape, mesh, places = case
    held: list[Box] = []
    torch_places = [torch_placement(placement) for placement in places]
    for coordinate in itertools.product(*map(range, mesh)):
        local = local_tensor(shape, mesh, coordinate, places)
        expected_shape, offset = _compute_local_shape_and_global_offset(
            shape,
            mesh,
            list(coordinate),
            torch_places,  # type: ignore[arg-type]
        )
        assert local.shape == tuple(expected_shape)
        if local.boxes and 0 not in local.shape:
            assert local.boxes[0].offsets == tuple(offset)
        assert sum(box.numel for box in local.boxes) == Box.whole(local.shape).numel
        replicas = [at for at, place in zip(coordinate, places, strict=True) if isinstance(place, Replicate)]
        if not any(replicas):
            held += local.boxes
    if 0 not in shape:
        assert (paint(shape, held) == 1).all()


@pytest.mark.parametrize("n", range(1, 40))
@pytest.mark.parametrize(("dp", "tp"), [(2, 2), (3, 2), (2, 4), (4, 3)])
def test_fsdp_over_tp_splits_the_part_of_tp(n: int, dp: int, tp: int) -> None:
    places = (StridedShard(0, tp), Shard(0))
    held: list[Box] = []
    for at_dp, at_tp in itertools.product(range(dp), range(tp)):
        local = held_tensor((n, 3), (dp, tp), (at_dp, at_tp), places)
        rows = range(n)[slice(*chunk(n, tp, at_tp))]
        start, stop = chunk(len(rows), dp, at_dp)
        assert local.shape == (stop - start, 3)
        assert local.boxes == ((Box((rows[start], 0), (stop - start, 3)),) if stop > start else ())
        if n % (dp * tp) == 0:
            assert local == local_tensor((n, 3), (dp, tp), (at_dp, at_tp), places)
        held += local.boxes
    assert (paint((n, 3), held) == 1).all()


def chunk(n: int, parts: int, at: int) -> tuple[int, int]:
    """Return the range of part `at`, as torch.chunk splits n elements."""
    size = -(-n // parts)
    return min(at * size, n), min((at + 1) * size, n)


def test_strided_split_of_uneven_parts_returns_several_boxes() -> None:
    local = local_tensor((8,), (2,), (0,), (StridedShard(0, 2),))
    assert local.shape == (4,)
    assert local.boxes == (Box((0,), (2,)), Box((4,), (2,)))
    assert local.local_offsets == ((0,), (2,))


def test_tensor_parallel_words_become_placements() -> None:
    layout = Layout({"dp": 2, "tp": 4}, {"layers.*.up": "colwise", "layers.*.down": "rowwise", "head": "replicate"})
    assert layout.placements("layers.0.up.weight", 2) == (Replicate(), Shard(-2))
    assert layout.placements("layers.0.up.bias", 1) == (Replicate(), Shard(0))
    assert layout.placements("layers.11.down.weight", 2) == (Replicate(), Shard(-1))
    assert layout.placements("layers.11.down.bias", 1) == (Replicate(), Replicate())
    assert layout.placements("norm.weight", 1) == (Replicate(), Replicate())
    assert layout.local("layers.0.down.weight", (8, 16), rank=5).boxes == (Box((0, 4), (8, 4)),)
    assert layout.local("layers.0.up.weight", (8, 16), rank=6).boxes == (Box((4, 0), (2, 16)),)


def test_first_matching_pattern_applies() -> None:
    layout = Layout(2, {"*.up": "colwise", "*": Shard(1)})
    assert layout.placements("a.up.weight", 2) == (Shard(-2),)
    assert layout.placements("a.upper.weight", 2) == (Shard(1),)


@given(
    st.lists(st.sampled_from(["a", "a.b", "b", "*", "a.*", "*.b", "a.b.c", "?.b", "c", "[ab].b.c"]), unique=True),
    st.sampled_from(["a", "a.b", "a.b.c", "b.b.c", "c", "d.e", "b"]),
)
def test_rules_with_and_without_special_characters_apply_in_their_order(patterns: list[str], name: str) -> None:
    layout = Layout({"tp": 2}, {pattern: Shard(at) for at, pattern in enumerate(patterns)})
    first = next((at for at, pattern in enumerate(patterns) if matches(pattern, name)), None)
    expected = Replicate() if first is None else Shard(first)
    assert layout.placements(name, 10) == (expected,)


def test_unused_rules_match_no_name() -> None:
    names = ["model.layers.0.up.weight", "model.layers.1.up.weight", "model.norm", "a[0]"]
    rules = {
        "*.up": "colwise",
        "*.up.weight": "colwise",
        "model.layers.?.up": "colwise",
        "model.layers": "colwise",
        "model": "colwise",
        "model.norm": "replicate",
        "layers.*.up": "colwise",
        "*.layers.*.up": "colwise",
    }
    assert unused_rules(Layout(2, rules), names) == []
    wrong = {"norm": "replicate", "*.upp": "colwise", "layers.*.down": "rowwise", "*.layers.*.down": "rowwise"}
    assert unused_rules(Layout(2, {**rules, **wrong}), names) == list(wrong)
    assert unused_rules(Layout(2, wrong), []) == list(wrong)
    assert unused_rules(Layout(2), names) == []


@given(
    st.lists(st.text("ab.*?[]", min_size=1, max_size=5), max_size=5, unique=True),
    st.lists(st.text("ab.*?[]", max_size=5), max_size=5, unique=True),
)
def test_unused_rules_agree_with_matches(names: list[str], patterns: list[str]) -> None:
    used = {pattern.removeprefix("*.") for pattern in patterns if any(matches(pattern, name) for name in names)}
    expected = [pattern for pattern in patterns if pattern.removeprefix("*.") not in used]
    assert unused_rules(Layout(2, dict.fromkeys(patterns, "colwise")), names) == expected


def test_a_mesh_of_replicas_is_not_cut_by_words_of_tensor_parallelism() -> None:
    assert Layout({"dp": 2}, {"a": "replicate"}).placements("a", 2) == (Replicate(),)
    for rule in (Shard(0), {"fsdp": Shard(0)}, [Shard(0)]):
        assert Layout({"fsdp": 2}, {"a": rule}).placements("a", 2) == (Shard(0),)
    assert Layout({"model": 2}, {"a": "colwise"}).placements("a", 2) == (Shard(-2),)


def test_rules_may_name_mesh_dimensions() -> None:
    layout = Layout({"dp": 2, "tp": 2}, {"a": [Shard(0), Shard(1)], "b": {"dp": Shard(0)}, "c": Shard(-1)})
    assert layout.placements("a", 2) == (Shard(0), Shard(1))
    assert layout.placements("b", 2) == (Shard(0), Replicate())
    assert layout.local("c", (4, 6), rank=1).boxes == (Box((0, 3), (4, 3)),)


def test_layout_can_be_pickled() -> None:
    layout = Layout({"tp": 2}, {"*.up": "colwise"})
    assert pickle.loads(pickle.dumps(layout)) == layout  # noqa: S301


@pytest.mark.parametrize(
    ("mesh", "rules", "message"),
    [
        (2, {"a": "columnwise"}, "unknown tensor-parallel word 'columnwise'"),
        ({"x": 2, "y": 2}, {"a": "colwise"}, "none of them is named 'tp'"),
        (
            {"dp": 2},
            {"a": "colwise"},
            "'colwise' is a word of tensor parallelism, but the only dimension of the mesh is",
        ),
        ({"fsdp": 2}, {"a": "rowwise"}, r"name it 'tp', or pass a placement such as \{'fsdp': Shard\(0\)\}"),
        ({"dp": 2, "tp": 2}, {"a": [Shard(0)]}, "has 2 dimensions, got 1 placements"),
        ({"dp": 2, "tp": 2}, {"a": {"pp": Shard(0)}}, "'pp'"),
        ({}, {}, "a mesh needs"),
        ("tp", {}, "a mesh is a size"),
        (2, {"a": 3}, "expected a tensor-parallel word, .* got 3"),
        (2, {"a": [object()]}, "expected a tensor-parallel word"),
        (0, {}, "1 rank or more"),
    ],
)
def test_malformed_layout_raises_layout_error(mesh: object, rules: dict[str, object], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        Layout(mesh, rules)  # type: ignore[arg-type]


def test_layout_that_does_not_fit_raises_an_error_with_the_tensor_name() -> None:
    layout = Layout(2, {"a": Shard(2)})
    with pytest.raises(LayoutError, match=r"'a.weight'.*Shard\(dim=2\).*\(4, 4\)"):
        layout.local("a.weight", (4, 4), rank=0)
    with pytest.raises(LayoutError, match="rank 2 is not in the mesh tp 2"):
        layout.local("b", (4, 4), rank=2)
    assert Mesh.of({"dp": 2, "tp": 3}).coordinate(4) == (1, 1)


@pytest.mark.parametrize(
    ("names", "sizes"), [((1,), ("tp",)), (("tp",), ("2",)), (("tp",), (2.0,)), (("tp",), (None,)), ((None,), (2,))]
)
def test_mesh_with_wrong_types_raises_layout_error(names: Any, sizes: Any) -> None:
    with pytest.raises(LayoutError, match="names that are strings and sizes that are integers"):
        Mesh(names, sizes)


def test_layout_can_be_pickled_without_what_was_looked_up() -> None:
    layout = Layout({"pp": 2, "tp": 2}, {"*.up": "colwise"}, {"a.up": 0})
    before = pickle.dumps(layout)
    assert layout.placements("a.up", 2) == layout.placements("a.up", 2)
    assert pickle.dumps(layout) == before
    again = pickle.loads(before)  # noqa: S301
    assert again == layout
    assert again.placements("a.up", 2) == layout.placements("a.up", 2)
    assert [again.holds("a.up", rank) for rank in range(4)] == [True, True, False, False]
