"""`training_state`: the state dict of a training run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from ..errors import UnsupportedValueError


def training_state(
    model: nn.Module, optimizer: Optimizer | Iterable[Optimizer] | None = None, **parts: Any
) -> dict[str, Any]:
    """Return the state dict of a training run, to be saved, loaded and passed to a CheckpointManager.

    The model and the optimizer are read when the state dict is saved, and updated when it has been loaded. Their names
    are those of `get_state_dict` of torch.distributed.checkpoint: the wrappers of FSDP, DDP and torch.compile do not
    change them, and optimizer states have the names of their parameters. So a run can continue under another layout.

    Args:
        model: the model. Its names begin with "model.".
        optimizer: its optimizer, or several. Their names begin with "optimizer.". If an optimizer has not stepped yet,
            its states are created as torch does, by a step without gradients, but with step counters of 0. The
            optimizer itself does not change when it is saved.
        parts: other parts by name, such as learning-rate schedulers, the state of the data, or a number. Parts with the
            methods `state_dict` and `load_state_dict` are updated when they have been loaded; other values are replaced
            in the returned dict.
    """
    state: dict[str, Any] = {"model": _ModelState(model)}
    optimizers = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer or ())
    if optimizers:
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
        fresh = [optimizer for optimizer in self.optimizers if not optimizer.state]
        try:
            for optimizer in fresh:
                self._create_states(optimizer)
            return get_optimizer_state_dict(self.model, self.optimizers)
        finally:
            for optimizer in fresh:
                optimizer.state.clear()

    def _create_states(self, optimizer: Optimizer) -> None:
        """Create the states of an optimizer that has not stepped."""
        try:
            with _without_gradients([optimizer]), _without_weight_decay(optimizer):
                get_optimizer_state_dict(self.model, optimizer)
        except Exception as error:
            raise UnsupportedValueError(
                f"the states of {type(optimizer).__name__} cannot be created before its first step: "
                f"{type(error).__name__}: {error}. Make a step first, or leave it out"
            ) from error
        for state in optimizer.state.values():
            if isinstance(step := state.get("step"), torch.Tensor):
                step.zero_()
            elif step is not None:
                state["step"] = 0

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with _without_gradients(self.optimizers):
            set_optimizer_state_dict(self.model, self.optimizers, state_dict)


@contextlib.contextmanager
def _without_gradients(optimizers: Iterable[Optimizer]) -> Iterator[None]:
    """Hold the gradients aside. While there are some, torch neither creates nor loads states that do not exist yet."""
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


@contextlib.contextmanager
def _without_weight_decay(optimizer: Optimizer) -> Iterator[None]:
    """Hold the weight decay aside, which SGD would add to the momentum that is created."""
    groups = [group for group in optimizer.param_groups if "weight_decay" in group]
    decays = [group["weight_decay"] for group in groups]
    for group in groups:
        group["weight_decay"] = 0.0
    try:
        yield
    finally:
        for group, decay in zip(groups, decays, strict=True):
            group["weight_decay"] = decay
