"""`reshard plan`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import typer

import reshard
from reshard.planner.costs import UNBOUNDED, Costs
from reshard.planner.layout import Layout, Rule, Shard, StridedShard
from reshard.planner.report import PlanReport, WholeShards
from reshard.storage.checkpoint import Checkpoint

from .common import in_bytes, print_json, print_table, storage_options
from .fold import ranges

COLUMNS = (
    "ranks",
    "needed",
    "fetched",
    "x",
    "requests",
    "objects",
    "seconds",
    "dollars",
    "whole shards",
    "x",
    "seconds",
)


@dataclass(frozen=True, slots=True)
class Link:
    """What a rank has to the store."""

    latency_s: float
    bytes_per_s: float
    requests_at_once: int
    dollars_per_1000: float

    def seconds(self, nbytes: int, requests: int, at_once: int | None = None) -> float:
        """How long a rank takes for its requests: their latencies, so many at once, and their bytes."""
        rounds = -(-requests // (at_once or self.requests_at_once))
        return rounds * self.latency_s + nbytes / self.bytes_per_s


def run(
    uri: str,
    mesh: Mapping[str, int],
    tp_plan: list[str],
    names: str,
    link: Link,
    max_over_read: float | None,
    format: str | None,
    options: list[str] | None,
    as_json: bool,
) -> None:
    checkpoint = reshard.open(uri, storage_options=storage_options(options), format=format)
    layout = Layout(mesh, _rules(checkpoint, mesh, _words(checkpoint, tp_plan, mesh.get("tp", 1))))
    costs = Costs(link.latency_s, link.bytes_per_s, link.requests_at_once, UNBOUNDED)
    plans = checkpoint.plan(layout, names=names, max_over_read=max_over_read, costs=costs)
    shards = checkpoint.whole_shards(layout, names=names)
    if as_json:
        rows = [
            {
                "rank": rank,
                **asdict(plan.report),
                "amplification": plan.report.amplification,
                "seconds": link.seconds(plan.report.bytes_fetched, plan.report.requests),
                "dollars": plan.report.requests * link.dollars_per_1000 / 1000,
                "whole_shards": asdict(whole),
            }
            for rank, (plan, whole) in enumerate(zip(plans, shards, strict=True))
        ]
        print_json({"location": checkpoint.location, "mesh": dict(mesh), "ranks": rows})
        return
    print(f"{checkpoint.location}: {checkpoint.format}, read by {layout.mesh}")
    alike: dict[tuple[str, ...], list[int]] = {}
    for rank, (plan, whole) in enumerate(zip(plans, shards, strict=True)):
        alike.setdefault(_row(plan.report, whole, link), []).append(rank)
    print_table(COLUMNS, [(ranges(of), *row) for row, of in alike.items()], right=COLUMNS[1:])
    notes = {note for plan in plans if (note := str(plan.report).partition("; ")[2])}
    for note in sorted(notes)[:3]:
        print(note)


def _row(report: PlanReport, whole: WholeShards, link: Link) -> tuple[str, ...]:
    needed = max(report.bytes_needed, 1)
    return (
        in_bytes(report.bytes_needed),
        in_bytes(report.bytes_fetched),
        f"{report.amplification:.3f}",
        str(report.requests),
        str(report.objects),
        f"{link.seconds(report.bytes_fetched, report.requests):.2f}",
        f"{report.requests * link.dollars_per_1000 / 1000:.4f}",
        in_bytes(whole.nbytes),
        f"{whole.nbytes / needed:.2f}",
        f"{link.seconds(whole.nbytes, whole.shards, at_once=1):.2f}",
    )


def _words(checkpoint: Checkpoint, given: list[str], tp: int) -> dict[str, str]:
    """Patterns and words of tensor parallelism: of the command line, of files that it names, or of the config.json."""
    if not given:
        plan = checkpoint.tp_plan
        if not plan and tp > 1:
            raise typer.BadParameter(
                "the checkpoint has no config.json with a plan: give the rules", param_hint="--tp-plan"
            )
        return plan
    words: dict[str, str] = {}
    for rule in given:
        pattern, equals, word = rule.rpartition("=")
        if equals:
            words[pattern] = word
            continue
        try:
            with open(rule) as file:
                words |= {str(pattern): str(word) for pattern, word in json.load(file).items()}
        except (OSError, ValueError, AttributeError) as error:
            raise typer.BadParameter(f"{rule!r} is neither PATTERN=WORD nor a JSON file of them: {error}") from None
    return words


def _rules(checkpoint: Checkpoint, mesh: Mapping[str, int], words: Mapping[str, str]) -> dict[str, Rule]:
    """The rules of a layout that shards by words over "tp", and by the first dimension over "fsdp", as FSDP2 does."""
    if "fsdp" not in mesh:
        return dict(words) if "tp" in mesh else {}
    if "tp" not in mesh:
        words = {}
    over_tp = Layout({"tp": mesh.get("tp", 1)}, words)
    rules: dict[str, Rule] = {}
    for name, info in checkpoint.tensors.items():
        (placement,) = over_tp.placements(name, len(info.shape))
        cuts_first = isinstance(placement, Shard) and placement.dim % max(1, len(info.shape)) == 0
        split = StridedShard(0, mesh["tp"]) if cuts_first else Shard(0)
        by_mesh = {"tp": placement} if "tp" in mesh else {}
        rules[name] = by_mesh | ({"fsdp": split} if info.shape else {})
    return rules
