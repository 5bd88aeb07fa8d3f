"""`training_state`: the state dict of a training run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer


def training_state(
    model: nn.Module, optimizer: Optimizer | Iterable[Optimizer] | None = None, **parts: Any
) -> dict[str, Any]:
    """Return the state dict of a training run, to be saved, loaded and passed to a CheckpointManager.

    The model and the optimizer are read when the state dict is saved, and updated when it has been loaded. Their names
    are those of `get_state_dict` of torch.distributed.checkpoint: the wrappers of FSDP, DDP and torch.compile do not
    change them, and optimizer states have the names of their parameters. So a run can continue under another layout.

    Args:
        model: the model. Its names begin with "model.".
        optimizer: its optimizer, or several. Their names begin with "optimizer.". The states of an optimizer that has
            not stepped yet are created, so that a load can write into them.
        parts: other parts by name, such as learning-rate schedulers, the state of the data, or a number. Parts with the
            methods `state_dict` and `load_state_dict` are updated when they have been loaded; other values are replaced
            in the returned dict.
    """
    state: dict[str, Any] = {"model": _ModelState(model)}
    if optimizer is not None:
        optimizers = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)
        state["optimizer"] = _OptimizerState(model, optimizers)
    return {**state, **parts}


@dataclass(frozen=True, slots=True)
class _ModelState:
    model: nn.Module

    def state_dict(self) -> dict[str, Any]:
        return get_model_state_dict(self.model)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_model_state_dict(self.model, state_dict)


@dataclass(frozen=True, slots=True)
class _OptimizerState:
    model: nn.Module
    optimizers: tuple[Optimizer, ...]

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.model, self.optimizers)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_optimizer_state_dict(self.model, self.optimizers, state_dict)
