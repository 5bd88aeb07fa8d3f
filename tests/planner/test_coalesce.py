import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from reshard.planner.coalesce import MAX_GAP_BYTES, MAX_OVER_READ, GapLimits, Requests, coalesce

ranges = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 200), st.integers(1, 30)), min_size=0, max_size=40)


def joined(
    rows: list[tuple[int, int, int]],
    *,
    max_gap_bytes: int = MAX_GAP_BYTES,
    max_over_read: float = MAX_OVER_READ,
    max_request_bytes: int,
) -> Requests:
    table = np.array(rows, np.int64).reshape(-1, 3)
    limits = GapLimits(max_gap_bytes, max_over_read)
    return coalesce(table[:, 0], table[:, 1], table[:, 1] + table[:, 2], limits, max_request_bytes=max_request_bytes)


@given(ranges, st.integers(0, 50), st.floats(0, 2), st.integers(1, 100))
def test_each_range_is_inside_its_request_within_the_limits(
    rows: list[tuple[int, int, int]], gap: int, over_read: float, most: int
) -> None:
    requests = joined(rows, max_gap_bytes=gap, max_over_read=over_read, max_request_bytes=most)
    for (obj, start, size), at in zip(rows, requests.request_of_range.tolist(), strict=True):
        assert requests.objects[at] == obj
        assert requests.starts[at] <= start
        assert start + size <= requests.stops[at]
    wanted = {(obj, byte) for obj, start, size in rows for byte in range(start, start + size)}
    fetched = [
        (obj, byte)
        for obj, start, stop in zip(
            requests.objects.tolist(), requests.starts.tolist(), requests.stops.tolist(), strict=True
        )
        for byte in range(start, stop)
    ]
    over_read_bytes = len(set(fetched) - wanted)
    assert over_read_bytes <= over_read * sum(size for _, _, size in rows)
    assert all(
        stop - start < most + 30 for start, stop in zip(requests.starts.tolist(), requests.stops.tolist(), strict=True)
    )


@given(ranges)
def test_without_gaps_each_wanted_byte_is_read_exactly_once(rows: list[tuple[int, int, int]]) -> None:
    requests = joined(rows, max_gap_bytes=0, max_over_read=0, max_request_bytes=10**6)
    wanted = {(obj, byte) for obj, start, size in rows for byte in range(start, start + size)}
    assert requests.nbytes == len(wanted)


def test_small_gaps_are_closed_before_large_ones() -> None:
    rows = [(0, 0, 100), (0, 105, 100), (0, 225, 100)]
    assert len(joined(rows, max_gap_bytes=50, max_over_read=0.02, max_request_bytes=10**6)) == 2
    assert len(joined(rows, max_gap_bytes=50, max_over_read=0.1, max_request_bytes=10**6)) == 1
    assert len(joined(rows, max_gap_bytes=4, max_over_read=0.1, max_request_bytes=10**6)) == 3


def test_large_numbers_do_not_overflow() -> None:
    rows = [(i, 2**58, 8) for i in range(100)] + [(i, 2**58 + 8, 8) for i in range(100)]
    requests = joined([(0, 0, 1), *rows[:3], *rows[100:103]], max_request_bytes=10**6)
    assert len(requests) == 4


def test_gaps_are_read_over_only_while_there_are_too_many_requests() -> None:
    gaps = np.array([100, 10, 40, 30, 20, 50])  # after each range of 10 bytes
    starts = np.concatenate(([0], np.cumsum(gaps + 10)))
    for enough, expected in ((1, 1), (3, 3), (6, 6), (9, 7)):
        made = coalesce(np.zeros(7, np.int64), starts, starts + 10, GapLimits(1000, 1e9, enough))
        assert len(made) == expected
        over_read = int((made.stops - made.starts).sum()) - 70
        assert over_read == sum(sorted(gaps.tolist())[: 7 - expected])  # the smallest gaps
