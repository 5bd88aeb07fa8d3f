"""The contents of the checkpoints in this folder. They are computed, so that the tests need no other file."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.complex64, torch.complex128,
)  # fmt: skip


def matrix(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Return values that resemble weights: a smooth function of the position."""
    return (torch.arange(rows * columns, dtype=torch.float64) * 0.37).sin().mul(0.02).reshape(rows, columns).to(dtype)


def sharded() -> dict[str, torch.Tensor]:
    """Return whole tensors. Each rank saves its rows by `torch.chunk`."""
    return {"up": matrix(256, 192, torch.bfloat16), "down": matrix(96, 256, torch.float32)}


def replicated() -> dict[str, Any]:
    """Return the entries that every rank has as a whole."""
    return {
        "dtypes": {str(dtype): torch.tensor([0, 1, 1, 0]).to(dtype) for dtype in DTYPES},
        "scalar": torch.tensor(7.5),
        "empty": torch.empty(0, 3),
        "list": [torch.ones(2), {"lr": 0.1, "betas": (0.9, 0.999)}],
        "step": 12,
        "text": "läuft",
        "nothing": None,
        "infinite": float("inf"),
        "bytes": b"\x00\xff",
        "array": np.arange(6, dtype=np.int32).reshape(2, 3),
        "dict": {"milestones": [10, 20]},
        "pickled": (torch.arange(3), 1),
    }
