"""`training_state`: the state dict of a training run."""

from __future__ import annotations

import contextlib
import copyreg
import inspect
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import ArgumentError, UnsupportedValueError
from ..runtime.brief import reason
from ..tensors.overlaps import overlaps_itself
from ..tensors.state_dict import has_stateful
from ..tensors.tensor_classes import missing_memory

_OF_OBJECTS: dict[type, str] = {
    DataLoader: "pass a loader that has them, such as StatefulDataLoader of torchdata, or the number of batches read",
    Dataset: "leave it out",
    Sampler: "pass a sampler that has them, or the number of samples read",
    torch.Generator: "pass its get_state(), and pass that to set_state after a load",
}
"""Objects that hold a state of the training without being able to return it, and what to pass instead."""


def training_state(
    model: nn.Module, optimizer: Optimizer | Iterable[Optimizer] | None = None, **parts: Any
) -> dict[str, Any]:
    """Return the state dict of a training run, to be saved, loaded and passed to a CheckpointManager.

    The model and the optimizer are read when the state dict is saved, and updated when it has been loaded. Their names
    are those of `get_state_dict` of torch.distributed.checkpoint: the wrappers of FSDP, DDP and torch.compile do not
    change them, and optimizer states have the names of their parameters. So a run can continue under another layout,
    also with other pipeline stages. Only the settings of the optimizer, such as its learning rate, are saved for each
    parameter instead of each group.

    Args:
        model: the model. Its names begin with "model.".
        optimizer: its optimizer, or several. Their names begin with "optimizer.". Parameters that have not been updated
            yet have no state, also after a load; nor do parameters that are frozen when the state dict is loaded. A
            save does not change the optimizer, and calls none of its own step hooks. An optimizer whose step needs a
            closure, such as LBFGS, must have made a step before it is saved. It can only be loaded into an optimizer
            whose state has the same entries; for LBFGS, these depend on the number of steps.
        parts: other parts by name, such as learning-rate schedulers, the state of the data, or a number. Parts with the
            methods `state_dict` and `load_state_dict` are updated when they have been loaded; other values are replaced
            in the returned dict.

    Raises:
        UnsupportedValueError: an optimizer is a ZeroRedundancyOptimizer of torch.
        ArgumentError: `model` is no module, `optimizer` is no optimizer, or a part is a data loader, dataset, sampler
            or random generator without these methods, so that it could only be pickled. When the state dict is saved or
            loaded: the optimizer has parameters that the model does not have.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    state: dict[str, Any] = {"model": _ModelState(model)}
    optimizers = _optimizers(optimizer)
    if optimizers:
        state["optimizer"] = _OptimizerState(model, optimizers)
    for name, part in parts.items():
        for kind, advice in _OF_OBJECTS.items():
            if isinstance(part, kind) and not has_stateful({name: part}):
                raise ArgumentError(
                    f"{name!r} is a {type(part).__name__} without the methods state_dict and load_state_dict, so the "
                    f"object itself would be pickled, and not restored: {advice}"
                )
    return {**state, **parts}


def _optimizers(passed: Any) -> tuple[Optimizer, ...]:
    """Return one or several optimizers. Raise ArgumentError for anything else."""
    if passed is None:
        return ()
    several = tuple(passed) if isinstance(passed, Iterable) and not isinstance(passed, Optimizer) else (passed,)
    for one in several:
        if not isinstance(one, Optimizer):
            raise ArgumentError(f"optimizer must be one or several torch.optim.Optimizer, got {type(one).__name__}")
        if hasattr(one, "consolidate_state_dict"):  # ZeroRedundancyOptimizer, whose import emits a warning
            raise UnsupportedValueError(
                f"{type(one).__name__} holds the states of some parameters on each rank, and returns them only after "
                "collecting all of them on one rank: use fully_shard, which shards the states of any optimizer"
            )
    return several


@dataclass(frozen=True, slots=True)
class _ModelState:
    model: nn.Module

    def state_dict(self) -> dict[str, Any]:
        if self._has_no_tensors() and not self.model.state_dict():
            return OrderedDict()  # as modules do. torch raises an error, such as for a pipeline stage of activations
        return get_model_state_dict(self.model)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict or not self._has_no_tensors():
            set_model_state_dict(self.model, state_dict)

    def _has_no_tensors(self) -> bool:
        """Return whether the state dict of the model has no parameters and buffers."""
        for module in self.model.modules():
            temporary = module._non_persistent_buffers_set
            buffers = (buffer for name, buffer in module._buffers.items() if name not in temporary)
            if any(tensor is not None for tensor in (*module._parameters.values(), *buffers)):
                return False
        return True


class _OptimizerState:
    """The states of optimizers, and the settings of each parameter's group.

    A parameter that has not been updated has no state. A load needs tensors to write into, so states are created for
    it as torch does: by a step with gradients of 0. They are removed afterwards, and `has_state` notes that. Some
    parameters have no state even then, such as those of SGD without momentum.

    torch names the groups of parameters by their numbers. Pipeline stages have different parameters under the same
    numbers, so the settings are saved under the names of the parameters.
    """

    def __init__(self, model: nn.Module, optimizers: tuple[Optimizer, ...]) -> None:
        self._model = model
        self._optimizers = optimizers
        self._names: list[list[str]] = []
        """The names of the parameters of each group of all optimizers."""
        self._is_fsdp1 = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
        self._stateless: dict[int, nn.Parameter] = {}
        """The parameters that have no state after a step, by their `id`."""

    def state_dict(self) -> dict[str, Any]:
        """Return `{"state": {name: state}, "param_groups": {name: (settings of its group, has_state)}}`."""
        self._check_parameters()
        without_state = [_parameters_without_state(optimizer) for optimizer in self._optimizers]
        is_lacking = any(any(map(self._may_have_state, parameters)) for parameters in without_state)
        # Only torch knows which names have a state. For FSDP1, a parameter may be empty here, or have many names. An
        # optimizer that wraps another one may return the states of the inner one.
        is_lacking = self._any_rank(is_lacking) if self._is_fsdp1 else is_lacking
        before = self._torch_state() if is_lacking else None
        if before is not None and not self._is_fsdp1:
            known = self._parameters_in(before)
            without_state = [[p for p in parameters if id(p) not in known] for parameters in without_state]
        with contextlib.ExitStack() as stack:
            new: list[tuple[Optimizer, nn.Parameter]] = []
            for optimizer, parameters in zip(self._optimizers, without_state, strict=True):
                stack.callback(_remove_states, optimizer, parameters)
                of_optimizer = list(filter(self._may_have_state, parameters))
                if of_optimizer and not (optimizer.state and _needs_closure(optimizer)):  # LBFGS has one state for all
                    _create_states(optimizer, of_optimizer, self._model, stack)
                    new += ((optimizer, parameter) for parameter in of_optimizer)
            found = self._torch_state()
            created = set() if self._is_fsdp1 else self._parameters_in(found)
            self._stateless |= {id(p): p for one, p in new if not one.state.get(p) and id(p) not in created}
        known_names = (found if before is None else before)["state"].keys()
        self._names = [group["params"] for group in found["param_groups"]]
        lacking = {id(parameter) for parameters in without_state for parameter in parameters}
        settings: dict[str, tuple[dict[str, Any], bool]] = {}
        for group, (_, parameters) in zip(found["param_groups"], self._groups(), strict=True):
            of_group = _settings(group)
            for at, name in enumerate(group["params"]):
                has_state = name in known_names if self._is_fsdp1 else id(parameters[at]) not in lacking
                settings[name] = of_group, has_state
        return {"state": found["state"], "param_groups": settings}

    def _may_have_state(self, parameter: nn.Parameter) -> bool:
        return parameter.requires_grad and parameter.numel() > 0 and id(parameter) not in self._stateless

    def _parameters_in(self, state: Any) -> set[int]:
        """Return the `id` of the parameters that have a state in torch's state dict of the optimizers."""
        groups = zip(state["param_groups"], self._groups(), strict=True)
        named = (pair for group, (_, own) in groups for pair in zip(group["params"], own, strict=True))
        return {id(parameter) for name, parameter in named if state["state"].get(name)}

    def _any_rank(self, is_true: bool) -> bool:
        """Return whether an argument is True on any rank of the model's FSDP1 modules. Collective."""
        modules = FullyShardedDataParallel.fsdp_modules(self._model)
        for group in dict.fromkeys(module.process_group for module in modules):
            of_ranks: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(of_ranks, is_true, group)
            is_true = any(of_ranks)
        return is_true

    def _torch_state(self) -> Any:
        """Return torch's state dict of the optimizers, as they are now."""
        with _without_steps(self._optimizers):  # torch would make one if an optimizer has no states
            return get_optimizer_state_dict(self._model, self._optimizers)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        settings = state_dict["param_groups"]
        groups: list[dict[str, Any]] = []
        own_groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        for names, own in zip(self._names, own_groups, strict=True):
            for name in names:
                if settings[name][0] != settings[names[0]][0]:
                    raise ArgumentError(
                        f"the optimizer has {names[0]!r} and {name!r} in one group, but they were saved with different "
                        f"settings, {settings[names[0]][0]} and {settings[name][0]}: use the same groups"
                    )
            groups.append({**_settings(own), **(settings[names[0]][0] if names else {}), "params": names})
        states = {name: state for name, state in state_dict["state"].items() if settings[name][1]}
        if self._is_fsdp1:
            with _without_gradients(self._optimizers):
                loaded: Any = {"state": states, "param_groups": groups}
                set_optimizer_state_dict(self._model, self._optimizers, loaded, options=StateDictOptions(strict=False))
        else:
            self._set(states, groups)

    def _set(self, state: dict[str, Any], groups: list[dict[str, Any]]) -> None:
        """Load the states of parameters by name, and the groups of all optimizers.

        `Optimizer.load_state_dict` casts states to the dtype of their parameter, and replaces strings. Unless the class
        of the optimizer has a method of its own, or hooks, the states are put back as they were loaded.
        """
        remaining = iter(groups)
        for optimizer in self._optimizers:
            own = [next(remaining) for _ in optimizer.param_groups]
            names = [name for group in own for name in group["params"]]
            states = {name: state[name] for name in names if name in state}
            optimizer.load_state_dict({"state": states, "param_groups": own})
            if _loads_as_torch_does(optimizer):
                parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
                for name, parameter in zip(names, parameters, strict=True):
                    for key in states.get(name, {}).keys() - {"step"}:  # which torch may have to move to another device
                        optimizer.state[parameter][key] = states[name][key]

    def _check_parameters(self) -> None:
        """Check that the model has all parameters of the optimizers, and that each is in one group.

        torch would raise a KeyError, or keep the state of one of the optimizers.
        """
        known = {id(parameter): name for name, parameter in self._model.named_parameters()}
        own = [parameter for _, parameters in self._groups() for parameter in parameters]
        unknown = [parameter for parameter in own if id(parameter) not in known]
        if unknown:
            raise ArgumentError(
                f"the optimizer has {len(unknown)} parameters that are not in the model, the first of shape "
                f"{tuple(unknown[0].shape)}: create the optimizer after fully_shard, which replaces the parameters of "
                "the model, and pass a module that contains all of them"
            )
        if twice := [parameter for parameter, count in Counter(map(id, own)).items() if count > 1]:
            raise ArgumentError(
                f"{known[twice[0]]!r} is in several optimizers or groups, whose states would have the same name: save "
                "the other optimizers as parts of their own"
            )

    def _groups(self) -> list[tuple[Optimizer, list[nn.Parameter]]]:
        """Return the optimizer and the parameters of each group."""
        return [(optimizer, group["params"]) for optimizer in self._optimizers for group in optimizer.param_groups]


