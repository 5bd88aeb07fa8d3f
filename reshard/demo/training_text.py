"""The text that the demo trains on: the help topics of Python, which every installation contains."""

from __future__ import annotations

from pydoc_data.topics import topics

import torch


def corpus() -> torch.Tensor:
    """Return all help topics, one after another, as (n,) int64 tokens from 0 to 255."""
    text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def batch(tokens: torch.Tensor, step: int, size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the batch of a step, the same on every rank: (size, length) inputs, and the tokens that follow them."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(tokens) - length - 1, (size,), generator=generator).tolist()
    inputs = torch.stack([tokens[at : at + length] for at in starts])
    targets = torch.stack([tokens[at + 1 : at + length + 1] for at in starts])
    return inputs, targets
