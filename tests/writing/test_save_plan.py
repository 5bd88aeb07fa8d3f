"""Rank 0 plans a save: every shard is written once, and ranks that disagree are found."""

from __future__ import annotations

import itertools
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.errors import ArgumentError
from reshard.planner.box import Box
from reshard.storage.tensors.state_dict import Path
from reshard.storage.writing import save_plan
from reshard.storage.writing.agreement import EntryDescription, pack_descriptions, unpack_descriptions
from reshard.storage.writing.save_plan import HeldShards, plan_save

VALUE = Box((), ())


class Rank:
    """What one rank holds."""

    def __init__(self) -> None:
        self.described: dict[str, EntryDescription] = {}
        self.boxes: list[list[Box]] = []
        self.digests: list[tuple[int, Box, int]] = []

    def add(self, name: str, described: EntryDescription, boxes: list[Box], digest: int | None = None) -> None:
        if digest is not None:
            self.digests += [(len(self.boxes), box, digest) for box in boxes]
        self.described[name] = described
        self.boxes.append(boxes)

    @property
    def held(self) -> HeldShards:
        return HeldShards.of(self.described, self.boxes, self.digests)

    @property
    def shards(self) -> list[tuple[str, Box]]:
        return [(name, box) for name, boxes in zip(self.described, self.boxes, strict=True) for box in boxes]


def tensor(*shape: int, dtype: str = "float32") -> EntryDescription:
    return EntryDescription(("t",), "sharded tensor", dtype, shape)