def _loads_as_torch_does(optimizer: Optimizer) -> bool:
    """Return whether only torch's own code runs when an optimizer loads a state dict."""
    hooks = ("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks")
    is_own = type(optimizer).load_state_dict is not Optimizer.load_state_dict
    return not is_own and not any(getattr(optimizer, name, None) for name in hooks)


def _needs_closure(optimizer: Optimizer) -> bool:
    """Return whether the step of an optimizer cannot be called without a closure."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """Return what a group of parameters has in addition to the parameters."""
    return {key: value for key, value in group.items() if key != "params"}


def _parameters_without_state(optimizer: Optimizer) -> list[nn.Parameter]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [parameter for parameter in parameters if not optimizer.state.get(parameter)]


def _remove_states(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


def _create_states(
    optimizer: Optimizer, parameters: list[nn.Parameter], model: nn.Module, until_read: contextlib.ExitStack
) -> None:
    """Create the states of parameters that have not been updated.

    This makes a step with gradients of 0. What else the step may change is restored: the values of the parameters, the
    settings and attributes of the optimizer and of those inside it, and the state of random generators. Hooks are not
    called.

    Args:
        until_read: restores the states of optimizers inside this one, which may be a part of its state dict.

    Raises:
        UnsupportedValueError: the step fails, for example because it needs a closure.
    """
    optimizer = _unwrapped(optimizer)
    step: Any = type(optimizer).step
    if getattr(step, "hooked", False):  # torch wraps the method of the class in one that calls the hooks
        step = step.__wrapped__
    is_of_torch = step.__module__.startswith("torch.optim.")
    optimizers = _with_inner(optimizer)
    zeros = _sparse_zeros if isinstance(optimizer, torch.optim.SparseAdam) else torch.zeros_like
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_gradients(optimizers))
        for one in optimizers:
            stack.enter_context(_without_hooks(one))
            # Weight decay would be added to the momentum of SGD, and an eps of 0 would lead to NaN.
            stack.enter_context(_with_settings(one, lr=0.0, weight_decay=0.0, eps=1.0))
        if not is_of_torch:
            for one in optimizers[1:]:
                if one.state is not optimizer.state:
                    _restore_later(one.state, until_read, {})
            stack.enter_context(_unchanged(optimizers, parameters))
        for parameter in parameters:
            parameter.grad = zeros(parameter)
        try:
            step(optimizer)
        except Exception as error:
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            raise UnsupportedValueError(
                f"{type(optimizer).__name__} cannot create the states of {len(parameters)} parameters that have not "
                f"been updated yet, such as {names[id(parameters[0])]!r}: {reason(error)}. Make a step in which they "
                "have gradients. If they never have any, freeze them, or leave them out of the optimizer"
            ) from error
    for one in optimizers[:1] if is_of_torch else optimizers:  # torch's step uses no other optimizer
        for parameter in parameters:
            if isinstance(count := one.state.get(parameter, {}).get("step"), torch.Tensor):
                count.zero_()


def _sparse_zeros(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter, layout=torch.sparse_coo)


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside an AcceleratedOptimizer, whose step may also update a scaler, or do nothing."""
    inner = vars(optimizer).get("optimizer")
    is_of_accelerate = type(optimizer).__module__.startswith("accelerate.")
    return _unwrapped(inner) if is_of_accelerate and isinstance(inner, Optimizer) else optimizer


