"""Ranks of a layout hold the scales of their parts of quantised weights, or the layout is refused."""

import pytest
import torch

import reshard
from reshard.errors import LayoutError
from reshard.storage.stores.memory import MemoryStore

FP8 = torch.float8_e4m3fn


def stored(**tensors: torch.Tensor) -> reshard.Checkpoint:
    store = MemoryStore()
    reshard.save({name.replace("__", "."): tensor for name, tensor in tensors.items()}, store)
    return reshard.open(store)


def weights(*shape: int) -> torch.Tensor:
    return torch.randint(1, 8, shape).float().to(FP8)


def by_block(values: torch.Tensor, scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return dequantised values. Each scale belongs to a block of this many rows and columns."""
    every = scales.repeat_interleave(rows, -2).repeat_interleave(columns, -1)
    return values.float() * every[..., : values.shape[-2], : values.shape[-1]]


@pytest.mark.parametrize("rule", ["colwise", "rowwise"])
@pytest.mark.parametrize("tp", [2, 3, 6])
def test_ranks_hold_the_scales_of_their_blocks(rule: str, tp: int) -> None:
    values, scales = weights(24, 48), torch.rand(6, 6)
    checkpoint = stored(up__weight=values, up__weight_scale_inv=scales)
    layout = reshard.Layout({"tp": tp}, {"up": rule})
    ranks = [checkpoint.load_rank(layout, rank) for rank in range(tp)]
    parts = [by_block(found["up.weight"], found["up.weight_scale_inv"], 4, 8) for found in ranks]
    assert torch.cat(parts, 0 if rule == "colwise" else 1).equal(by_block(values, scales, 4, 8))


@pytest.mark.parametrize("shape", [(768, 8), (700, 8), (128, 8), (448, 8)])
def test_cuts_inside_blocks_are_refused(shape: tuple[int, int]) -> None:
    rows = -(-shape[0] // 128)
    checkpoint = stored(up__weight=weights(*shape), up__weight_scale_inv=torch.rand(rows, 1))
    layout = reshard.Layout({"tp": 4}, {"*.up": "rowwise", "up.*": "colwise"})
    with pytest.raises(LayoutError, match=r"'up\.weight_scale_inv' has the scales of 'up\.weight'"):
        checkpoint.load_rank(layout, 1)
    replicated = reshard.Layout({"tp": 4}, {"up.weight_scale_inv": "replicate", "up": "colwise"})
    found = checkpoint.load_rank(replicated, 1)
    assert found["up.weight_scale_inv"].shape == (rows, 1)
    assert found["up.weight"].shape == (shape[0] // 4, 8)


@pytest.mark.parametrize(
    ("rule", "scale", "is_accepted"),
    [
        ("colwise", (30,), True),
        ("colwise", (30, 1), True),
        ("rowwise", (30,), True),
        ("rowwise", (30, 1), False),
        ("colwise", (1,), False),
        ("rowwise", (1,), True),
        ("colwise", (), True),
    ],
)
def test_scales_of_rows_and_of_whole_weights(rule: str, scale: tuple[int, ...], is_accepted: bool) -> None:
    checkpoint = stored(up__weight=weights(30, 8), up__weight_scale=torch.rand(scale))
    layout = reshard.Layout({"tp": 4}, {"up": rule})
    if not is_accepted:
        with pytest.raises(LayoutError, match=r"Put the rule \"up\.weight_scale\": \"replicate\" before the others"):
            checkpoint.load_rank(layout, 3)
        return
    for rank in range(4):
        found = checkpoint.load_rank(layout, rank)
        rows = found["up.weight"].shape[0]
        assert found["up.weight_scale"].shape[:1] in ((), (rows,), (1,))


def test_contradicting_rules_are_refused() -> None:
    checkpoint = stored(up__weight=weights(8, 8), up__weight_scale=torch.rand(8))
    with pytest.raises(LayoutError, match="at different places"):
        checkpoint.load_rank(reshard.Layout({"tp": 2}, {"*.weight": "rowwise", "*.weight_scale": "colwise"}), 0)


def test_modules_whose_names_begin_like_scales_hold_no_scales() -> None:
    checkpoint = stored(m__weight=weights(8, 8), m__scale_norm__weight=torch.rand(5, 3))
    assert checkpoint.load_rank(reshard.Layout({"tp": 2}, {"m": "colwise"}), 1)["m.scale_norm.weight"].shape == (2, 3)


def test_packed_halves_are_cut_between_blocks() -> None:
    values, scales = weights(2, 32, 4), torch.rand(2, 8, 1)
    checkpoint = stored(experts__gate_up_proj=values, experts__gate_up_proj_scale_inv=scales)
    rules = {"experts.gate_up_proj*": "packed_colwise"}
    parts = []
    for rank in range(2):
        found = checkpoint.load_rank(reshard.Layout({"tp": 2}, rules), rank)
        parts.append(by_block(found["experts.gate_up_proj"], found["experts.gate_up_proj_scale_inv"], 4, 4))
    whole = by_block(values, scales, 4, 4)
    assert parts[0].equal(torch.cat([whole[:, :8], whole[:, 16:24]], 1))
    assert parts[1].equal(torch.cat([whole[:, 8:16], whole[:, 24:]], 1))
    with pytest.raises(LayoutError, match="at different places"):
        checkpoint.load_rank(reshard.Layout({"tp": 8}, rules), 0)


def test_names_like_scales_without_quantised_weights_are_cut_as_the_rules_say() -> None:
    checkpoint = stored(block__weight=torch.randn(6, 6), block__weight_scale=torch.rand(5))
    found = checkpoint.load_rank(reshard.Layout({"tp": 4}, {"block": "colwise"}), 1)
    assert found["block.weight_scale"].shape == (2,)
