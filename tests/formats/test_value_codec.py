import collections
import math
import random
import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reshard.planner.entries import Kind
from reshard.storage.errors import CorruptCheckpointError, UnsafeValueError
from reshard.storage.formats.value_codec import decode_value, encode_value
from tests.samples import Custom

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    return bool(a == b)


@given(values)
def test_plain_values_round_trip_without_pickle(value: Any) -> None:
    try:
        kind, data = encode_value(value)
    except UnicodeEncodeError:
        return
    if kind is Kind.JSON:
        assert same(decode_value("x", kind, data), value)
    else:
        assert "\\ud" in ascii(value), "only lone surrogates are beyond UTF-8"


@pytest.mark.parametrize(
    "value",
    [
        np.random.default_rng(0).bit_generator.state,
        np.random.RandomState(3).get_state(),
        random.Random(3).getstate(),
        {"lr": np.float64(0.1), "n": np.int64(3), "flag": np.bool_(True), "empty": np.zeros((0, 3), np.float32)},
        {"$tuple": [1], "$x": {"$y": 2}},
        float("-inf"),
        10**40,
    ],
)
def test_random_generator_states_and_numpy_values_need_no_pickle(value: Any) -> None:
    kind, data = encode_value(value)
    assert kind is Kind.JSON
    assert same(decode_value("x", kind, data), value)


@pytest.mark.parametrize(
    "value",
    [
        (torch.arange(3), "x"),
    ],
)
def test_values_that_weights_only_allows_are_read(value: Any) -> None:
    kind, data = encode_value(value)
    assert kind is Kind.TORCH_SAVE
    back = decode_value("x", kind, data)
    assert type(back) is type(value)
    assert str(back) == str(value)


def test_error_for_unsafe_pickle_suggests_allow_pickle() -> None:
    value = Custom(3)
    kind, data = encode_value(value)
    with pytest.raises(UnsafeValueError, match=r"'extra\.when'.*Custom.*allow_pickle=True"):
        decode_value("extra.when", kind, data)
    assert decode_value("extra.when", kind, data, allow_pickle=True) == value


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b'{"$who":1}',
        b'{"$array":["O",[1],""]}',
        b'{"$scalar":["<f4",[0],""]}',
        b'{"$bytes":"?"}',
        b'{"$tuple":3}',
        b'{"$complex":[1]}',
        b'{"$float":1' + b"0" * 400 + b"}",
    ],
)
def test_malformed_json_raises_corrupt_error(data: bytes) -> None:
    with pytest.raises(CorruptCheckpointError, match="'x'"):
        decode_value("x", Kind.JSON, data)


def test_damaged_torch_save_value_raises_corrupt_error_without_advice_to_trust_it() -> None:
    _, data = encode_value(collections.OrderedDict(a=torch.arange(100), b="text"))
    rng = random.Random(0)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 20)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            decode_value("x", Kind.TORCH_SAVE, bytes(damaged[: rng.randint(1, len(damaged))]))
        except (CorruptCheckpointError, UnsafeValueError):
            continue
    with pytest.raises(CorruptCheckpointError, match="the value 'x' cannot be decoded"):
        decode_value("x", Kind.TORCH_SAVE, b"garbage")
