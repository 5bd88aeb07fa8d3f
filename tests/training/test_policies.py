"""Policies choose the checkpoints of a run that are kept."""

from __future__ import annotations

import datetime
import logging
import math
import pickle
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch

import reshard
from reshard.errors import ArgumentError
from reshard.storage.training.policies import check_policies, kept_steps

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def run(*losses: float | None, every: int = 100, minutes: int = 10) -> list[reshard.SavedStep]:
    """Return checkpoints of the steps 100, 200, ..., saved every few minutes."""
    return [
        reshard.SavedStep(
            (i + 1) * every, START + i * datetime.timedelta(minutes=minutes), {} if loss is None else {"loss": loss}
        )
        for i, loss in enumerate(losses)
    ]


def test_latest_keeps_the_last_steps() -> None:
    assert list(reshard.latest(2)(run(1, 2, 3))) == [200, 300]
    assert list(reshard.latest(5)(run(1, 2, 3))) == [100, 200, 300]


def test_every_keeps_multiples() -> None:
    assert list(reshard.every(200)(run(1, 2, 3, 4, 5))) == [200, 400]


def test_every_time_keeps_the_same_checkpoints_after_removals() -> None:
    policy = reshard.every(datetime.timedelta(minutes=25))
    saved = run(*[1.0] * 9)
    kept = list(policy(saved))
    assert kept == [100, 400, 700]
    assert list(policy([found for found in saved if found.step in kept])) == kept


@pytest.mark.parametrize(
    ("hours", "kept"),
    [
        ([0, 24 * 365, 2, 3, 4, 5], [100, 200, 300, 400, 500, 600]),
        ([0, 1, 2, 3, 1, 2, 3], [100, 200, 300, 400, 500, 600, 700]),
        ([0, 0.4, 0.8, 1.2, 0.1, 0.5, 1.2], [100, 400, 500, 700]),
    ],
)
def test_every_time_keeps_checkpoints_after_the_clock_was_set_back(hours: list[float], kept: list[int]) -> None:
    saved = [
        reshard.SavedStep(100 * (i + 1), START + datetime.timedelta(hours=hour), {}) for i, hour in enumerate(hours)
    ]
    assert list(reshard.every(datetime.timedelta(hours=1))(saved)) == kept


def test_best_keeps_the_smallest_or_largest_values() -> None:
    saved = run(3, 1, 2, 5)
    assert set(reshard.best("loss", 2)(saved)) == {200, 300}
    assert set(reshard.best("loss", 2, mode="max")(saved)) == {400, 100}


def test_best_prefers_the_later_of_equal_values() -> None:
    assert list(reshard.best("loss")(run(1, 1, 2))) == [200]
    assert list(reshard.best("loss", mode="max")(run(2, 2, 1))) == [200]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_nan_and_missing_metrics_never_count_as_best(mode: Any) -> None:
    assert list(reshard.best("loss", 5, mode=mode)(run(math.nan, 1, None, math.nan))) == [200]
    assert list(reshard.best("loss", 5, mode=mode)(run(math.nan, math.nan))) == []


def test_infinite_metrics_count() -> None:
    assert list(reshard.best("loss", 1)(run(math.inf, 3))) == [200]
    assert list(reshard.best("loss", 1, mode="max")(run(math.inf, 3))) == [100]


def test_best_keeps_all_checkpoints_and_warns_once_if_none_has_the_metric(caplog: pytest.LogCaptureFixture) -> None:
    policy = reshard.best("lss")
    with caplog.at_level(logging.WARNING):
        assert list(policy(run(1, 2))) == [100, 200]
        assert list(policy(run(1, 2))) == [100, 200]
        assert list(policy([])) == []
    message = "best('lss') keeps all checkpoints: none of them has this metric; they have: 'loss'"
    assert [record.getMessage() for record in caplog.records] == [f"{message}. Pass it to save() in metrics"]


def kept_by(policies: Sequence[reshard.Policy], saved: Sequence[reshard.SavedStep]) -> set[int]:
    checked = check_policies(policies)
    assert checked is not None
    return kept_steps(checked, saved)


def test_checkpoint_is_kept_if_any_policy_keeps_it() -> None:
    saved = run(1, 5, 6, 7, 8, 9)
    assert kept_by([reshard.latest(1), reshard.every(300), reshard.best("loss")], saved) == {100, 300, 600}


def test_last_checkpoint_is_kept_even_if_no_policy_keeps_it() -> None:
    def none(saved: Sequence[reshard.SavedStep]) -> Iterable[int]:
        return []

    assert kept_by([none], run(1, 2, 3)) == {300}
    assert kept_by([none], []) == set()


@pytest.mark.parametrize(
    "returned",
    [["100"], [100.0], [True], run(1), None, 100, [START], torch.tensor([100.0])],
    ids=["text", "float", "bool", "checkpoints", "none", "number", "time", "tensor"],
)
def test_policy_that_does_not_return_steps_is_refused(returned: Any) -> None:
    def odd(saved: Sequence[reshard.SavedStep]) -> Iterable[int]:
        kept: Iterable[int] = returned
        return kept

    with pytest.raises(ArgumentError, match=r"the policy .*odd (returned|failed)"):
        kept_by([odd], run(1, 2, 3))


def test_steps_without_a_checkpoint_are_ignored_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    def fixed(saved: Sequence[reshard.SavedStep]) -> Iterable[int]:
        return [100, 77, -1, 500]

    policies = check_policies([fixed])
    assert policies is not None
    assert kept_steps(policies, run(1, 2, 3)) == {100, 300}
    assert kept_steps(policies, run(1, 2, 3, 4, 5, 6)) == {100, 500, 600}
    (message,) = caplog.messages
    assert "fixed returned step -1, which has no checkpoint" in message


def test_policy_may_return_integers_of_other_libraries() -> None:
    def of_tensor(saved: Sequence[reshard.SavedStep]) -> Iterable[int]:
        steps: Any = torch.tensor([found.step for found in saved])
        kept: Iterable[int] = steps[:1]
        return kept

    kept = kept_by([of_tensor], run(1, 2, 3))
    assert kept == {100, 300}
    assert all(type(step) is int for step in kept)


def test_policies_see_the_checkpoints_in_the_order_of_steps() -> None:
    seen: list[int] = []

    def policy(saved: Sequence[reshard.SavedStep]) -> Iterable[int]:
        seen.extend(found.step for found in saved)
        return []

    kept_by([policy], run(1, 2, 3)[::-1])
    assert seen == [100, 200, 300]


def test_saved_step_is_immutable_and_can_be_pickled() -> None:
    found = run(1)[0]
    with pytest.raises(TypeError):
        found.metrics["loss"] = 2  # type: ignore[index]
    assert pickle.loads(pickle.dumps(found)) == found  # noqa: S301


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: reshard.latest(0), r"latest\(\) needs a whole number of 1 or more, got 0"),
        (lambda: reshard.latest(True), "got True"),
        (lambda: reshard.every(2.5), r"every\(\) needs a whole number of 1 or more, got 2.5"),  # type: ignore[arg-type]
        (lambda: reshard.every(datetime.timedelta()), "every.. needs a positive time"),
        (lambda: reshard.best("loss", -1), r"best\(\) needs"),
        (lambda: reshard.best(3, 1), r"best\(\) needs the name of a metric, got 3"),  # type: ignore[arg-type]
        (lambda: reshard.best("loss", mode="least"), 'mode must be "min" or "max", got \'least\''),  # type: ignore[arg-type]
    ],
    ids=["zero", "bool", "float", "no time", "negative", "metric", "mode"],
)
def test_wrong_arguments_of_policies_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()
