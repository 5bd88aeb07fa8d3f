"""What a save and a load hold beyond the tensors themselves, against the budget that they are given.

    python -m benchmarks.memory [--places local s3] [--contenders NAME ...] [--mb N] [--budgets-mb N ...]

One process saves or loads bf16 tensors, N(0, 0.02²), of a given total: many that are smaller than the budget, or one
that is larger. The peak is the kernel's own count of resident memory, above what was resident before the call. Every
call has a process of its own, which has saved and loaded something small before, so that modules and connections do
not count. DCP has no budget.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch

from benchmarks.common import Peak, Row, arguments_of, header, in_a_fresh_process, line, positive, write
from benchmarks.contenders import CONTENDERS, Contender, Options, Reshard, State
from benchmarks.places import NAMES, Place, opened

OTHERS = ("dcp", "reshard-none", "reshard-zstd")
COLUMN = 1024


def state_of(tensors: int, nbytes: int, seed: int | None) -> State:
    """So many tensors of so many bytes in all; zeros, all resident, where there is no seed."""
    rows = max(1, nbytes // tensors // COLUMN // 2)
    state = {f"t{at}": torch.zeros(rows, COLUMN, dtype=torch.bfloat16) for at in range(tensors)}
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for tensor in state.values():
            for row in range(0, rows, COLUMN):  # in parts: what is made on the way is not to be resident later
                part = tensor[row : row + COLUMN]
                part.copy_(torch.randn(part.shape, generator=generator) * 0.02)
    else:
        for tensor in state.values():
            tensor.fill_(1)  # zeros may be pages that are not there yet
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
    """The peak of one call in this process, which should be a fresh one; a load is checked."""
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


def run(places: list[Place], contenders: list[str], mb: int, budgets_mb: list[int], counts: list[int]) -> list[Row]:
    """One row a place, contender, budget and number of tensors."""
    header("place", "contender", "tensors", "budget MB", "peak MB above, save", "peak MB above, load")
    rows: list[Row] = []
    for place in places:
        for contender in contenders:
            for budget_mb in budgets_mb if contender.startswith("reshard") else [None]:
                for tensors in counts:
                    row: Row = {"place": place.name, "contender": contender, "tensors": tensors, "total_mb": mb}
                    row["budget_mb"] = budget_mb
                    uri, warm = place.make(), [place.make(), place.make()]
                    budget = None if budget_mb is None else budget_mb * 1_000_000
                    for stage, small in zip(("save", "load"), warm, strict=True):
                        row[f"{stage}_peak"] = in_a_fresh_process(
                            *(peak_of, stage, contender, budget, tensors, mb * 1_000_000, uri, small, place.options())
                        )
                    for made in (uri, *warm):
                        place.remove(made)
                    rows.append(row)
                    line(
                        *(place.name, contender, f"{tensors} of {mb / tensors:.0f} MB", budget_mb or "—"),
                        *(f"{row['save_peak'] / 1e6:.0f}", f"{row['load_peak'] / 1e6:.0f}"),
                    )
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    """Bars of the peaks, a plot for each place; a black line marks the budget of a bar."""
    places = list(dict.fromkeys(row["place"] for row in rows))
    figure.set_size_inches(10, 1 + 2.5 * len(places))
    for axes, place in zip(figure.subplots(len(places), 1, squeeze=False)[:, 0], places, strict=True):
        here = [row for row in rows if row["place"] == place]
        for shift, stage in ((-0.2, "save"), (0.2, "load")):
            bars = axes.bar(
                [at + shift for at in range(len(here))], [row[f"{stage}_peak"] / 1e6 for row in here], 0.38, label=stage
            )
            axes.bar_label(bars, fmt="%.0f", fontsize=7)
        for at, row in enumerate(here):
            if row["budget_mb"]:
                axes.hlines(row["budget_mb"], at - 0.4, at + 0.4, color="black")
        axes.set_xticks(range(len(here)), [f"{row['contender']}\n{row['tensors']} tensors" for row in here], fontsize=7)
        axes.set_ylabel("peak MB above the tensors", fontsize=8)
        axes.set_title(f"{place}: {here[0]['total_mb']} MB of tensors", fontsize=9)
        axes.legend(fontsize=8)


def main(argv: list[str] | None = None) -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--places", nargs="+", choices=NAMES, default=["local", "s3"])
    parser.add_argument("--contenders", nargs="+", choices=OTHERS, default=list(OTHERS))
    parser.add_argument("--mb", type=positive, default=512, help="of all tensors (default: %(default)s)")
    parser.add_argument("--budgets-mb", type=positive, nargs="+", default=[64, 256], help="(default: 64 256)")
    parser.add_argument("--tensors", type=positive, nargs="+", default=[64, 1], help="how many (default: 64 1)")
    parser.add_argument("--folder", help="where the data of all places lies (default: the system's temporary folder)")
    arguments = parser.parse_args(argv)
    with opened(arguments.places, arguments.folder) as places:
        rows = run(places, arguments.contenders, arguments.mb, arguments.budgets_mb, arguments.tensors)
    write(arguments, rows, draw)


if __name__ == "__main__":
    main()
