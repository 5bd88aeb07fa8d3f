"""Tensor classes that keep their values in a form of their own, as quantised tensors do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.utils._pytree as pytree


class Scaled(torch.Tensor):
    """int8 values times a scale, which presents itself as bfloat16."""

    q: torch.Tensor
    s: torch.Tensor

    @staticmethod
    def __new__(cls, q: torch.Tensor, s: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, q.shape, dtype=torch.bfloat16)

    def __init__(self, q: torch.Tensor, s: torch.Tensor) -> None:
        self.q, self.s = q, s

    @classmethod
    def of(cls, *shape: int) -> Self:
        return cls(torch.zeros(*shape, dtype=torch.int8), torch.tensor(1.0, dtype=torch.bfloat16))

    @classmethod
    def write(cls, target: Scaled, values: torch.Tensor) -> None:
        target.q.copy_((values.float() / target.s.float()).round().to(torch.int8))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].q, args[0].s)
        if function is torch.ops.aten.copy_.default and isinstance(args[0], cls):
            cls.write(args[0], args[1])
            return args[0]

        def plain(value: Any) -> Any:
            return value.q.bfloat16() * value.s if isinstance(value, cls) else value

        return function(*pytree.tree_map(plain, args), **pytree.tree_map(plain, kwargs or {}))


class Flattened(Scaled):
    """One that has torch's protocol of flattening."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["q", "s"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *_: Any) -> Flattened:
        return Flattened(inner["q"], inner["s"])


class Deaf(Scaled):
    """One whose copy_ writes to a temporary."""

    @classmethod
    def write(cls, target: Scaled, values: torch.Tensor) -> None:
        pass


class Refusing(Scaled):
    """One whose copy_ raises."""

    @classmethod
    def write(cls, target: Scaled, values: torch.Tensor) -> None:
        raise NotImplementedError("no copy_ for Refusing")


class Logged(torch.Tensor):
    """One with memory of its own, and a dispatch of its own that does what the values' own class would."""

    calls: list[str]

    @staticmethod
    def of(*shape: int) -> Logged:
        return torch.Tensor._make_subclass(Logged, torch.zeros(*shape))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def plain(value: Any) -> Any:
            return value.as_subclass(torch.Tensor) if isinstance(value, cls) else value

        with torch._C._DisableTorchDispatch():
            return function(*pytree.tree_map(plain, args), **pytree.tree_map(plain, kwargs or {}))


class Tagged(torch.Tensor):
    """A subclass without a dispatch of its own: its values are in its memory."""


Maker = Callable[..., torch.Tensor]