def _with_inner(optimizer: Optimizer) -> list[Optimizer]:
    """Return an optimizer and those in its attributes, also in containers."""
    found: list[Optimizer] = []
    seen: dict[int, Any] = {}

    def search(value: Any) -> None:
        if isinstance(value, Optimizer) and id(value) not in seen:
            seen[id(value)] = value
            found.append(value)
            search({name: item for name, item in vars(value).items() if name not in ("state", "param_groups")})
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen[id(value)] = value
            for item in value.values() if isinstance(value, dict) else value:
                search(item)

    search(optimizer)
    return found


@contextlib.contextmanager
def _unchanged(optimizers: Sequence[Optimizer], parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Restore what the step of an optimizer changes, except states of parameters.

    Args:
        optimizers: the optimizer, and those inside it.
        parameters: those that the step updates.
    """
    accelerator = torch.accelerator.current_accelerator()
    kind = "cuda" if accelerator is None else accelerator.type
    outer = optimizers[0]
    with contextlib.ExitStack() as stack:
        devices = sorted({parameter.device.index for parameter in parameters if parameter.device.type == kind})
        stack.enter_context(torch.random.fork_rng(devices, device_type=kind))
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        seen = {id(parameter): parameter for group in outer.param_groups for parameter in group["params"]}
        seen |= {id(one.state): one.state for one in optimizers}  # an attribute may refer to them
        for parameter in parameters:
            _restore_later(parameter, stack, {})
        for one in optimizers:
            attributes = dict(vars(one))
            stack.callback(_set_attributes, one, attributes)
            names: list[str] = copyreg._slotnames(type(one))  # type: ignore[attr-defined]
            slots = {name: getattr(one, name) for name in names if hasattr(one, name)}
            stack.callback(_set_slots, one, names, slots)
            for name, value in (*slots.items(), *attributes.items()):
                if name not in ("state", "param_groups"):
                    _restore_later(value, stack, seen)
        yield


def _set_attributes(optimizer: Optimizer, attributes: dict[str, Any]) -> None:
    vars(optimizer).clear()
    vars(optimizer).update(attributes)


def _set_slots(optimizer: Optimizer, names: Iterable[str], values: dict[str, Any]) -> None:
    for name in names:
        if name in values:
            setattr(optimizer, name, values[name])
        elif hasattr(optimizer, name):
            delattr(optimizer, name)


def _restore_later(value: Any, stack: contextlib.ExitStack, seen: dict[int, Any]) -> None:
    """Let a stack restore a tensor, array, generator, module or container in place, as it is now, also nested ones.

    Tensors are copied to the host, because a device may have no memory left. Memory that cannot be written is left out.

    Args:
        seen: values by their `id` that need not be restored. This one is added.
    """
    if id(value) in seen:
        return
    seen[id(value)] = value
    inside: Iterable[Any] = ()
    if isinstance(value, torch.Tensor):
        local = getattr(value, "_local_tensor", value)
        if not missing_memory(local) and not overlaps_itself(local):
            stack.callback(_put_back, value, local.detach(), local.detach().to("cpu", copy=True))
    elif isinstance(value, np.ndarray):
        if value.flags.writeable:
            stack.callback(np.copyto, value, value.copy())
    elif isinstance(value, torch.Generator):
        stack.callback(value.set_state, value.get_state())
    elif isinstance(value, nn.Module):
        inside = [*value.parameters(), *value.buffers()]
    elif isinstance(value, dict):
        stack.callback(_refill, value, dict(value))
        inside = value.values()
    elif isinstance(value, (list, deque, set)):
        stack.callback(_refill, value, list(value))
        inside = value
    elif isinstance(value, tuple):
        inside = value
    for item in list(inside):
        _restore_later(item, stack, seen)


def _put_back(tensor: torch.Tensor, local: torch.Tensor, values: torch.Tensor) -> None:
    """Restore the memory of a tensor, and its values.

    Args:
        local: the tensor that was in this memory: itself, or the local tensor of a DTensor.
    """
    now = getattr(tensor, "_local_tensor", tensor)
    with torch.no_grad():
        local.copy_(values)
        if now.data_ptr() != local.data_ptr():  # the step has assigned `data`
            now.data = local


def _refill(container: Any, items: Any) -> None:
    """Put items back into a container, if it has others now."""
    now = list(container.items()) if isinstance(container, dict) else list(container)
    before = list(items.items()) if isinstance(container, dict) else list(items)
    if len(now) == len(before) and all(map(_is_same, now, before)):
        return
    container.clear()
    if isinstance(container, (list, deque)):
        container.extend(items)
    else:
        container.update(items)


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) == 2:  # an item of a dict
        return a[0] is b[0] and a[1] is b[1]
    return a is b


@contextlib.contextmanager
def _without_gradients(optimizers: Iterable[Optimizer]) -> Iterator[None]:
    """Hold the gradients aside. While there are some, torch does not create the states that it loads into."""
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
def _without_hooks(optimizer: Optimizer) -> Iterator[None]:
    """Remove the step hooks of an optimizer while the block runs."""
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    hooks = {name: vars(optimizer)[name] for name in names if name in vars(optimizer)}
    vars(optimizer).update({name: type(found)() for name, found in hooks.items()})
    try:
        yield
    finally:
        vars(optimizer).update(hooks)


@contextlib.contextmanager
def _with_settings(optimizer: Optimizer, **settings: float) -> Iterator[None]:
    """Replace settings of all groups while the block runs, and restore all settings afterwards."""
    before = [dict(group) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        for name in settings.keys() & group.keys():
            value = group[name]
            if isinstance(value, torch.Tensor):
                group[name] = torch.full_like(value, settings[name])
            elif isinstance(value, (float, int)):  # eps may also be a tuple
                group[name] = settings[name]
    try:
        yield
    finally:
        for group, values in zip(optimizer.param_groups, before, strict=False):  # the step may have added groups
            group.clear()
            group.update(values)


@contextlib.contextmanager
def _without_steps(optimizers: Iterable[Optimizer]) -> Iterator[None]:
    """Let `step` do nothing while the block runs."""
    own = [(optimizer, vars(optimizer).get("step")) for optimizer in optimizers]  # of learning-rate schedulers
    for optimizer, _ in own:
        vars(optimizer)["step"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for optimizer, step in own:
            del vars(optimizer)["step"]
            if step is not None:
                vars(optimizer)["step"] = step
