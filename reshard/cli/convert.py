"""`reshard convert`; under torchrun, its ranks share the work."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import typer

import reshard

from ..humanize import format_bytes, format_names
from .common import options_of, storage_options, tell


def run(
    src: str,
    dst: str,
    to: str,
    names: str,
    exclude: list[str],
    rename: list[str],
    keep_others: bool,
    allow_missing: list[str],
    dtype: str | None,
    codec: str,
    max_file_gb: float,
    format: str | None,
    src_options: list[str] | None,
    dst_options: list[str] | None,
) -> None:
    pairs = [pair.partition("=") for pair in rename]
    if not all(equals for _, equals, _ in pairs):
        raise typer.BadParameter("expected OLD=NEW", param_hint="--rename")
    if keep_others and not pairs:
        raise typer.BadParameter("it is for --rename", param_hint="--keep-others")
    if pairs and names != "*" and not keep_others:
        message = "--rename says what is taken: leave out --names, or add --keep-others"
        raise typer.BadParameter(message, param_hint="--names")
    new_names = {old: new for old, _, new in pairs}
    wanted = getattr(torch, dtype, None) if dtype else None
    if dtype and not isinstance(wanted, torch.dtype):
        raise typer.BadParameter(f"torch has no dtype {dtype!r}", param_hint="--dtype")
    if not math.isfinite(max_file_gb * 1e9):
        raise typer.BadParameter(f"{max_file_gb} GB is no size of a file", param_hint="--max-file-gb")
    given = storage_options(src_options)
    takers = [src, dst] if dst_options is None else [src]
    with _process_group():
        report = reshard.convert(
            src,
            dst,
            format=to,
            names=names if keep_others or not pairs else new_names,
            exclude=exclude,
            rename=new_names if keep_others else None,
            allow_missing=allow_missing,
            dtype=wanted,
            codec=codec,
            max_file_bytes=int(max_file_gb * 1e9),
            src_format=format,
            src_options=options_of(src, takers, given),
            progress=True,
            dst_options=options_of(dst, takers, given) if dst_options is None else storage_options(dst_options),
        )
    if report.rank == 0:
        total = report.total
        tell(
            f"{dst}: {format_bytes(total.bytes_needed)} of values, {format_bytes(total.bytes_written)} written, in "
            f"{total.seconds['total']:.1f} s"
        )
        if report.cast:
            name_list = format_names(cast.name for cast in report.cast)
            tell(f"{len(report.cast)} tensors were cast to fewer bits: {name_list}")
        if report.skipped:
            tell(f"left out, for {to} holds tensors only: {', '.join(report.skipped)}")
        if report.left_out:
            name_list = format_names(report.left_out)
            tell(f"left out, {len(report.left_out)} names that no pattern or index lists: {name_list}")


@contextmanager
def _process_group() -> Iterator[None]:
    """The ranks that torchrun has started, if it has."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()