def written(ranks: list[Rank]) -> list[list[tuple[str, Box]]]:
    """Return the shards that each rank writes."""
    plan = plan_save([rank.held for rank in ranks])
    found = []
    for rank, mask in zip(ranks, plan.masks, strict=True):
        bits = np.unpackbits(np.frombuffer(mask, np.uint8))
        assert len(bits) <= -(-len(rank.shards) // 8) * 8
        found.append([rank.shards[at] for at in np.flatnonzero(bits).tolist()])
    return found


def rows(shape: tuple[int, ...], parts: int) -> list[Box]:
    """Cut a shape along its first dimension, as FSDP does. The last parts may be empty."""
    n, chunk = shape[0], -(-shape[0] // parts)
    cuts = [min(at * chunk, n) for at in range(parts + 1)]
    return [Box.whole(shape).with_extent(0, low, high) for low, high in itertools.pairwise(cuts)]


@given(st.randoms(use_true_random=False))
def test_each_shard_is_written_once_by_a_rank_that_holds_it(random: Random) -> None:
    size = random.randint(1, 6)
    ranks = [Rank() for _ in range(size)]
    expected: dict[tuple[str, Box], list[int]] = {}
    for number in range(random.randint(0, 6)):
        name, shape = f"t{number}", tuple(random.choice([0, 1, 3, 8, 400]) for _ in range(random.randint(0, 3)))
        parts = random.choice([part for part in range(1, size + 1) if size % part == 0])
        boxes = rows(shape, parts) if shape else [VALUE]
        for at, rank in enumerate(ranks):
            box = boxes[at % len(boxes)]
            rank.add(name, EntryDescription((name,), "sharded tensor", "float32", shape), [box])
            if box.numel:
                expected.setdefault((name, box), []).append(at)
        for at in random.sample(range(size), random.randint(0, size)):
            ranks[at].add(f"{name}.value{at}", EntryDescription((name + "s", at), "value"), [VALUE], 1)
            expected[f"{name}.value{at}", VALUE] = [at]
    found = written(ranks)
    assert sorted((shard for of_rank in found for shard in of_rank), key=str) == sorted(expected, key=str)
    for at, of_rank in enumerate(found):
        for name, box in of_rank:
            assert at in expected[name, box]
            if box.numel * 4 <= save_plan.SMALL_REPLICA_BYTES:
                assert at == min(expected[name, box])


def test_large_replicas_are_spread_over_the_ranks() -> None:
    ranks = [Rank() for _ in range(4)]
    for number in range(8):
        for rank in ranks:
            rank.add(
                f"t{number}",
                EntryDescription((f"t{number}",), "tensor", "float32", (64, 1024)),
                [Box.whole((64, 1024))],
            )
    assert [len(of_rank) for of_rank in written(ranks)] == [2] * 4


def two(first: list[Box], second: list[Box], *, shape: tuple[int, ...] = (4, 4)) -> list[HeldShards]:
    ranks = [Rank(), Rank()]
    for rank, boxes in zip(ranks, (first, second), strict=True):
        rank.add("t", tensor(*shape), boxes)
    return [rank.held for rank in ranks]


TOP, BOTTOM, ALL = Box((0, 0), (2, 4)), Box((2, 0), (2, 4)), Box((0, 0), (4, 4))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([TOP], [Box((3, 0), (1, 4))], "hold 12 elements of 't', which has 16"),
        ([TOP], [Box((1, 0), (2, 4))], "shards overlap or leave gaps"),
        ([TOP], [Box((1, 0), (3, 4))], "hold 20 elements of 't', which has 16"),
        ([ALL], [TOP, BOTTOM], "hold 32 elements of 't', which has 16"),
        ([ALL], [TOP], "hold 24 elements of 't', which has 16"),
        ([TOP], [ALL], "hold 24 elements of 't', which has 16"),
        ([TOP], [Box((3, 0), (2, 4))], r"rank 1 holds a shard of shape \[2, 4\] at \[3, 0\]"),
        ([], [], "no rank of the process group holds a part of 't'"),
    ],
)
def test_shards_that_do_not_tile_their_tensor_are_refused(first: list[Box], second: list[Box], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        plan_save(two(first, second))


def test_a_rank_that_disagrees_is_named() -> None:
    ranks = [Rank() for _ in range(4)]
    for at, rank in enumerate(ranks):
        rank.add("t", tensor(4, 4, dtype="bfloat16" if at == 2 else "float32"), [ALL])
    with pytest.raises(ArgumentError, match=r"disagree about 't': rank 0 has .*float32.*, but rank 2 has .*bfloat16"):
        plan_save([rank.held for rank in ranks])


def test_a_dict_that_is_empty_on_one_rank_is_not_saved_if_another_rank_has_items() -> None:
    ranks = [Rank(), Rank()]
    ranks[0].add("d", EntryDescription(("d",), "empty dict"), [VALUE], 5)
    ranks[0].add("t", tensor(4, 4), [TOP])
    ranks[1].add("t", tensor(4, 4), [BOTTOM])
    ranks[1].add("d.a", EntryDescription(("d", "a"), "value"), [VALUE], 6)
    assert written(ranks) == [[("t", TOP)], [("t", BOTTOM), ("d.a", VALUE)]]
    plan = plan_save([rank.held for rank in ranks])
    assert plan.differing([rank.held.digests for rank in ranks]) == []


def test_small_entries_that_differ_are_listed() -> None:
    ranks = [Rank() for _ in range(3)]
    for at, rank in enumerate(ranks):
        for name, digest in (("same", 7), ("step", 7 + (at == 2)), ("seed", 2**64 - 1 - at)):
            rank.add(name, EntryDescription((name,), "value"), [VALUE], digest)
        rank.add(f"own{at}", EntryDescription((f"own{at}",), "value"), [VALUE], at)
    plan = plan_save([rank.held for rank in ranks])
    assert plan.differing([rank.held.digests for rank in ranks]) == ["step", "seed"]


def test_ranks_without_entries_take_part() -> None:
    assert written([Rank(), Rank()]) == [[], []]


@pytest.mark.parametrize("path", [("a", 3, "b"), ("\ud800", "é"), ("a" * 500,)])
def test_descriptions_are_the_same_after_packing(path: Path) -> None:
    described = {"n": EntryDescription(path, "tensor", "int8", (2, 0)), "v": EntryDescription((*path, "w"), "value")}
    assert unpack_descriptions(pack_descriptions(described)) == described
    assert pack_descriptions(described) == pack_descriptions(dict(described))


def test_first_elements_order_boxes() -> None:
    boxes = [Box((i, j), (1, 1)) for i in range(3) for j in range(4)]
    assert [box.first_element((3, 4)) for box in boxes] == list(range(12))
