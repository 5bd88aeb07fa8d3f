"""The memory that a save and a load need in addition to the tensors, compared with their budget.

    python -m benchmarks.memory [--stores local s3] [--contenders NAME ...] [--mb N] [--budgets-mb N ...]

One process saves or loads bf16 tensors, N(0, 0.02²), of a given total size: many that are smaller than the budget, or
one that is larger. The peak is the resident memory that the kernel reports, minus the resident memory before the call.
Every call runs in a new process, which first saves and loads something small, so that modules and connections do not
count. DCP has no budget.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch

from benchmarks.common import Peak, Row, arguments_of, header, in_a_fresh_process, line, positive, write
from benchmarks.contenders import CONTENDERS, Contender, Options, Reshard, State
from benchmarks.stores import NAMES, BenchmarkStore, opened

OTHERS = ("dcp", "reshard-none", "reshard-zstd")
COLUMN = 1024


def state_of(tensors: int, nbytes: int, seed: int | None) -> State:
    """Return `tensors` tensors with `nbytes` bytes in all: random values, or ones if `seed` is None."""
    rows = max(1, nbytes // tensors // COLUMN // 2)
    state = {f"t{at}": torch.zeros(rows, COLUMN, dtype=torch.bfloat16) for at in range(tensors)}
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for tensor in state.values():
            for row in range(0, rows, COLUMN):  # in parts, so that temporary values do not stay resident
                part = tensor[row : row + COLUMN]
                part.copy_(torch.randn(part.shape, generator=generator) * 0.02)
    else:
        for tensor in state.values():
            tensor.fill_(1)  # zeros may be pages that the kernel has not allocated yet
    return state


def peak_of(
    stage: str,
    contender: str,
    budget_bytes: int | None,
    tensors: int,
    nbytes: int,
    uri: str,
    warm: str,
    options: Options,
) -> int:
    """Save or load once, and return the peak memory. Call it in a new process. The loaded values are checked."""
    warnings.simplefilter("ignore")
    by: Contender = CONTENDERS[contender]()
    if isinstance(by, Reshard):
        by = replace(by, budget_bytes=budget_bytes)
    small = state_of(4, 1 << 20, seed=1)
    by.save(small, warm, options)
    by.load(small, warm, options)
    state = state_of(tensors, nbytes, seed=0 if stage == "save" else None)
    with Peak() as peak:
        (by.save if stage == "save" else by.load)(state, uri, options)
    if stage == "load":
        expected = state_of(tensors, nbytes, seed=0)
        assert all(values.equal(expected[name]) for name, values in state.items())
    return peak.nbytes


def run(
    stores: list[BenchmarkStore], contenders: list[str], mb: int, budgets_mb: list[int], counts: list[int]
) -> list[Row]:
    """Return one row per store, contender, budget and number of tensors."""
    header("store", "contender", "tensors", "budget MB", "peak MB, save", "peak MB, load")
    rows: list[Row] = []
    for store in stores:
        for contender in contenders:
            for budget_mb in budgets_mb if contender.startswith("reshard") else [None]:
                for tensors in counts:
                    row: Row = {"store": store.name, "contender": contender, "tensors": tensors, "total_mb": mb}
                    row["budget_mb"] = budget_mb
                    uri, warm = store.make(), [store.make(), store.make()]
                    budget = None if budget_mb is None else budget_mb * 1_000_000
                    for stage, small in zip(("save", "load"), warm, strict=True):
                        row[f"{stage}_peak"] = in_a_fresh_process(
                            *(peak_of, stage, contender, budget, tensors, mb * 1_000_000, uri, small, store.options())
                        )
                    for made in (uri, *warm):
                        store.remove(made)
                    rows.append(row)
                    line(
                        *(store.name, contender, f"{tensors} of {mb / tensors:.0f} MB", budget_mb or "—"),
                        *(f"{row['save_peak'] / 1e6:.0f}", f"{row['load_peak'] / 1e6:.0f}"),
                    )
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    """Draw bars of the peaks, one plot per store. Black lines mark the budgets."""
    stores = list(dict.fromkeys(row["store"] for row in rows))
    figure.set_size_inches(10, 1 + 2.5 * len(stores))
    for axes, store in zip(figure.subplots(len(stores), 1, squeeze=False)[:, 0], stores, strict=True):
        here = [row for row in rows if row["store"] == store]
        for shift, stage in ((-0.2, "save"), (0.2, "load")):
            bars = axes.bar(
                [at + shift for at in range(len(here))], [row[f"{stage}_peak"] / 1e6 for row in here], 0.38, label=stage
            )
            axes.bar_label(bars, fmt="%.0f", fontsize=7)
        for at, row in enumerate(here):
            if row["budget_mb"]:
                axes.hlines(row["budget_mb"], at - 0.4, at + 0.4, color="black")
        axes.set_xticks(range(len(here)), [f"{row['contender']}\n{row['tensors']} tensors" for row in here], fontsize=7)
        axes.set_ylabel("peak MB in addition to the tensors", fontsize=8)
        axes.set_title(f"{store}: {here[0]['total_mb']} MB of tensors", fontsize=9)
        axes.legend(fontsize=8)


def main(argv: list[str] | None = None) -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--stores", nargs="+", choices=NAMES, default=["local", "s3"])
    parser.add_argument("--contenders", nargs="+", choices=OTHERS, default=list(OTHERS))
    parser.add_argument("--mb", type=positive, default=512, help="the size of all tensors in MB (default: %(default)s)")
    parser.add_argument(
        "--budgets-mb", type=positive, nargs="+", default=[64, 256], help="the budgets in MB (default: 64 256)"
    )
    parser.add_argument(
        "--tensors", type=positive, nargs="+", default=[64, 1], help="the number of tensors (default: 64 1)"
    )
    parser.add_argument(
        "--folder", help="the folder for the data of all stores (default: the system's temporary folder)"
    )
    arguments = parser.parse_args(argv)
    with opened(arguments.stores, arguments.folder) as stores:
        rows = run(stores, arguments.contenders, arguments.mb, arguments.budgets_mb, arguments.tensors)
    write(arguments, rows, draw)


if __name__ == "__main__":
    main()
