"""Policies: which checkpoints of a run are kept."""

from __future__ import annotations

import datetime
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from ..errors import ArgumentError
from ..runtime.logs import logger_of

logger = logger_of(__name__)


@dataclass(frozen=True, slots=True)
class SavedStep:
    """A complete checkpoint of a run, as policies see it."""

    step: int
    time: datetime.datetime
    """When it was saved."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The metrics that were passed to `CheckpointManager.save`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", MappingProxyType(dict(self.metrics)))

    def __reduce__(self) -> tuple[type[SavedStep], tuple[int, datetime.datetime, dict[str, float]]]:
        return SavedStep, (self.step, self.time, dict(self.metrics))


Policy = Callable[[Sequence[SavedStep]], Iterable[int]]
"""Returns the steps to keep, as ints, given all complete checkpoints of a run in the order of steps.

A step without a checkpoint has no effect; a warning names the first one. If the policy fails or returns something else
than ints, the error is logged and nothing is removed.
"""


def latest(n: int) -> Policy:
    """Return a policy that keeps the checkpoints of the last `n` steps."""
    count = _positive("latest", n)

    def keep(saved: Sequence[SavedStep]) -> Iterable[int]:
        return [found.step for found in saved[-count:]]

    return keep


def every(n: int | datetime.timedelta) -> Policy:
    """Return a policy that keeps checkpoints at regular intervals.

    Args:
        n: a number of steps, to keep the steps that are divisible by it. Or a `timedelta`, to keep the first
            checkpoint, and then each one that was saved at least this time after the previous one that was kept.
    """
    if isinstance(n, datetime.timedelta):
        if n <= datetime.timedelta():
            raise ArgumentError(f"every() needs a positive time, got {n}")
        interval = n

        def keep_by_time(saved: Sequence[SavedStep]) -> Iterable[int]:
            kept: list[SavedStep] = []
            for found in saved:
                waited = found.time - kept[-1].time if kept else interval
                if waited >= interval or waited < datetime.timedelta():  # the clock was set back
                    kept.append(found)
            return [found.step for found in kept]

        return keep_by_time
    steps = _positive("every", n)

    def keep(saved: Sequence[SavedStep]) -> Iterable[int]:
        return [found.step for found in saved if found.step % steps == 0]

    return keep


def best(metric: str, n: int = 1, *, mode: Literal["min", "max"] = "min") -> Policy:
    """Return a policy that keeps the `n` checkpoints with the best values of a metric.

    Of equal values, the later step counts as better. A checkpoint without the metric, or with NaN, never counts as
    best. While no checkpoint has the metric, all of them are kept, and a warning names it, since its name may be wrong.

    Args:
        metric: the name of the metric, a key of the `metrics` of `CheckpointManager.save`.
        n: how many checkpoints are kept.
        mode: "min" if small values are good, "max" if large ones are.
    """
    count = _positive("best", n)
    if not isinstance(metric, str):
        raise ArgumentError(f"best() needs the name of a metric, got {metric!r}")
    check_mode(mode)
    warned = False

    def keep(saved: Sequence[SavedStep]) -> Iterable[int]:
        nonlocal warned
        if any(metric in found.metrics for found in saved):
            return [found.step for found in by_metric(saved, metric, mode)[:count]]
        if saved and not warned:
            known = sorted({name for found in saved for name in found.metrics})
            logger.warning(
                "best(%r) keeps all checkpoints: none of them has this metric; they have: %s. Pass it to save() in "
                "metrics",
                metric,
                ", ".join(map(repr, known)) or "none",
            )
            warned = True
        return [found.step for found in saved]

    return keep


def by_metric(saved: Iterable[SavedStep], metric: str, mode: Literal["min", "max"]) -> list[SavedStep]:
    """Return the checkpoints that have a metric other than NaN, the best first. Of equal values, the later is first."""
    sign = 1 if mode == "min" else -1
    having = [found for found in saved if not math.isnan(found.metrics.get(metric, math.nan))]
    return sorted(having, key=lambda found: (sign * found.metrics[metric], -found.step))


def check_mode(mode: object) -> None:
    """Raise ArgumentError if a mode is neither "min" nor "max"."""
    if mode not in ("min", "max"):
        raise ArgumentError(f'mode must be "min" or "max", got {mode!r}')


class CheckedPolicy:
    """A policy whose result is restricted to the steps of checkpoints. Other steps that it returns have no effect.

    Args:
        policy: the policy.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._warned = False

    def __call__(self, saved: Sequence[SavedStep]) -> set[int]:
        """Return the steps that are kept.

        Raises:
            ArgumentError: the policy failed, or returned values that are not ints.
        """
        name = _name_of(self._policy)
        try:
            returned = list(self._policy(saved))
        except Exception as error:
            raise ArgumentError(f"the policy {name} failed: {type(error).__name__}: {error}") from error
        steps = {self._number(step) for step in returned}
        others = steps - {found.step for found in saved}
        if others and not self._warned:
            logger.warning(
                "the policy %s returned step %d, which has no checkpoint: such steps are ignored, now and later",
                name,
                min(others),
            )
            self._warned = True
        return steps - others

    def _number(self, step: object) -> int:
        try:
            if isinstance(step, bool):
                raise TypeError("a bool")
            return operator.index(step)  # type: ignore[arg-type]
        except TypeError:
            raise ArgumentError(
                f"the policy {_name_of(self._policy)} returned {step!r}, which is not a step: it must return steps of "
                "the checkpoints that it receives, as ints, for example [found.step for found in saved]"
            ) from None


def check_policies(keep: Sequence[Policy] | None) -> tuple[CheckedPolicy, ...] | None:
    """Return checked policies, or None if all checkpoints are kept. Raises ArgumentError."""
    if keep is None:
        return None
    if callable(keep):
        raise ArgumentError(f"keep must be a list of policies, got {keep!r}: write keep=[latest(3)]")
    try:
        policies = tuple(keep)
    except TypeError:
        raise ArgumentError(f"keep must be a list of policies such as reshard.latest(3), got {keep!r}") from None
    if not policies:
        raise ArgumentError("keep is an empty list, which would keep nothing: pass None to keep all checkpoints")
    functions: list[tuple[object, str]] = [(latest, "latest(3)"), (every, "every(100)"), (best, 'best("loss")')]
    for policy in policies:
        if not callable(policy):
            raise ArgumentError(f"keep must contain policies such as reshard.latest(3), got {policy!r}")
        for function, example in functions:
            if policy is function:
                raise ArgumentError(f"keep contains the function {_name_of(policy)}: call it, as in reshard.{example}")
    return tuple(map(CheckedPolicy, policies))


def kept_steps(policies: Iterable[CheckedPolicy], saved: Sequence[SavedStep]) -> set[int]:
    """Return the steps that at least one policy keeps. The last one is always kept.

    Raises:
        ArgumentError: a policy failed, or returned values that are not ints.
    """
    ordered = sorted(saved, key=lambda found: found.step)
    kept = {ordered[-1].step} if ordered else set()
    for policy in policies:
        kept |= policy(tuple(ordered))
    return kept


def _name_of(policy: Policy) -> str:
    return getattr(policy, "__qualname__", None) or repr(policy)


def _positive(name: str, n: object) -> int:
    try:
        count = operator.index(n)  # type: ignore[arg-type]
    except TypeError:
        count = 0
    if isinstance(n, bool) or count < 1:
        raise ArgumentError(f"{name}() needs a whole number of 1 or more, got {n!r}")
    return count
