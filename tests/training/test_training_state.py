"""`training_state`, and the callbacks of trainers that use it: a run that is interrupted ends as one that is not."""

from __future__ import annotations

import copy
import os
import random
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate.accelerator import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import reshard
from reshard.errors import ArgumentError, CheckpointError, MissingTensorError, UnsupportedValueError
from tests.ranks import RankPool

X = torch.linspace(-1, 1, 12).reshape(2, 6)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6))


class Run:
    """A model, two optimizers and their schedules."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.model = model
        first, *rest = model.parameters()
        self.optimizers = [torch.optim.AdamW([first], lr=0.1 + seed), torch.optim.SGD(rest, lr=0.1, momentum=0.9)]
        self.schedules = [StepLR(optimizer, 2, gamma=0.5) for optimizer in self.optimizers]
        self.state = reshard.training_state(
            model, self.optimizers, first=self.schedules[0], second=self.schedules[1], step=0
        )

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.model(X).square().mean().backward()
            for optimizer in self.optimizers:
                optimizer.step()
            for schedule in self.schedules:
                schedule.step()
            self.model.zero_grad()
            self.state["step"] += 1

    def values(self) -> list[torch.Tensor]:
        weights = [parameter.detach() for parameter in self.model.parameters()]
        rates = [torch.tensor(optimizer.param_groups[0]["lr"]) for optimizer in self.optimizers]
        whole = [weight.full_tensor() if isinstance(weight, DTensor) else weight for weight in weights]
        return [*whole, *rates, torch.tensor(self.state["step"])]


def check_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other)


@pytest.mark.parametrize("has_stepped", [True, False])
def test_run_continues_as_if_it_had_not_stopped(tmp_path: Path, has_stepped: bool) -> None:
    whole = Run(net(), 0)
    whole.train(7)
    half = Run(net(), 0)
    half.train(3)
    reshard.save(half.state, tmp_path / "half")
    other = Run(net(seed=1), 1)
    other.train(int(has_stepped))
    reshard.load(other.state, tmp_path / "half")
    other.train(4)
    check_equal(other.values(), whole.values())


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "rprop": torch.optim.Rprop,
    "asgd": torch.optim.ASGD,
    "adafactor": torch.optim.Adafactor,
    "sgd": partial(torch.optim.SGD, weight_decay=0.1),
    "momentum": partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1),
    "dampening": partial(torch.optim.SGD, momentum=0.9, dampening=0.5),
}


def optimizer_of(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    return OPTIMIZERS[kind](model.parameters(), lr=0.1)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    for _ in range(3):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_run_is_the_same_if_it_is_saved_before_the_first_step(tmp_path: Path, kind: str) -> None:
    model = net()
    expected = trained(model, optimizer_of(kind, model))
    saved = net()
    optimizer = optimizer_of(kind, saved)
    saved(X).square().mean().backward()
    gradients = [parameter.grad for parameter in saved.parameters()]
    reshard.save(reshard.training_state(saved, optimizer), tmp_path / "start")
    assert all(parameter.grad is gradient for parameter, gradient in zip(saved.parameters(), gradients, strict=True))
    assert not optimizer.state
    saved.zero_grad()
    check_equal(trained(saved, optimizer), expected)
    restored = net(seed=1)
    optimizer = optimizer_of(kind, restored)
    reshard.load(reshard.training_state(restored, optimizer), tmp_path / "start")
    check_equal(trained(restored, optimizer), expected)


def test_an_optimizer_that_is_excluded_from_a_load_does_not_count_a_step(tmp_path: Path) -> None:
    model = net()
    reshard.save(reshard.training_state(model, optimizer_of("adam", model)), tmp_path)
    expected = trained(model, optimizer_of("adam", model))
    other = net(seed=1)
    optimizer = optimizer_of("adam", other)
    reshard.load(reshard.training_state(other, optimizer), tmp_path, exclude="optimizer")
    check_equal(trained(other, optimizer), expected)


def test_an_optimizer_is_loaded_although_there_are_gradients(tmp_path: Path) -> None:
    run = Run(net(), 0)
    run.train(2)
    reshard.save(run.state, tmp_path)
    run.train(2)
    other = Run(net(seed=1), 1)
    other.model(X).sum().backward()
    reshard.load(other.state, tmp_path)
    other.model.zero_grad()
    other.train(2)
    check_equal(other.values(), run.values())


class Branches(nn.Module):
    """A model with a part that gets no gradients at first."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.used, self.later = nn.Linear(6, 6), nn.Linear(6, 6)
        self.uses_all = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.used(x)
        return y + self.later(x) if self.uses_all else y


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("has_stepped", [True, False])
def test_parameters_that_were_never_updated_have_no_state_after_a_load(
    tmp_path: Path, kind: str, has_stepped: bool
) -> None:
    model = Branches(0)
    optimizer = optimizer_of(kind, model)
    trained(model, optimizer)
    reshard.save(reshard.training_state(model, optimizer), tmp_path)
    other = Branches(1)
    other_optimizer = optimizer_of(kind, other)
    if has_stepped:
        other.uses_all = True
        trained(other, other_optimizer)
    reshard.load(reshard.training_state(other, other_optimizer), tmp_path)
    assert not other_optimizer.state.get(other.later.weight)
    model.uses_all = other.uses_all = True
    check_equal(trained(other, other_optimizer), trained(model, optimizer))


