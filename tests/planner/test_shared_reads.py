"""Which rank reads what several ranks need: every rank computes the same, and gets every byte that it needs."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.planner import shared_reads
from reshard.planner.shared_reads import Needs, RankShare, ReadDivision, UnitPart

Row = tuple[int, int, int, int, int, int, int]
"""object, start, stop, tensor, number of runs, bytes of a run, stride"""


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_reads, "MIN_UNIT_BYTES", 4)
    monkeypatch.setattr(shared_reads, "MAX_UNIT_GAP_BYTES", 3)
    monkeypatch.setattr(shared_reads, "REQUEST_COST_BYTES", 9)


def needs_of(rows: list[Row]) -> Needs:
    columns = np.array(rows, np.int64).reshape(-1, 7).T
    used, objects = np.unique(columns[0], return_inverse=True)
    names = tuple(f"object-{at}" for at in used.tolist())
    return Needs(names, objects.astype(np.int64), *(columns[at] for at in range(1, 7)))


def random_chunks(random: Random) -> list[tuple[int, int, int, int]]:
    chunks = []
    for number in range(random.randint(1, 3)):
        at = 0
        for tensor in range(random.randint(0, 8)):
            size = random.choice([3, 8, 16, 40])
            at += random.choice([0, 0, 2, 9])
            chunks.append((number, at, at + size, number * 10 + tensor))
            at += size
    return chunks


def random_needs(chunks: list[tuple[int, int, int, int]], random: Random) -> Needs:
    """Return some of the chunks, some pages of chunks, and some columns of chunks with rows of 4 bytes."""
    rows: list[Row] = []
    for number, start, stop, tensor in chunks:
        kind = random.choice(["none", "whole", "whole", "pages", "columns"])
        size = stop - start
        if kind == "whole":
            rows.append((number, start, stop, tensor, 1, size, size))
        elif kind == "pages" and size > 3:
            rows.append((number, start + 1, stop - 1, tensor, 1, size - 2, size - 2))
        elif kind == "columns" and size >= 8:
            width = random.choice([1, 2])
            first, count = start + random.randrange(0, 4, width), size // 4
            rows.append((number, first, first + (count - 1) * 4 + width, tensor, count, width, 4))
    if rows and random.random() < 0.3:
        rows.append(random.choice(rows))  # a chunk that two boxes overlap
    return needs_of(rows)


def bytes_of(part: UnitPart) -> set[int]:
    starts = range(part.start, part.start + part.count * part.stride, max(part.stride, 1))
    return {at for start in starts for at in range(start, start + part.nbytes)}


def check_rank(shared: RankShare, needs: Needs, rank: int) -> None:
    """Check that each row is either read by the rank alone or in the parts of its unit."""
    numbers = [unit.number for unit in shared.units]
    assert numbers == sorted(numbers)
    assert [unit.tensor for unit in shared.units] == sorted(unit.tensor for unit in shared.units)
    for at, position in enumerate(shared.unit_of_row.tolist()):
        if position < 0:
            continue
        unit = shared.units[position]
        assert unit.name == needs.names[needs.objects[at]]
        row = UnitPart(*(int(column[at]) for column in (needs.starts, needs.counts, needs.nbytes, needs.strides)))
        assert any(bytes_of(row) <= bytes_of(part) for part in unit.parts[rank])
    for unit in shared.units:
        for parts in unit.parts.values():
            assert all(unit.start <= part.start and part.stop <= unit.stop for part in parts)


@given(st.randoms(use_true_random=False))
def test_all_ranks_compute_the_same_and_get_what_they_need(random: Random) -> None:
    chunks = random_chunks(random)
    needs = [random_needs(chunks, random) for _ in range(random.randint(1, 4))]
    ranks = list(range(random.randint(len(needs), 7)))
    random.shuffle(ranks)
    ranks_of = [[rank] for rank in ranks[: len(needs)]]
    for rank in ranks[len(needs) :]:
        random.choice(ranks_of).append(rank)
    results = [ReadDivision.in_units(needs, ranks_of, 20) for _ in ranks]
    found = [divided.share_of(rank) for rank, divided in enumerate(results)]
    units: dict[int, set[tuple[str, int, int, int]]] = {}
    members: dict[int, list[int]] = {}
    for rank, shared in enumerate(found):
        group = next(at for at, some in enumerate(ranks_of) if rank in some)
        check_rank(shared, needs[group], rank)
        assert np.array_equal(results[rank].loads, results[0].loads)
        for unit in shared.units:
            units.setdefault(unit.number, set()).add((unit.name, unit.start, unit.stop, unit.reader))
            members.setdefault(unit.number, []).append(rank)
    for number, some in units.items():
        assert len(some) == 1
        ((*_, reader),) = some
        assert len(members[number]) > 1
        of_reader = next(unit for unit in found[reader].units if unit.number == number)
        assert set(of_reader.parts) == set(members[number])
        for rank in members[number]:
            unit = next(unit for unit in found[rank].units if unit.number == number)
            assert unit.parts[rank] == of_reader.parts[rank]
    assert sum(shared.bytes_sent for shared in found) == sum(shared.bytes_received for shared in found)
    for rank, shared in enumerate(found):
        assert sum(unit.stop - unit.start for unit in shared.units_read) <= results[0].loads[rank]


@given(st.randoms(use_true_random=False))
def test_needs_are_the_same_after_packing(random: Random) -> None:
    needs = random_needs(random_chunks(random), random)
    again = Needs.unpack(needs.pack())
    assert again.names == needs.names
    for name in ("objects", "starts", "stops", "tensors", "counts", "nbytes", "strides"):
        assert np.array_equal(getattr(again, name), getattr(needs, name))
    assert again.pack() == needs.pack()


def test_replicas_divide_the_bytes_evenly() -> None:
    needs = needs_of([(0, at * 10, at * 10 + 10, at, 1, 10, 10) for at in range(80)])
    divided = ReadDivision.in_units([needs], [[0, 1, 2, 3]], 20)
    shared = [divided.share_of(rank) for rank in range(4)]
    assert divided.loads.tolist() == [200, 200, 200, 200]
    assert {unit.stop - unit.start for unit in shared[0].units} == {20}
    assert all(one.bytes_received == 600 for one in shared)
    assert divided.saves_time(1, 10, 0.8)
    assert not divided.saves_time(10, 1, 0.8)


def test_columns_of_rows_are_read_once() -> None:
    needs = [needs_of([(0, first, first + 9 * 8 + 2, 0, 10, 2, 8)]) for first in (0, 2, 4, 6)]
    divided = ReadDivision.in_units(needs, [[0], [1], [2], [3]], 1000)
    shared = [divided.share_of(rank) for rank in range(4)]
    (unit,) = shared[0].units
    assert (unit.start, unit.stop) == (0, 80)
    assert int(divided.loads.sum()) == 80
    assert sum(one.bytes_sent for one in shared) == 60
    assert divided.separate.tolist() == [74 + 9] * 4  # from the first to the last byte that is needed, and a request
    assert divided.together.tolist() == [80, 0, 0, 0]
    assert divided.exchanged.tolist() == [20] * 4
    assert not divided.saves_time(1, 1, 0.9)  # one rank reads the only unit


def test_small_neighbours_that_different_ranks_need_are_read_together() -> None:
    """Ranks of tensor parallelism need different chunks of each shard of a save by many ranks."""
    needs = [
        needs_of([(0, at + 8 * rank, at + 8 * rank + 8, at // 32, 1, 8, 8) for at in range(0, 320, 32)])
        for rank in range(4)
    ]
    divided = ReadDivision.in_units(needs, [[0], [1], [2], [3]], 80)
    shared = [divided.share_of(rank) for rank in range(4)]
    assert [(unit.start, unit.stop) for unit in shared[0].units] == [(at, at + 80) for at in range(0, 320, 80)]
    assert divided.loads.tolist() == [80] * 4
    assert divided.separate.tolist() == [10 * (8 + 9)] * 4
    assert sum(one.bytes_received for one in shared) == 240
    assert divided.saves_time(1, 10, 0.9)


def test_large_neighbours_that_different_ranks_need_are_read_separately() -> None:
    needs = [needs_of([(0, 10 * rank, 10 * rank + 10, 0, 1, 10, 10)]) for rank in range(4)]
    assert not ReadDivision.in_units(needs, [[0], [1], [2], [3]], 80).share_of(0).units


def test_columns_that_nobody_else_needs_are_read_alone() -> None:
    needs = [needs_of([(0, 0, 9 * 8 + 2, 0, 10, 2, 8)]), needs_of([(1, 0, 40, 1, 1, 40, 40)])]
    for rank in range(2):
        assert not ReadDivision.in_units(needs, [[0], [1]], 1000).share_of(rank).units


def test_what_few_of_the_ranks_need_of_a_row_is_not_shared() -> None:
    needs = [needs_of([(0, first, first + 9 * 32 + 2, 0, 10, 2, 32)]) for first in (0, 2)]
    assert not ReadDivision.in_units(needs, [[0], [1]], 1000).share_of(0).units


def test_ranks_without_needs_take_no_part() -> None:
    needs = [needs_of([]), needs_of([(0, 0, 100, 0, 1, 100, 100)])]
    assert ReadDivision.in_units(needs, [[0], [1]], 1000).loads.tolist() == [0, 100]
    assert not ReadDivision.in_units([needs_of([])], [[0, 1]], 1000).share_of(1).units
