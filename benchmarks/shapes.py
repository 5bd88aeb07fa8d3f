"""The shapes of large models, for benchmarks of the planner."""

from __future__ import annotations

import numpy as np

from reshard.planner.box import IntArray
from reshard.planner.layout import Rule

COLWISE = ("embed", "head", "*.q", "*.k", "*.v", "*.gate", "*.up")
ROWWISE = ("*.o", "*.down")
TP_PLAN: dict[str, Rule] = {**dict.fromkeys(COLWISE, "colwise"), **dict.fromkeys(ROWWISE, "rowwise")}


def transformer(dim: int, hidden: int, kv: int, layers: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a Llama-like model: grouped-query attention and a gated MLP."""
    shapes: dict[str, tuple[int, ...]] = {"embed": (vocabulary, dim), "head": (vocabulary, dim), "norm": (dim,)}
    for at in range(layers):
        block = {"q": (dim, dim), "k": (kv, dim), "v": (kv, dim), "o": (dim, dim)}
        block |= {"gate": (hidden, dim), "up": (hidden, dim), "down": (dim, hidden)}
        shapes |= {f"layers.{at:03}.{name}": shape for name, shape in block.items()}
        shapes |= {f"layers.{at:03}.norm{i}": (dim,) for i in (1, 2)}
    return shapes


def fsdp_rows(rows: int, ranks: int) -> tuple[IntArray, IntArray]:
    """Return the first row and the number of rows of each FSDP shard. Empty shards are omitted."""
    each = -(-rows // ranks)
    begins = np.arange(0, rows, each)
    return begins, np.minimum(each, rows - begins)