def groups_of(model: nn.Sequential, *rates: tuple[int, float]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": [*model[layer].parameters()], "lr": rate} for layer, rate in rates])


def test_settings_follow_the_parameters_if_the_groups_are_in_another_order(tmp_path: Path) -> None:
    model = net()
    optimizer = groups_of(model, (0, 0.1), (2, 0.01))
    trained(model, optimizer)
    reshard.save(reshard.training_state(model, optimizer), tmp_path)
    other = net(seed=1)
    other_optimizer = groups_of(other, (2, 0.5), (0, 0.5))
    reshard.load(reshard.training_state(other, other_optimizer), tmp_path)
    assert [group["lr"] for group in other_optimizer.param_groups] == [0.01, 0.1]
    check_equal(trained(other, other_optimizer), trained(model, optimizer))
    with pytest.raises(ArgumentError, match=r"one group, but they were saved with different settings, .*'lr': 0\.1"):
        reshard.load(reshard.training_state(other, torch.optim.AdamW(other.parameters())), tmp_path)


def stage(seed: int, stages: int) -> tuple[nn.ModuleDict, torch.optim.Optimizer]:
    """Return the layers of this rank's pipeline stage, out of four."""
    rank, each = dist.get_rank(), 4 // stages
    layers = range(rank * each, (rank + 1) * each)
    torch.manual_seed(seed)
    model = nn.ModuleDict({f"layer{at}": nn.Linear(6, 6) for at in layers})
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train_stage(model: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    for _ in range(3):
        torch.stack([layer(X).square().mean() for layer in model.values()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def save_stages(uri: str, stages: int) -> tuple[tuple[str, ...], dict[str, torch.Tensor]]:
    model, optimizer = stage(dist.get_rank(), stages)
    train_stage(model, optimizer)
    report = reshard.save(reshard.training_state(model, optimizer), uri)
    return report.differing, train_stage(model, optimizer)


def load_stages(uri: str, stages: int) -> dict[str, torch.Tensor]:
    model, optimizer = stage(9, stages)
    reshard.load(reshard.training_state(model, optimizer), uri)
    return train_stage(model, optimizer)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_a_run_continues_with_other_pipeline_stages(ranks: RankPool, tmp_path: Path, stages: int) -> None:
    saved = ranks.run(2, save_stages, str(tmp_path), 2)
    assert [differing for differing, _ in saved] == [(), ()]
    expected = {name: value for _, values in saved for name, value in values.items()}
    found = {
        name: value
        for values in ranks.run(stages, load_stages, str(tmp_path), stages)
        for name, value in values.items()
    }
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected)


def of_fsdp1(seed: int, use_orig_params: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = FullyShardedDataParallel(net(seed), device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def trained_by_fsdp1(model: Any, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    trained(model, optimizer)
    with FullyShardedDataParallel.summon_full_params(model):
        return [parameter.detach().clone() for parameter in model.parameters()]


def continue_fsdp1(folder: str, use_orig_params: bool) -> None:
    for steps in (0, 3):
        model, optimizer = of_fsdp1(0, use_orig_params)
        if steps:
            trained(model, optimizer)
        report = reshard.save(reshard.training_state(model, optimizer), f"{folder}/{steps}")
        assert report.differing == ()
        other, other_optimizer = of_fsdp1(1, use_orig_params)
        reshard.load(reshard.training_state(other, other_optimizer), f"{folder}/{steps}")
        check_equal(trained_by_fsdp1(other, other_optimizer), trained_by_fsdp1(model, optimizer))


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_a_run_under_fsdp1_continues(ranks: RankPool, tmp_path: Path, use_orig_params: bool) -> None:
    ranks.run(2, continue_fsdp1, str(tmp_path), use_orig_params)


class PartlyUsed(nn.Module):
    """A model whose second layer is used from the second step on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, step: int) -> torch.Tensor:
        y: torch.Tensor = self.first(x)
        return self.second(y) if step else y


KINDS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, lr=0.01),
    "rprop": partial(torch.optim.Rprop, lr=0.01),
    "nadam": partial(torch.optim.NAdam, lr=0.01),
    "asgd": partial(torch.optim.ASGD, lr=0.01),
    "dampened": partial(torch.optim.SGD, lr=0.01, momentum=0.9, dampening=0.5),
    "sgd": partial(torch.optim.SGD, lr=0.01),
}


def train_partly(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = model(X, step).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def continue_partly_used(folder: str, use_orig_params: bool, kind: str) -> None:
    def create(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = PartlyUsed()
        for layer in ("first", "second"):
            wrapped = FullyShardedDataParallel(
                getattr(model, layer), device_id=torch.device("cpu"), use_orig_params=use_orig_params
            )
            setattr(model, layer, wrapped)
        return model, KINDS[kind](list(model.parameters()))

    expected = train_partly(*create(0), range(4))
    model, optimizer = create(0)
    train_partly(model, optimizer, range(1))
    reshard.save(reshard.training_state(model, optimizer), folder)
    assert train_partly(model, optimizer, range(1, 4)) == expected[1:]
    model, optimizer = create(1)
    train_partly(model, optimizer, range(1, 2))
    reshard.load(reshard.training_state(model, optimizer), folder)
    assert train_partly(model, optimizer, range(1, 4)) == expected[1:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_parameters_of_fsdp1_that_were_not_updated_have_no_state_after_a_load(
    ranks: RankPool, tmp_path: Path, use_orig_params: bool, kind: str
) -> None:
    ranks.run(2, continue_partly_used, str(tmp_path / "run"), use_orig_params, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_that_are_trained_after_the_load_for_the_first_time(tmp_path: Path, kind: str) -> None:
    def create() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = PartlyUsed()
        return model, KINDS[kind](model.parameters())

    model, optimizer = create()
    model.first.requires_grad_(False)
    train_partly(model, optimizer, range(1, 3))
    reshard.save(reshard.training_state(model, optimizer), tmp_path)
    model.first.requires_grad_(True)
    expected = train_partly(model, optimizer, range(3, 6))
    model, optimizer = create()
    reshard.load(reshard.training_state(model, optimizer), tmp_path, strict=False)
    assert train_partly(model, optimizer, range(3, 6)) == expected


class WithMasterWeights(torch.optim.Optimizer):
    """Keeps float32 copies of bfloat16 parameters, and states of other kinds."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state["master"], state["codes"] = parameter.float(), torch.zeros(3, dtype=torch.int8)
                        state["note"], state["several"], state["count"] = "", [torch.zeros(2), 1], 0
                    state["master"] -= group["lr"] * parameter.grad.float()
                    state["note"] += "x"
                    state["count"] += 1
                    state["codes"] += 1
                    state["several"][0] += 0.1
                    parameter.copy_(state["master"])


def test_states_are_loaded_in_their_own_dtype(tmp_path: Path) -> None:
    model = net().bfloat16()
    optimizer = WithMasterWeights(model.parameters())
    for _ in range(3):
        model(X.bfloat16()).square().mean().backward()
        optimizer.step()
    reshard.save(reshard.training_state(model, optimizer), tmp_path)
    other = net(seed=1).bfloat16()
    other_optimizer = WithMasterWeights(other.parameters())
    report = reshard.load(reshard.training_state(other, other_optimizer), tmp_path)
    assert report.cast == ()
    for saved, loaded in zip(model.parameters(), other.parameters(), strict=True):
        expected, found = optimizer.state[saved], other_optimizer.state[loaded]
        assert (found["note"], found["count"], found["several"][1]) == (expected["note"], 3, 1)
        for one, two in ((found[key], expected[key]) for key in ("master", "codes")):
            assert one.dtype == two.dtype
            assert one.equal(two)
        assert found["several"][0].equal(expected["several"][0])


def test_an_optimizer_with_one_state_for_all_parameters_continues(tmp_path: Path) -> None:
    def create(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], torch.Tensor]]:
        model = net(seed)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = model(X).square().mean()
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)
        return model, optimizer, closure

    model, optimizer, closure = create(0)
    reshard.save(reshard.training_state(model, optimizer), tmp_path)
    other, other_optimizer, other_closure = create(1)
    reshard.load(reshard.training_state(other, other_optimizer), tmp_path)
    optimizer.step(closure)  # type: ignore[arg-type]
    other_optimizer.step(other_closure)  # type: ignore[arg-type]
    check_equal(list(other.parameters()), list(model.parameters()))


def test_an_optimizer_without_state_is_refused_if_its_state_would_be_lost(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    trained(model, optimizer)
    reshard.save({"model": model, "parts": [{"optimizer": optimizer}]}, tmp_path)
    fresh = torch.optim.AdamW(net(seed=1).parameters())
    other = net(seed=1)
    state = {"model": other, "parts": [{"optimizer": fresh}]}
    with pytest.raises(ArgumentError, match=r"'parts.0.optimizer' is an optimizer without state, so 12 names"):
        reshard.load(state, tmp_path)
    check_equal(list(other.parameters()), list(net(seed=1).parameters()))
    assert len(reshard.load(state, tmp_path, strict=False).unexpected_keys) == 12
    reshard.load(state, tmp_path, allow_missing="parts.0.optimizer.state.*")
    check_equal(list(other.parameters()), list(model.parameters()))


def test_an_optimizer_of_accelerate_continues(tmp_path: Path) -> None:
    """It wraps another one, and does not call the constructor of torch's class."""
    accelerator: Any = Accelerator(cpu=True)

    def create(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = net(seed)
        prepared: Any = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
        return prepared[0], prepared[1]

    try:
        model, optimizer = create(0)
        trained(model, optimizer)
        reshard.save(reshard.training_state(model, optimizer), tmp_path)
        other, other_optimizer = create(1)
        reshard.load(reshard.training_state(other, other_optimizer), tmp_path)
        check_equal(trained(other, other_optimizer), trained(model, optimizer))
    finally:
        AcceleratorState._reset_state(True)


def test_an_error_while_states_are_created_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    trained(model, optimizer)
    reshard.save(reshard.training_state(model, optimizer), tmp_path)
    other = net(seed=1)
    other[2].requires_grad_(False)
    other_optimizer = torch.optim.AdamW(other.parameters())
    trained(other, other_optimizer)
    other[2].requires_grad_(True)
    state = reshard.training_state(other, other_optimizer)

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", fail)
        with pytest.raises(UnsupportedValueError, match="OutOfMemoryError: no memory"):
            reshard.load(state, tmp_path)
    reshard.load(state, tmp_path)
    assert len(other_optimizer.state) == 4
    check_equal(trained(other, other_optimizer), trained(model, optimizer))


def test_parts_in_dicts_and_lists_are_updated(tmp_path: Path) -> None:
    def create(seed: int) -> tuple[dict[str, Any], list[nn.Module], list[StepLR]]:
        models: list[nn.Module] = [net(seed), net(seed + 1)]
        schedules = [StepLR(torch.optim.SGD(model.parameters(), lr=0.1), 2) for model in models]
        parts = {"models": {"a": models[0], "b": {"c": models[1]}}, "schedules": schedules, "counts": [1, {"n": seed}]}
        return {"parts": parts}, models, schedules

    state, models, schedules = create(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a schedule steps before its optimizer
        for _ in range(3):
            schedules[1].step()
    reshard.save(state, tmp_path)
    assert "parts.models.b.c.0.weight" in reshard.open(tmp_path).tensors
    other, other_models, other_schedules = create(5)
    counts = other["parts"]["counts"]
    reshard.load(other, tmp_path)
    for one, two in zip(models, other_models, strict=True):
        check_equal(list(two.parameters()), list(one.parameters()))
    assert [schedule.last_epoch for schedule in other_schedules] == [0, 3]
    assert other["parts"]["schedules"] is other_schedules
    assert counts == [1, {"n": 0}]


def test_an_optimizer_that_needs_a_closure_is_named(tmp_path: Path) -> None:
    model = net()
    message = r"LBFGS cannot create the states of 4 parameters that have not been updated yet, such as '0\.weight': "
    with pytest.raises(UnsupportedValueError, match=message):
        reshard.save(reshard.training_state(model, torch.optim.LBFGS(model.parameters())), tmp_path / "x")
    assert reshard.training_state(model, []).keys() == {"model"}


def test_names_do_not_depend_on_wrappers(tmp_path: Path) -> None:
    model = net()
    reshard.save(reshard.training_state(model), tmp_path / "plain")
    compiled: Any = torch.compile(net(seed=1), backend="eager")
    reshard.load(reshard.training_state(compiled), tmp_path / "plain")
    check_equal(list(compiled.parameters()), list(model.parameters()))
    assert set(reshard.open(tmp_path / "plain").tensors) == {f"model.{name}" for name in model.state_dict()}


def test_model_is_unchanged_if_the_optimizer_is_not_in_the_checkpoint(tmp_path: Path) -> None:
    reshard.save(reshard.training_state(net()), tmp_path / "plain")
    model = net(seed=1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(MissingTensorError, match="optimizer"):
        reshard.load(reshard.training_state(model, optimizer), tmp_path / "plain")
    check_equal(list(model.parameters()), before)


def run_of(kind: str, seed: int) -> Run:
    model: nn.Module = net(seed)
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return Run(model, seed)


def train_and_save(uri: str) -> list[torch.Tensor]:
    run = run_of("fsdp", 0)
    run.train(3)
    reshard.save(run.state, uri)
    run.train(2)
    return run.values()


def load_and_train(kind: str, uri: str) -> list[torch.Tensor]:
    run = run_of(kind, 1)
    reshard.load(run.state, uri)
    run.train(2)
    return run.values()


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_run_continues_under_another_layout(ranks: RankPool, tmp_path: Path, kind: str) -> None:
    expected = ranks.run(3, train_and_save, str(tmp_path))[0]
    for values in ranks.run(2, load_and_train, kind, str(tmp_path)):
        check_equal(values, expected)


def fit_by_lightning(folder: str, steps: int, kind: str = "auto", accumulated: int = 1) -> dict[str, Any]:
    """Return the whole model and the rate after a fit, and the steps that are saved."""
    import pytorch_lightning as pl
    from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy

    from reshard.integrations.lightning import CheckpointCallback

    class Lit(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def configure_model(self) -> None:
            if kind == "fsdp":
                assert self.device_mesh is not None
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            loss: torch.Tensor = self.net(batch).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
            schedule = {"scheduler": StepLR(optimizer, 2, gamma=0.5), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": schedule}

    strategies: dict[str, Any] = {
        "auto": lambda: "auto",
        "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
        "fsdp": lambda: ModelParallelStrategy(process_group_backend="gloo"),
    }
    module = Lit()
    rows: Any = [X[0]] * 64
    with (
        warnings.catch_warnings(),
        reshard.CheckpointManager(folder, save_every=2, keep=[reshard.latest(1)]) as manager,
    ):
        warnings.simplefilter("ignore")  # Lightning warns of few workers, of no logger, and so on
        trainer = pl.Trainer(
            max_steps=steps,
            callbacks=[CheckpointCallback(manager)],
            accumulate_grad_batches=accumulated,
            accelerator="cpu",
            devices=dist.get_world_size() if dist.is_initialized() else 1,
            strategy=strategies[kind](),
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            logger=False,
        )
        trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=2))
        manager.wait()
        assert manager.best_step("loss") == manager.latest_step()
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        weights = [w.full_tensor() if isinstance(w, DTensor) else w for w in module.parameters()]
        return {"weights": [w.detach() for w in weights], "lr": torch.tensor(rate), "steps": manager.steps()}


@pytest.mark.slow
@pytest.mark.parametrize("accumulated", [1, 2])
def test_lightning_continues_a_fit(tmp_path: Path, accumulated: int) -> None:
    expected = fit_by_lightning(str(tmp_path / "whole"), 9, accumulated=accumulated)
    run = str(tmp_path / "run")
    assert fit_by_lightning(run, 6, accumulated=accumulated)["steps"] == [6]
    torch.testing.assert_close(fit_by_lightning(run, 9, accumulated=accumulated), expected)


def fit_epochs(
    folder: Path | str,
    epochs: int,
    *,
    before: Sequence[Any] = (),
    after: Sequence[Any] = (),
    save_every: int = 4,
    limit: str = "max_epochs",
    validates: bool = True,
    devices: int = 1,
) -> dict[str, Any]:
    """Return the model, the rates and the metrics of the last step after epochs of 4 batches.

    Args:
        before, after: callbacks that Lightning calls before and after that of reshard.
        limit: what ends the fit: "max_epochs", "max_steps" or "both".
    """
    import pytorch_lightning as pl
    from pytorch_lightning.strategies import DDPStrategy

    from reshard.integrations.lightning import CheckpointCallback

    class Lit(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.ends: torch.Tensor
            self.register_buffer("ends", torch.zeros(()))

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            loss: torch.Tensor = self.net(batch).square().mean()
            return loss

        def validation_step(self, batch: torch.Tensor, _: int) -> None:
            self.log("steps", float(self.global_step))
            self.log("loss", self.net(batch).square().mean())

        def on_train_epoch_end(self) -> None:
            self.ends += 1

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
            plateau = ReduceLROnPlateau(optimizer, patience=0, threshold=0.9)
            with_loss = {"scheduler": plateau, "monitor": "loss"}
            return {"optimizer": optimizer, "lr_scheduler": with_loss if validates else StepLR(optimizer, 1, 0.5)}

    module = Lit()
    data = torch.utils.data.DataLoader([X[0]] * 8 * devices, batch_size=2)  # type: ignore[arg-type, var-annotated]
    with (
        warnings.catch_warnings(),
        reshard.CheckpointManager(folder, save_every=save_every, asynchronous=False) as manager,
    ):
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=-1 if limit == "max_steps" else epochs,
            max_steps={"max_epochs": -1, "max_steps": 4 * epochs, "both": 1000}[limit],
            callbacks=[*before, CheckpointCallback(manager), *after],
            accelerator="cpu",
            devices=devices,
            strategy=DDPStrategy(process_group_backend="gloo") if devices > 1 else "auto",
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            logger=False,
        )
        trainer.fit(module, data, data if validates else None)
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups] if trainer.optimizers else []
        return {
            **{name: values.detach() for name, values in module.state_dict().items()},
            "rates": torch.tensor(rates),
            "step": trainer.global_step,
            "metrics": manager.checkpoints()[-1].metrics,
            "saved": manager.steps(),
        }


@pytest.mark.slow
@pytest.mark.parametrize("validates", [False, True])
@pytest.mark.parametrize("limit", ["max_epochs", "max_steps", "both"])
def test_lightning_saves_the_end_of_an_epoch_with_its_validation(tmp_path: Path, limit: str, validates: bool) -> None:
    """A fit that continues there is the same as one that was not interrupted, and a finished one makes no steps."""
    expected = fit_epochs(tmp_path / "whole", 4, limit=limit, validates=validates)
    assert expected["step"] == 16
    assert expected["metrics"].get("steps") == (16 if validates else None)
    assert expected["ends"] == 4
    assert fit_epochs(tmp_path / "run", 2, limit=limit, validates=validates)["step"] == 8
    for _ in range(2):
        torch.testing.assert_close(fit_epochs(tmp_path / "run", 4, limit=limit, validates=validates), expected)


@pytest.mark.slow
def test_lightning_begins_no_epoch_after_a_stop_at_the_end_of_one(tmp_path: Path) -> None:
    import pytorch_lightning as pl

    from reshard.integrations.lightning import CheckpointCallback

    class Observer(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any, **__: Any) -> None:
            hooks.append("batch")
            if len(hooks) == 4:
                (ours,) = (one for one in trainer.callbacks if isinstance(one, CheckpointCallback))
                ours._manager.save_now(stop=True)
                time.sleep(1)  # the ranks agree meanwhile

        def on_train_epoch_end(self, *_: Any, **__: Any) -> None:
            hooks.append("end")

    hooks: list[str] = []
    assert fit_epochs(tmp_path, 3, after=[Observer()], save_every=100)["saved"] == [4]
    assert hooks == ["batch"] * 4 + ["end"]
    assert fit_epochs(tmp_path, 3, after=[Observer()], save_every=100)["ends"] == 3
    assert hooks == (["batch"] * 4 + ["end"]) * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "step", "saved", "is_first"),
    [
        ("on_train_batch_start", 1, 2, False),
        ("on_train_batch_end", 2, 2, False),
        ("on_train_batch_end", 2, 2, True),
        ("on_train_batch_end", 4, 4, False),
        ("on_validation_batch_start", 4, 4, True),
        ("on_train_epoch_end", 4, 4, False),
        ("on_train_epoch_end", 8, 8, True),
    ],
)
def test_lightning_saves_once_more_after_sigterm(
    tmp_path: Path, hook: str, step: int, saved: int, is_first: bool
) -> None:
    import pytorch_lightning as pl

    class Terminator(pl.Callback):
        def terminate(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == step:
                os.kill(os.getpid(), signal.SIGTERM)

    setattr(Terminator, hook, Terminator.terminate)
    callbacks = [Terminator()]
    with pytest.raises(SystemExit):
        fit_epochs(tmp_path, 2, save_every=100, before=callbacks * is_first, after=callbacks * (not is_first))
    with reshard.CheckpointManager(tmp_path, read_only=True) as manager:
        assert manager.steps() == [saved]
    assert fit_epochs(tmp_path, 2, save_every=100)["step"] == 8


@contextmanager
def as_torchrun() -> Iterator[None]:
    """Set the variables that torchrun sets."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    torchrun = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0", "WORLD_SIZE": size, "TORCHELASTIC_RUN_ID": "0"}
    before = dict(os.environ)
    os.environ |= {**torchrun, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


def fit_on_ranks(folder: str, steps: int, kind: str) -> dict[str, Any]:
    with as_torchrun():
        return fit_by_lightning(folder, steps, kind)


def fit_until_sigterm(folder: str, signalled: int) -> list[int]:
    import pytorch_lightning as pl

    class Terminator(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
            if trainer.global_step == 2 and dist.get_rank() == signalled:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)  # the ranks agree meanwhile

    with as_torchrun():
        saved: list[int] = fit_epochs(folder, 50, after=[Terminator()], save_every=1000, devices=2)["saved"]
        return saved


@pytest.mark.parametrize("signalled", [0, 1])
def test_lightning_saves_once_more_after_sigterm_on_one_rank(ranks: RankPool, tmp_path: Path, signalled: int) -> None:
    first, second = ranks.run(2, fit_until_sigterm, str(tmp_path), signalled)
    assert first == second
    assert len(first) == 1


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_lightning_continues_a_fit_on_another_number_of_ranks(ranks: RankPool, tmp_path: Path, kind: str) -> None:
    expected = ranks.run(2, fit_on_ranks, str(tmp_path / "whole"), 9, kind)[0]
    ranks.run(3, fit_on_ranks, str(tmp_path / "run"), 6, kind)
    for found in ranks.run(2, fit_on_ranks, str(tmp_path / "run"), 9, kind):
        torch.testing.assert_close(found, expected)


def fit_by_transformers(folder: Path | None, steps: int, **arguments: Any) -> tuple[dict[str, Any], list[int]]:
    """Return the model and the rate after a training, and the steps that are saved."""
    import transformers

    from reshard.integrations.transformers import CheckpointCallback

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.net(x).square().mean()}

    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = LambdaLR(optimizer, lambda step: 0.5 ** (step // 2))
    options = {"max_steps": steps, "logging_steps": 1, **arguments}
    settings = transformers.TrainingArguments(
        "out",
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    keep = [reshard.latest(1)]
    with reshard.CheckpointManager(folder or "unused", save_every=2, keep=keep, read_only=folder is None) as manager:
        callbacks: Any = [] if folder is None else [CheckpointCallback(manager)]
        data: Any = [{"x": X[0]}] * 8
        trainer = transformers.Trainer(
            model, settings, train_dataset=data, callbacks=callbacks, optimizers=(optimizer, schedule)
        )
        trainer.train()
        manager.wait()
        assert trainer.state.global_step == steps
        assert manager.best_step("loss") == manager.latest_step()
        rate = torch.tensor(optimizer.param_groups[0]["lr"])
        return {**model.state_dict(), "lr": rate}, manager.steps()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning")  # of transformers
@pytest.mark.parametrize("by_epochs", [False, True])
def test_transformers_continues_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_epochs: bool) -> None:
    monkeypatch.chdir(tmp_path)

    def arguments(steps: int) -> dict[str, Any]:
        return {"max_steps": -1, "num_train_epochs": steps / 4} if by_epochs else {}

    expected, _ = fit_by_transformers(None, 12, **arguments(12))
    run = tmp_path / "run"
    assert fit_by_transformers(run, 6, **arguments(6))[1] == [6]
    found, steps = fit_by_transformers(run, 12, **arguments(12))
    assert steps == [12]
    torch.testing.assert_close(found, expected)


def test_value_that_cannot_be_saved_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="hook"):
        reshard.save(reshard.training_state(net(), hook=lambda: None), tmp_path / "x")


def test_wrong_arguments_are_refused() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for wrong in (None, model.state_dict()):
        with pytest.raises(ArgumentError, match=r"model must be a torch\.nn\.Module, got"):
            reshard.training_state(wrong)  # type: ignore[arg-type]
    for passed in (schedule, [optimizer, schedule], 3):
        with pytest.raises(ArgumentError, match=r"optimizer must be one or several .*, got (StepLR|int)"):
            reshard.training_state(model, passed)  # type: ignore[arg-type]


def test_parameters_that_the_model_lacks_are_named(tmp_path: Path) -> None:
    model, head = nn.Linear(2, 2), nn.Linear(2, 5)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()])
    message = r"the optimizer has 2 parameters that are not in the model, the first of shape \(5, 2\): create"
    with pytest.raises(ArgumentError, match=message):
        reshard.save(reshard.training_state(model, optimizer), tmp_path)
    both = nn.ModuleDict({"model": model, "head": head})
    reshard.save(reshard.training_state(both, optimizer), tmp_path)


def two_optimizers(*kinds: tuple[type[torch.optim.Optimizer], dict[str, Any]]) -> Callable[[nn.Sequential], Any]:
    return lambda model: [
        kind(list(model[at].parameters()), lr=0.1, **settings)  # type: ignore[call-arg]
        for at, (kind, settings) in zip((0, 2), kinds, strict=True)
    ]


def groups_of_sgd(model: nn.Sequential) -> Any:
    groups: list[dict[str, Any]] = [
        {"params": list(model[0].parameters()), "momentum": 0.9},
        {"params": list(model[2].parameters())},
    ]
    return [torch.optim.SGD(groups, lr=0.1)]


ADAM: tuple[type[torch.optim.Optimizer], dict[str, Any]] = torch.optim.AdamW, {}
SGD: tuple[type[torch.optim.Optimizer], dict[str, Any]] = torch.optim.SGD, {}
PARTLY_STATELESS: dict[str, Callable[[nn.Sequential], Any]] = {
    "adam and sgd": two_optimizers(ADAM, SGD),
    "sgd and adam": two_optimizers(SGD, ADAM),
    "two without states": two_optimizers(SGD, SGD),
    "a group without momentum": groups_of_sgd,
}


@pytest.mark.parametrize("case", PARTLY_STATELESS)
@pytest.mark.parametrize("steps_before", [(0, 2), (2, 0), (2, 2)])
def test_optimizers_of_which_some_parameters_have_no_state_continue(
    tmp_path: Path, case: str, steps_before: tuple[int, int]
) -> None:
    """torch's set_optimizer_state_dict refuses their checkpoints."""

    def train(model: nn.Sequential, optimizers: list[torch.optim.Optimizer], steps: int) -> list[torch.Tensor]:
        for _ in range(steps):
            model(X).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return [parameter.detach() for parameter in model.parameters()]

    models = [net(), net(seed=1)]
    optimizers = [PARTLY_STATELESS[case](model) for model in models]
    for model, own, steps in zip(models, optimizers, steps_before, strict=True):
        train(model, own, steps)
    reshard.save(reshard.training_state(models[0], optimizers[0]), tmp_path)
    reshard.load(reshard.training_state(models[1], optimizers[1]), tmp_path)
    check_equal(train(models[1], optimizers[1], 3), train(models[0], optimizers[0], 3))


class CountsSteps(torch.optim.Optimizer):
    """Keeps a number in the settings of its groups, as optimizers without a schedule do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1, "steps": 0})

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["steps"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter].setdefault("seen", torch.zeros_like(parameter)).add_(1)


class OfBaseClass(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("kind", [CountsSteps, OfBaseClass, torch.optim.AdamW, torch.optim.SGD])
def test_save_calls_no_hook_of_the_optimizer_and_changes_no_setting(tmp_path: Path, kind: Any) -> None:
    torch.optim.AdamW([torch.zeros(1)])  # torch lets the step of a class call hooks when the first one is created
    model = Branches(0)
    optimizer = kind(model.parameters())
    schedule = StepLR(optimizer, 1)
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    for _ in range(2):
        model(X).sum().backward()
        optimizer.step()
        schedule.step()
        settings, calls = dict(optimizer.param_groups[0]), len(called)
        assert calls
        reshard.save(reshard.training_state(model, optimizer, schedule=schedule), tmp_path, overwrite=True)
        assert optimizer.param_groups[0] == settings
        assert len(called) == calls
    assert optimizer.param_groups[0].get("steps", 2) == 2


class OfItsOwn(torch.optim.Optimizer):
    """One that counts its steps in many ways, decays weights whatever the learning rate is, and draws numbers."""

    __slots__ = ("slot",)

    def __init__(self, parameters: Any, lr: float = 0.1, wd: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr, "wd": wd})
        self.steps = 0
        self.steps_as_tensor = torch.zeros(())
        self.lengths: list[int] = []
        self.by_step: dict[int, float] = {}
        self.nested = {"array": np.zeros(2), "inside": ([torch.zeros(2)], deque([0]))}
        self.slot = 0
        self.alias = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        self.steps_as_tensor += 1
        self.lengths.append(self.steps)
        self.by_step[self.steps] = random.random() + np.random.random()
        self.is_begun = True
        self.nested["array"] += 1  # type: ignore[operator]
        self.nested["inside"][0][0].add_(1)  # type: ignore[index]
        self.nested["inside"][1].append(self.steps)  # type: ignore[index]
        self.slot += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.state[parameter]["mean"] = torch.zeros_like(parameter)
                parameter.mul_(1 - group["wd"]).add_(torch.randn_like(parameter), alpha=0.01)
                parameter.sub_(self.state[parameter]["mean"].lerp_(parameter.grad, 0.1), alpha=group["lr"] / self.steps)


class Around(torch.optim.Optimizer):
    """One that steps another optimizer."""

    def __init__(self, parameters: Any) -> None:
        self.inner = OfItsOwn(parameters)
        super().__init__(self.inner.param_groups, {})
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def step(self, closure: Any = None) -> Any:
        self.inner.step()


class LookAhead(torch.optim.Optimizer):
    """One around another optimizer, with states of its own."""

    def __init__(self, parameters: Any) -> None:
        self.inner = OfItsOwn(parameters)
        super().__init__(self.inner.param_groups[0]["params"], {"slow": 0.5})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.inner.step()
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                slow = self.state[parameter].setdefault("mean", parameter.clone())
                parameter.copy_(slow.lerp_(parameter, self.param_groups[0]["slow"]))


def test_a_save_does_not_change_the_states_of_an_inner_optimizer(tmp_path: Path) -> None:
    model = net()
    optimizer = LookAhead(model.parameters())
    model(X).sum().backward()
    optimizer.inner.step()
    states = {p: {key: value.clone() for key, value in state.items()} for p, state in optimizer.inner.state.items()}
    settings = dict(optimizer.inner.param_groups[0])
    reshard.save(reshard.training_state(model, optimizer), tmp_path / "1")
    assert optimizer.inner.state.keys() == states.keys()
    for parameter, state in states.items():
        check_equal(list(optimizer.inner.state[parameter].values()), list(state.values()))
    assert optimizer.inner.param_groups[0] == settings
    fresh = LookAhead(model.parameters())
    reshard.save(reshard.training_state(model, fresh), tmp_path / "2")
    assert not fresh.inner.state


class ReturnsInner(torch.optim.Optimizer):
    """One around another optimizer that saves the states of that one, as timm's Lookahead does."""

    def __init__(self, parameters: Any) -> None:
        self.inner = torch.optim.Adam(parameters, lr=0.1)
        super().__init__(self.inner.param_groups, {})
        self.param_groups = self.inner.param_groups
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.inner.step()
        self.steps += 1
        for parameter in self.param_groups[0]["params"]:
            if self.steps % 3 == 0:
                slow = self.state[parameter].setdefault("slow", parameter.clone())
                parameter.copy_(slow.lerp_(parameter, 0.5))

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.inner.load_state_dict(state_dict)
        self.param_groups = self.inner.param_groups


@pytest.mark.parametrize("steps", [0, 2, 4])
@pytest.mark.parametrize("has_stepped", [False, True])
def test_an_optimizer_that_returns_the_states_of_an_inner_one_continues(
    tmp_path: Path, steps: int, has_stepped: bool
) -> None:
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            model(X).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    model = net()
    optimizer = ReturnsInner(model.parameters())
    train(model, optimizer, steps)
    for number in range(2):
        reshard.save(reshard.training_state(model, optimizer), tmp_path / str(number))
    assert len(optimizer.inner.state) == (4 if steps else 0)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    states = copy.deepcopy(optimizer.inner.state_dict()["state"])
    other = net()
    resumed = ReturnsInner(other.parameters())
    train(other, resumed, 2 if has_stepped else 0)
    report = reshard.load(reshard.training_state(other, resumed), tmp_path / "1")
    assert not report.missing_keys
    assert not report.unexpected_keys
    check_equal(list(other.state_dict().values()), list(expected.values()))
    found = resumed.inner.state_dict()["state"]
    assert found.keys() == states.keys()
    for at, values in states.items():
        check_equal([found[at][key] for key in values], list(values.values()))


def test_a_save_does_not_change_an_optimizer_that_another_one_refers_to(tmp_path: Path) -> None:
    model = net()
    warm: Any = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(3):
        model(X).sum().backward()
        warm.step()
    optimizer: Any = torch.optim.AdamW(model.parameters())
    optimizer.previous = warm
    reshard.save(reshard.training_state(model, optimizer), tmp_path)
    assert [state["step"].item() for state in warm.state.values()] == [3.0] * 4
    assert not optimizer.state


class OfMasters(torch.optim.Optimizer):
    """One that steps optimizers of copies of its parameters, and assigns the results."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.masters = [parameter.detach().clone() for parameter in self.param_groups[0]["params"]]
        self.inner = {"all": [torch.optim.Adam([master], lr=0.1) for master in self.masters]}
        self.average = nn.Linear(2, 2)
        self.generator = torch.Generator()
        self.mask = np.zeros(3)
        self.mask.flags.writeable = False
        self.expanded = torch.zeros(1).expand(3)
        self.on_meta = torch.zeros(3, device="meta")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        parameters = self.param_groups[0]["params"]
        torch.rand(3, generator=self.generator)
        self.average.weight.mul_(0.5)
        for parameter, master, inner in zip(parameters, self.masters, self.inner["all"], strict=True):
            if parameter.grad is not None:
                self.state[parameter].setdefault("seen", torch.zeros_like(parameter))
                master.grad = parameter.grad.clone()
                inner.step()
                parameter.data = master.clone() * 0.5


def test_a_save_does_not_change_optimizers_in_containers(tmp_path: Path) -> None:
    model = net()
    optimizer = OfMasters(model.parameters())
    for inner, master in zip(optimizer.inner["all"], optimizer.masters, strict=True):
        master.grad = torch.ones_like(master)
        inner.step()

    def everything() -> list[torch.Tensor]:
        states = [value for inner in optimizer.inner["all"] for s in inner.state.values() for value in s.values()]
        gradients = [master.grad for master in optimizer.masters if master.grad is not None]
        others = [optimizer.average.weight, optimizer.generator.get_state()]
        return [t.detach().clone() for t in (*model.parameters(), *optimizer.masters, *states, *gradients, *others)]

    before, places = everything(), [parameter.data_ptr() for parameter in model.parameters()]
    for number in range(2):
        reshard.save(reshard.training_state(model, optimizer), tmp_path / str(number))
        check_equal(everything(), before)
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    assert reshard.open(tmp_path / "0").read("model.0.weight").equal(before[0])


def test_the_scaler_of_accelerate_is_not_updated_by_a_save(tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True)
    model = net()
    scaler = torch.amp.GradScaler("cpu")
    wrap: Any = AcceleratedOptimizer
    optimizer = wrap(torch.optim.Adam(model.parameters()), scaler=scaler)
    called: list[Any] = []
    optimizer.optimizer.register_step_post_hook(lambda *_: called.append(1))
    for is_last in (True, False):
        optimizer.gradient_state._set_sync_gradients(is_last)
        reshard.save(reshard.training_state(model, optimizer), tmp_path / str(is_last))
        assert "optimizer.state.0.weight.exp_avg" in reshard.open(tmp_path / str(is_last)).tensors
    optimizer.gradient_state._set_sync_gradients(True)
    assert not called
    assert scaler._scale is None
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_save_of_an_optimizer_without_eps_changes_no_parameter(tmp_path: Path) -> None:
    model = net()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    reshard.save(reshard.training_state(model, torch.optim.Adam(model.parameters(), eps=0.0)), tmp_path)
    check_equal(list(model.parameters()), before)


@pytest.mark.parametrize("kind", [OfItsOwn, Around, LookAhead])
def test_a_save_changes_no_parameter_attribute_or_random_number(kind: Any, tmp_path: Path) -> None:
    def train(folder: Path | None) -> tuple[list[torch.Tensor], list[Any]]:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        model = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(2, 2)})
        optimizer = kind(model.parameters())
        for step in range(3):
            if folder is not None:
                reshard.save(reshard.training_state(model, optimizer), folder / str(step))
            model["used"](torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        inner = getattr(optimizer, "inner", optimizer)
        numbers = [random.random(), np.random.random(), torch.rand(()).item()]
        attributes = [inner.steps, inner.steps_as_tensor.item(), inner.lengths, inner.by_step, inner.slot, *numbers]
        attributes.append(str(inner.nested))
        return [parameter.detach().clone() for parameter in model.parameters()], attributes

    without, with_saves = train(None), train(tmp_path)
    check_equal(with_saves[0], without[0])
    assert with_saves[1] == without[1]
    first = reshard.open(tmp_path / "0")
    assert "optimizer.state.unused.weight.mean" in first.tensors


def test_parameter_in_two_optimizers_is_refused(tmp_path: Path) -> None:
    model = net()
    optimizers = [torch.optim.AdamW(model.parameters()), torch.optim.SGD(model[2].parameters())]
    with pytest.raises(ArgumentError, match=r"'2\.weight' is in several optimizers or groups"):
        reshard.save(reshard.training_state(model, optimizers), tmp_path / "x")


def trainer_of(manager: reshard.CheckpointManager, evaluated: Any, **arguments: Any) -> Any:
    import transformers

    from reshard.integrations.transformers import CheckpointCallback

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.net(x).square().mean()}

    settings = transformers.TrainingArguments(
        "out",
        per_device_train_batch_size=2,
        label_names=["x"],
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no", **arguments},
    )
    data: Any = [{"x": X[0]}] * 8  # 4 steps for each epoch
    callback: Any = CheckpointCallback(manager)
    return transformers.Trainer(Net(), settings, train_dataset=data, eval_dataset=evaluated, callbacks=[callback])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning")  # of transformers
@pytest.mark.parametrize("strategy", ["steps", "epoch"])
@pytest.mark.parametrize("logging_steps", [1, 500])
def test_metrics_of_transformers_are_those_of_the_saved_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, logging_steps: int
) -> None:
    monkeypatch.chdir(tmp_path)
    data: Any = [{"x": X[0]}] * 8
    every = 2 if strategy == "steps" else 4
    with reshard.CheckpointManager(tmp_path / "run", save_every=2, asynchronous=False) as manager:
        trainer = trainer_of(
            manager,
            data,
            num_train_epochs=3,
            learning_rate=0.3,
            eval_strategy=strategy,
            eval_steps=2,
            logging_steps=logging_steps,
        )
        trainer.train()
        evaluated = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
        assert list(evaluated) == list(range(every, 13, every))
        found = {one.step: one.metrics for one in manager.checkpoints()}
        assert list(found) == [2, 4, 6, 8, 10, 12]
        assert {step: values["eval_loss"] for step, values in found.items() if "eval_loss" in values} == evaluated
        assert all(("loss" in values) == (logging_steps == 1) for values in found.values())
        model = trainer.model
        for step, loss in evaluated.items():
            reshard.load({"model": model.state_dict()}, manager.location(int(step)), strict=False)
            torch.testing.assert_close(model(X[0])["loss"].item(), loss)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning")  # of transformers
def test_metrics_of_the_last_step_and_of_several_evaluations_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data: Any = [{"x": X[0]}] * 2
    with reshard.CheckpointManager(tmp_path / "run", save_every=3) as manager:
        evaluated = {"a": data, "b": data}
        trainer = trainer_of(manager, evaluated, max_steps=6, eval_strategy="epoch", logging_strategy="epoch")
        trainer.train()
        manager.wait()
        assert manager.steps() == [3, 6]
        assert manager.checkpoints()[0].metrics == {}
        assert {"eval_a_loss", "eval_b_loss", "loss"} <= manager.checkpoints()[1].metrics.keys()
        assert "train_runtime" not in manager.checkpoints()[1].metrics


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning")  # of transformers
@pytest.mark.parametrize("loads_best", [False, True])
def test_a_step_is_saved_with_its_own_weights_if_training_stops_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loads_best: bool
) -> None:
    """The trainer may replace the weights by the best ones before it ends."""
    import transformers

    monkeypatch.chdir(tmp_path)
    data: Any = [{"x": X[0]}] * 2
    seen: dict[int, torch.Tensor] = {}

    class Spy(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
            seen[state.global_step] = parts["model"].net[0].weight.detach().clone()

    with reshard.CheckpointManager(tmp_path / "run", asynchronous=False) as manager:
        options: dict[str, Any] = {"max_steps": 20, "eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1}
        if loads_best:
            options |= {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
            options |= {
                "metric_for_best_model": "eval_loss",
                "greater_is_better": True,
            }  # so that the first is the best
        trainer = trainer_of(manager, data, **options)
        trainer.add_callback(Spy())
        if loads_best:
            trainer.add_callback(transformers.EarlyStoppingCallback(2))
        trainer.train()
        steps = manager.steps()
        assert steps == list(seen) == list(range(1, len(steps) + 1))
        assert len(steps) == (3 if loads_best else 20)
        for step in steps:
            found = reshard.open(manager.location(step)).read("model.net.0.weight")
            assert found.equal(seen[step])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning")  # of transformers
def test_a_training_that_was_interrupted_in_an_evaluation_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data: Any = [{"x": X[0]}] * 2
    with reshard.CheckpointManager(tmp_path / "run", save_every=2) as manager:
        trainer = trainer_of(manager, data, max_steps=4, eval_strategy="steps", eval_steps=1)
        evaluate = trainer.evaluate

        def interrupt(*arguments: Any, **options: Any) -> Any:
            if trainer.state.global_step == 2:
                raise KeyboardInterrupt
            return evaluate(*arguments, **options)

        trainer.evaluate = interrupt
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert manager.steps() == []
        trainer.evaluate = evaluate
        trainer.train()
        manager.wait()
        assert manager.steps() == [2, 4]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning")  # of transformers
def test_a_requested_save_of_a_step_that_is_not_due_is_made_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data: Any = [{"x": X[0]}] * 2
    with reshard.CheckpointManager(tmp_path / "run", save_every=100) as manager:
        trainer = trainer_of(manager, data, max_steps=50, eval_strategy="steps", eval_steps=1)
        evaluate = trainer.evaluate

        def request(*arguments: Any, **options: Any) -> Any:
            if trainer.state.global_step == 2:
                manager.save_now(stop=True)
            return evaluate(*arguments, **options)

        trainer.evaluate = request
        trainer.train()
        assert manager.steps() == [trainer.state.global_step]
        assert manager.should_stop


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning")  # of transformers
def test_transformers_does_not_train_beyond_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    expected, _ = fit_by_transformers(run, 4)
    for _ in range(2):
        found, steps = fit_by_transformers(run, 4)
        assert steps == [4]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("part", "advice"),
    [
        (DataLoader(TensorDataset(torch.ones(4)), batch_size=2), "StatefulDataLoader"),
        (TensorDataset(torch.ones(4)), "leave it out"),
        (RandomSampler(TensorDataset(torch.ones(4))), "number of samples"),
        (torch.Generator(), "get_state"),
    ],
    ids=lambda part: type(part).__name__,
)
def test_parts_that_could_only_be_pickled_are_refused(part: object, advice: str) -> None:
    with pytest.raises(ArgumentError, match=f"'part' is a {type(part).__name__} without the methods .*{advice}"):
        reshard.training_state(nn.Linear(2, 2), part=part)


def test_parts_may_have_a_state_or_be_plain(tmp_path: Path) -> None:
    class Loader(DataLoader[tuple[torch.Tensor, ...]]):
        position = 3

        def state_dict(self) -> dict[str, int]:
            return {"position": self.position}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.position = state["position"]

    state = reshard.training_state(nn.Linear(2, 2), loader=Loader(TensorDataset(torch.ones(4))), epoch=7)
    reshard.save(state, tmp_path)
    loader = Loader(TensorDataset(torch.ones(4)))
    loader.position = 0
    state = reshard.training_state(nn.Linear(2, 2), loader=loader, epoch=0)
    reshard.load(state, tmp_path)
    assert (loader.position, state["epoch"]) == (3, 7)


def test_the_error_for_a_plain_optimizer_state_names_training_state(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    reshard.save(reshard.training_state(model, optimizer), tmp_path)
    for plain in (optimizer, torch.optim.Adam(model.parameters())):
        with pytest.raises(MissingTensorError, match=r"'optimizer' by parameters .* that training_state returns"):
            reshard.load({"model": model.state_dict(), "optimizer": plain.state_dict()}, tmp_path)


class Offsets:
    """A data loader whose state has items for what has been read. A new one has none."""

    def __init__(self, **state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return {"offsets": self.state, "epoch": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state["offsets"]


@pytest.mark.parametrize("format", ["reshard", "dcp", "torch"])
@pytest.mark.parametrize("items", [{"shard-0": 4, "shard-1": 3}, {"a": {"b": torch.arange(3)}, "c": [1, 2]}, {}])
def test_an_empty_dict_in_the_state_of_an_object_receives_what_was_saved(
    format: str, items: dict[str, Any], tmp_path: Path
) -> None:
    saved = {"loader": Offsets(**items), "nested": [{"loader": Offsets(**items)}]}
    if format == "torch":
        states = {"loader": saved["loader"].state_dict(), "nested": [{"loader": saved["loader"].state_dict()}]}  # type: ignore[attr-defined]
        torch.save(states, tmp_path / "c")
    else:
        reshard.save(saved, tmp_path / "native")
        reshard.convert(tmp_path / "native", tmp_path / "c", format=format)
    new, inner = Offsets(), Offsets()
    report = reshard.load({"loader": new, "nested": [{"loader": inner}]}, tmp_path / "c")
    assert report.unexpected_keys == report.missing_keys == ()
    assert str(new.state) == str(inner.state) == str(items)


def test_an_excluded_item_of_such_a_dict_is_left_out(tmp_path: Path) -> None:
    reshard.save({"loader": Offsets(a=4, b={"c": 3})}, tmp_path)
    for exclude, expected in (("loader.offsets.a", {"b": {"c": 3}}), ("loader.offsets.*", {}), ("*.c", {"a": 4})):
        new = Offsets()
        report = reshard.load({"loader": new}, tmp_path, exclude=(exclude, "unknown"))
        assert new.state == expected
        assert report.unused_patterns == ("unknown",)


def test_an_empty_dict_that_is_no_state_of_an_object_is_not_filled(tmp_path: Path) -> None:
    reshard.save({"offsets": {"a": 1}, "epoch": 2}, tmp_path)
    state = {"offsets": {}, "epoch": 0}
    assert reshard.load(state, tmp_path).unexpected_keys == ("offsets.a",)
    assert state == {"offsets": {}, "epoch": 2}


def test_a_new_optimizer_is_refused_rather_than_filled(tmp_path: Path) -> None:
    class Parts:
        def __init__(self, steps: int) -> None:
            self.model = nn.Linear(2, 2)
            self.optimizer = torch.optim.Adam(self.model.parameters())
            for _ in range(steps):
                self.model(torch.ones(1, 2)).sum().backward()
                self.optimizer.step()

        def state_dict(self) -> dict[str, Any]:
            return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.optimizer.load_state_dict(state["optimizer"])

    saved = Parts(2)
    reshard.save({"parts": saved}, tmp_path / "parts")
    reshard.save(saved.optimizer.state_dict(), tmp_path / "optimizer")
    new = Parts(0)
    with pytest.raises(ArgumentError, match=r"'parts\.optimizer' is an optimizer without state, so 6 names"):
        reshard.load({"parts": new}, tmp_path / "parts")
    with pytest.raises(ArgumentError, match=r"'the state dict' is an optimizer without state, so 6 names"):
        reshard.load(new.optimizer.state_dict(), tmp_path / "optimizer")
    report = reshard.load({"parts": new}, tmp_path / "parts", strict=False)
    assert any(name.startswith("parts.optimizer.state.") for name in report.unexpected_keys)
    reshard.load({"parts": new}, tmp_path / "parts", allow_missing="parts.optimizer.state.*")
    reshard.load({"parts": Parts(1)}, tmp_path / "parts")


@pytest.mark.parametrize("is_loaded_first", [False, True])
def test_a_scheduler_may_share_the_learning_rate_of_its_optimizer(is_loaded_first: bool, tmp_path: Path) -> None:
    def parts() -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.SequentialLR]:
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01))
        schedulers = [
            torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=3),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
        ]
        return model, optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, schedulers, milestones=[3])

    def train(
        model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.SequentialLR, n: int
    ) -> list[float]:
        found = []
        for _ in range(n):
            loss = model(torch.ones(1, 2)).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            found += [float(loss.detach()), float(optimizer.param_groups[0]["lr"])]
        return found

    def state_of(
        model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.SequentialLR
    ) -> dict[str, Any]:
        state = reshard.training_state(model, optimizer, scheduler=scheduler)
        return dict(reversed(state.items())) if is_loaded_first else state

    model, optimizer, scheduler = parts()
    train(model, optimizer, scheduler, 5)
    reshard.save(state_of(model, optimizer, scheduler), tmp_path)
    expected = train(model, optimizer, scheduler, 4)
    resumed = parts()
    reshard.load(state_of(*resumed), tmp_path)
    assert train(*resumed, 4) == expected


def test_an_optimizer_that_must_be_consolidated_is_refused() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.consolidate_state_dict = lambda to: None  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedValueError, match="SGD holds the states of some parameters on each rank"):
        reshard.training_state(model, optimizer)


class Whole:
    """An object whose state as a whole is empty at first."""

    def __init__(self, **state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def test_an_empty_state_receives_what_was_saved(tmp_path: Path) -> None:
    reshard.save({"e": Whole(a=1, t=torch.arange(3)), "x": 1}, tmp_path)
    new = Whole()
    assert reshard.load({"e": new, "x": 0}, tmp_path).unexpected_keys == ()
    assert str(new.state) == str({"a": 1, "t": torch.arange(3)})


def test_a_state_dict_that_contains_itself_and_an_object_is_refused(tmp_path: Path) -> None:
    reshard.save({"x": 1}, tmp_path)
    around: dict[str, Any] = {"o": Whole(a=1)}
    around["self"] = around
    with pytest.raises(UnsupportedValueError, match="more than 100 dicts and lists are nested"):
        reshard.load({"x": around}, tmp_path)


def test_a_model_without_parameters_has_an_empty_state(tmp_path: Path) -> None:
    stage = nn.Sequential(nn.ReLU(), nn.Dropout())
    stage.register_buffer("mask", torch.ones(2), persistent=False)
    reshard.save(reshard.training_state(stage, step=3), tmp_path / "stage")
    state = reshard.training_state(stage, step=0)
    reshard.load(state, tmp_path / "stage")
    assert state["step"] == 3
    reshard.save(reshard.training_state(net(), step=4), tmp_path / "whole")
    report = reshard.load(state, tmp_path / "whole")  # it does not receive the parameters of other stages
    assert state["step"] == 4
    assert report.unexpected_keys == ("model.0.bias", "model.0.weight", "model.2.bias", "model.2.weight")


def test_sparse_adam_continues(tmp_path: Path) -> None:
    def parts() -> tuple[nn.Embedding, torch.optim.SparseAdam]:
        torch.manual_seed(0)
        model = nn.Embedding(10, 4, sparse=True)
        return model, torch.optim.SparseAdam(model.parameters(), lr=0.1)

    def train(model: nn.Embedding, optimizer: torch.optim.SparseAdam, first: int) -> torch.Tensor:
        for step in range(first, first + 3):
            model(torch.tensor([step % 10, 2])).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.weight.detach().clone()

    model, optimizer = parts()
    reshard.save(reshard.training_state(model, optimizer), tmp_path / "new")
    train(model, optimizer, 0)
    reshard.save(reshard.training_state(model, optimizer), tmp_path / "trained")
    expected = train(model, optimizer, 3)
    for name, first in (("new", 0), ("trained", 3)):
        resumed = parts()
        reshard.load(reshard.training_state(*resumed), tmp_path / name)
        found = train(*resumed, first)
    assert found.equal(expected)
