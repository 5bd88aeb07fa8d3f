"""`reshard plan`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

import reshard
from reshard import pictures
from reshard.planner.layout import Layout, Rule, Shard, StridedShard
from reshard.planner.rank_plans import RankPlans
from reshard.planner.report import PlanReport, WholeShards
from reshard.planner.request_costs import UNBOUNDED_OVER_READ, RequestCosts
from reshard.planner.shared_reads import EXCHANGE_BYTES_PER_S
from reshard.planner.stages import even_stages
from reshard.storage.checkpoint import Checkpoint, warn_of_layout

from ..humanize import format_bytes, format_ranks
from .common import print_json, print_line, print_table, storage_options

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAN_COLUMNS = ("ranks", "needed", "fetched", "x", "GETs", "objects", "s", "$", "DCP", "DCP x", "DCP s")
EXCHANGE_COLUMNS = ("sent", "received")


@dataclass(frozen=True, slots=True)
class Link:
    """The connection of a rank to the store, and its price."""

    latency_s: float
    bytes_per_s: float
    concurrent_requests: int
    dollars_per_1000: float
    is_given: bool
    """Whether to plan for this link. If not, the plan is for the checkpoint's own store."""

    def seconds(self, nbytes: int, requests: int, concurrent: int | None = None) -> float:
        """Return the seconds that requests take: their latencies, `concurrent` at a time, and the transfer."""
        rounds = -(-requests // (concurrent or self.concurrent_requests))
        return rounds * self.latency_s + nbytes / self.bytes_per_s

    def seconds_of(self, report: PlanReport) -> float:
        exchange_s = max(report.bytes_sent, report.bytes_received) / EXCHANGE_BYTES_PER_S
        return self.seconds(report.bytes_fetched, report.requests) + exchange_s

    def dollars_of(self, report: PlanReport) -> float:
        return report.requests * self.dollars_per_1000 / 1000


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What to plan."""

    mesh: Mapping[str, int]
    """The sizes of "pp", "dp", "fsdp" and "tp" that are more than 1."""
    tp_plan: list[str]
    include: list[str]
    exclude: list[str]
    max_over_read: float | None
    tensor: str | None
    """The tensor whose chunks are drawn."""
    cooperative: bool
    """Whether the ranks share the read."""


def run(
    uri: str,
    options: PlanOptions,
    link: Link,
    plot: str | None,
    save: str | None,
    format: str | None,
    storage_option: list[str] | None,
    as_json: bool,
) -> None:
    checkpoint: Checkpoint | None = None
    if options.tensor and not plot:
        raise typer.BadParameter("it needs --plot", param_hint="--tensor")
    if save and not save.endswith(".json"):
        raise typer.BadParameter("the name must end with .json", param_hint="--save")
    if uri.endswith(".json") and not uri.endswith(".index.json") and os.path.isfile(uri):
        if storage_option:
            raise typer.BadParameter(
                "a saved plan is a local file and takes no storage options", param_hint="--storage-option"
            )
        if format:
            raise typer.BadParameter("a saved plan has no format to choose: omit it", param_hint="--format")
        plans = _read_back(uri, options)
    else:
        checkpoint = reshard.open(uri, storage_options=storage_options(storage_option), format=format)
        plans = _planned(checkpoint, options, link)
    if save:
        _write(save, "--save", lambda: Path(save).write_text(plans.to_json()))
    if plot:
        figure = _drawn(checkpoint, plans, options.tensor, link)
        _write(plot, "--plot", lambda: figure.savefig(plot, dpi=120))
    if as_json:
        print_json(_as_json(plans, link))
    else:
        _print(plans, checkpoint.format if checkpoint else "a saved plan", link)


def _read_back(path: str, options: PlanOptions) -> RankPlans:
    if (
        options.mesh
        or options.tp_plan
        or options.include != ["*"]
        or options.exclude
        or options.max_over_read is not None
        or options.cooperative
    ):
        raise typer.BadParameter("a saved plan has its own ranks and rules: omit the other options", param_hint="URI")
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path!r} cannot be read: {error}", param_hint="URI") from None
    return RankPlans.from_json(text)


def _planned(checkpoint: Checkpoint, options: PlanOptions, link: Link) -> RankPlans:
    mesh = options.mesh or {"tp": 1}
    words = _words(checkpoint, options.tp_plan, mesh.get("tp", 1))
    stages = even_stages(checkpoint.tensors, mesh["pp"]) if "pp" in mesh else None
    layout = Layout(mesh, _rules(checkpoint, mesh, words), stages)
    costs = (
        RequestCosts(link.latency_s, link.bytes_per_s, link.concurrent_requests, UNBOUNDED_OVER_READ)
        if link.is_given
        else None
    )
    return checkpoint.plan(
        layout,
        include=options.include,
        exclude=options.exclude,
        max_over_read=options.max_over_read,
        costs=costs,
        cooperative=options.cooperative,
    )


def _drawn(checkpoint: Checkpoint | None, plans: RankPlans, tensor: str | None, link: Link) -> Figure:
    name = tensor or pictures.most_over_read(plans)
    shards = checkpoint.shards_of(name)[0] if checkpoint and name else ()
    seconds = [link.seconds_of(report) for report in _reports(plans)]
    return pictures.overview(plans, name=name, shards=shards, seconds=seconds)


def _write(path: str, option: str, write: Callable[[], object]) -> None:
    try:
        write()
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path!r} cannot be written: {error}", param_hint=option) from None


def _as_json(plans: RankPlans, link: Link) -> dict[str, object]:
    rows = [
        {
            "rank": rank,
            **asdict(report),
            "amplification": report.amplification,
            "seconds": link.seconds_of(report),
            "dollars": link.dollars_of(report),
            "whole_shards": asdict(whole),
        }
        for rank, (report, whole) in enumerate(zip(_reports(plans), plans.whole_shards, strict=True))
    ]
    mesh = dict(zip(plans.mesh.names, plans.mesh.sizes, strict=True))
    return {"location": plans.location, "mesh": mesh, "ranks": rows}


def _print(plans: RankPlans, what: str, link: Link) -> None:
    print_line(f"{plans.location}: {what}, read by {plans.mesh}")
    is_shared = any(plan.exchange for plan in plans)
    columns = PLAN_COLUMNS[:6] + EXCHANGE_COLUMNS + PLAN_COLUMNS[6:] if is_shared else PLAN_COLUMNS
    alike: dict[tuple[str, ...], list[int]] = {}
    reports = _reports(plans)
    for rank, (report, whole) in enumerate(zip(reports, plans.whole_shards, strict=True)):
        row = _row(report, whole, link)
        exchanged = format_bytes(report.bytes_sent), format_bytes(report.bytes_received)
        alike.setdefault(row[:5] + exchanged + row[5:] if is_shared else row, []).append(rank)
    print_table(columns, [(format_ranks(of), *row) for row, of in alike.items()], right=columns[1:])
    if compressed := sum(report.bytes_compressed for report in reports):
        print_line(f"{format_bytes(compressed)} of what the ranks fetch is compressed")
    most = max(range(len(plans)), key=lambda rank: reports[rank].bytes_over_read)
    if notes := reports[most].notes:
        print_line(f"rank {most}: {'; '.join(notes)}")


def _reports(plans: RankPlans) -> list[PlanReport]:
    return [plan.report for plan in plans]


def _row(report: PlanReport, whole: WholeShards, link: Link) -> tuple[str, ...]:
    needed = max(report.bytes_needed, 1)
    return (
        format_bytes(report.bytes_needed),
        format_bytes(report.bytes_fetched),
        f"{report.amplification:.3f}",
        str(report.requests),
        str(report.objects),
        f"{link.seconds_of(report):.2f}",
        _in_dollars(link.dollars_of(report)),
        format_bytes(whole.nbytes),
        f"{whole.nbytes / needed:.2f}",
        f"{link.seconds(whole.nbytes, whole.shards, concurrent=1):.2f}",
    )


def _in_dollars(dollars: float) -> str:
    return f"{dollars:.4f}" if dollars >= 0.0001 or not dollars else "<.0001"


def _words(checkpoint: Checkpoint, given: list[str], tp: int) -> dict[str, str]:
    """Return tensor-parallel words by pattern, from the command line, files that it names, or config.json."""
    if not given:
        plan = checkpoint.tp_plan
        if not plan and tp > 1:
            raise typer.BadParameter(
                f"--tp {tp} needs rules, such as --tp-plan '*.up=colwise': there is no config.json with a plan",
                param_hint="--tp-plan",
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
            raise typer.BadParameter(f"{rule!r} is neither PATTERN=WORD nor a JSON file of rules: {error}") from None
    return words


def _rules(checkpoint: Checkpoint, mesh: Mapping[str, int], words: Mapping[str, str]) -> dict[str, Rule]:
    """Return rules that shard by words over "tp", and by the first dimension over "fsdp", as FSDP2 does."""
    if "fsdp" not in mesh:
        return dict(words) if "tp" in mesh else {}
    if "tp" not in mesh:
        words = {}
    over_tp = Layout({"tp": mesh.get("tp", 1)}, words)
    warn_of_layout(over_tp, checkpoint.tensors, checkpoint.location)
    rules: dict[str, Rule] = {}
    for name, info in checkpoint.tensors.items():
        (placement,) = over_tp.placements(name, len(info.shape))
        cuts_first = isinstance(placement, Shard) and placement.dim % max(1, len(info.shape)) == 0
        split = StridedShard(0, mesh["tp"]) if cuts_first else Shard(0)
        by_mesh = {"tp": placement} if "tp" in mesh else {}
        rules[name] = by_mesh | ({"fsdp": split} if info.shape else {})
    return rules
