"""Random programs of torch code, to run with ordinary and with lazy tensors: both must end with the same values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import torch

View = Callable[[torch.Tensor], torch.Tensor]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def _at(dim: int, index: Any) -> Any:
    """Return what indexes one dimension of a tensor."""
    return (*[slice(None)] * dim, index)


def random_view(tensor: torch.Tensor, random: Random) -> View:
    """Choose an operation that returns a view, or a copy, of a tensor of this shape and dtype."""
    if tensor.dim() == 0:
        return random.choice([lambda t: t.reshape(1), lambda t: t.clone(), lambda t: t.expand(2, 1)])
    d = random.randrange(tensor.dim())
    size = tensor.shape[d]
    begin = random.randint(0, size)
    count = random.randint(0, size - begin)
    order = random.sample(range(tensor.dim()), tensor.dim())
    rows = [random.randrange(-size, size) for _ in range(random.randint(1, 4))] if size else []
    divisors = [n for n in range(1, tensor.numel() + 1) if tensor.numel() % n == 0] or [1]
    first = random.choice(divisors)
    views: list[View] = [
        lambda t: t.narrow(d, begin, count),
        lambda t: t.permute(order),
        lambda t: t.reshape(first, t.numel() // first),
        lambda t: t.reshape(-1),
        lambda t: t.chunk(2, d)[-1],
        lambda t: t.transpose(0, d).contiguous(),
        lambda t: t.unsqueeze(d),
        lambda t: t.clone(),
        lambda t: t.detach(),
        lambda t: t.unsqueeze(0).expand(2, *t.shape),
        lambda t: t[_at(d, slice(begin, None, 2))],
        lambda t: torch.cat([t, t.narrow(d, begin, count)], d),
        lambda t: torch.stack([t, t.flip(d) if begin % 2 else t], d),
        lambda t: t.to(random_dtype),
        lambda t: t.unbind(d)[begin - 1] if t.shape[d] else t,
        lambda t: t.unfold(d, 2, 1) if t.shape[d] > 1 else t,
        lambda t: t.diagonal() if t.dim() > 1 else t,
        lambda t: t.index_select(d, torch.tensor(rows) % t.shape[d]) if rows and t.shape[d] > 1 else t,
        lambda t: t[_at(d, rows)] if rows else t,
        lambda t: t.view(torch.int16).view(t.dtype) if t.dtype == torch.bfloat16 else t,
    ]
    random_dtype = random.choice(DTYPES)
    return random.choice(views)


def random_destination(like: torch.Tensor, random: Random) -> torch.Tensor:
    """Return a tensor of the same shape: dense, permuted or with gaps, of a random dtype."""
    dims = list(range(like.dim()))
    order = random.sample(dims, len(dims))
    outer = [like.shape[d] + random.choice([0, 0, 3]) for d in order]
    dtype = random.choice([like.dtype, *DTYPES])
    whole = torch.full(outer, -1.0, dtype=torch.float32).to(dtype)
    index: Any = (..., *(slice(0, like.shape[d]) for d in order))
    part = whole[index]
    return part.permute([order.index(d) for d in dims])


def run(tensors: Mapping[str, torch.Tensor], random: Random) -> list[torch.Tensor]:
    """Run a random program, and return the tensors that it has written.

    The choices depend only on the shapes and dtypes of tensors, so that two calls with equal random numbers run the
    same program.
    """
    names = sorted(tensors)
    pool = [tensors[random.choice(names)] for _ in range(3)]
    written: list[torch.Tensor] = []
    for _ in range(random.randint(1, 14)):
        at = random.randrange(len(pool))
        action = random.choice(["view"] * 6 + ["copy"] * 4 + ["copy again", "change", "change lazy", "use", "cat"])
        if action == "view":
            made = random_view(pool[at], random)(pool[at])
            if made.numel() <= 100_000:
                pool.append(made)
        elif action == "copy":
            written.append(random_destination(pool[at], random))
            written[-1].copy_(pool[at])
        elif action == "copy again" and written:
            target = random.choice(written)
            if target.dim():
                begin = random.randint(0, target.shape[0])
                target = target[begin:]
            fits = target.shape == pool[at].shape or pool[at].numel() == 1
            if fits and torch.can_cast(pool[at].dtype, target.dtype):  # a read refuses other casts
                target.copy_(pool[at].reshape(()) if pool[at].numel() == 1 else pool[at])
        elif action == "change" and written:
            target = random.choice(written)
            target = target[:1] if target.dim() and random.random() < 0.5 else target
            target.mul_(2)
        elif action == "change lazy":
            pool[at] = pool[at].contiguous()  # an expanded tensor cannot be changed
            pool[at].add_(1)
        elif action == "use":
            written.append(pool[at].to(torch.float64) + 1)
        elif action == "cat":
            alike = [t for t in pool if t.shape == pool[at].shape]
            pool.append(torch.cat([t.reshape(-1) for t in alike]))
    return written
