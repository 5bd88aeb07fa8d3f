"""`reshard convert`. Under torchrun, the ranks share the work."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import typer

import reshard

from ..humanize import format_bytes
from ..planner.text import first_few, quoted
from ..storage.conversion.convert import TARGETS
from .common import options_of, print_line, storage_options

_SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "f16": "float16", "fp32": "float32", "f32": "float32"}


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What to convert, and into what."""

    to: str
    include: list[str]
    exclude: list[str]
    rename: list[str]
    """As OLD=NEW."""
    allow_missing: list[str]
    dtype: str | None
    codec: str
    max_file_gb: float

    def __post_init__(self) -> None:
        if self.to not in TARGETS:
            raise typer.BadParameter(f"expected {first_few(TARGETS)}, got {self.to!r}", param_hint="--to")

    @property
    def torch_dtype(self) -> torch.dtype | None:
        dtype = getattr(torch, self.dtype, None) if self.dtype else None
        if self.dtype and not isinstance(dtype, torch.dtype):
            near = _SHORT_DTYPES.get(self.dtype.lower())
            hint = f"; pass {near!r}" if near else ""
            raise typer.BadParameter(f"torch has no dtype {self.dtype!r}{hint}", param_hint="--dtype")
        return dtype

    @property
    def new_names(self) -> dict[str, str]:
        pairs = [pair.partition("=") for pair in self.rename]
        if not all(equals for _, equals, _ in pairs):
            raise typer.BadParameter("expected OLD=NEW", param_hint="--rename")
        return {old: new for old, _, new in pairs}

    @property
    def max_file_bytes(self) -> int:
        if not math.isfinite(self.max_file_gb * 1e9):
            raise typer.BadParameter(f"{self.max_file_gb} GB is not a file size", param_hint="--max-file-gb")
        return int(self.max_file_gb * 1e9)


def run(
    src: str,
    dst: str,
    options: ConvertOptions,
    format: str | None,
    src_options: list[str] | None,
    dst_options: list[str] | None,
) -> None:
    rename, dtype, max_file_bytes = options.new_names, options.torch_dtype, options.max_file_bytes
    given = storage_options(src_options)
    takers = [src, dst] if dst_options is None else [src]
    with _process_group():
        report = reshard.convert(
            src,
            dst,
            format=options.to,
            include=options.include,
            exclude=options.exclude,
            rename=rename,
            allow_missing=options.allow_missing,
            dtype=dtype,
            codec=options.codec,
            max_file_bytes=max_file_bytes,
            src_format=format,
            src_options=options_of(src, takers, given),
            progress=True,
            dst_options=options_of(dst, takers, given) if dst_options is None else storage_options(dst_options),
        )
    if report.rank == 0:
        total = report.total
        print_line(
            f"{dst}: {format_bytes(total.bytes_needed)} of values, {format_bytes(total.bytes_written)} written, in "
            f"{total.seconds['total']:.1f} s"
        )
        if report.cast:
            names = quoted([cast.name for cast in report.cast])
            print_line(f"{len(report.cast)} tensors were cast to fewer bits: {names}")
        if report.pickled:
            names = quoted(report.pickled)
            print_line(f"{len(report.pickled)} values need allow_pickle=True when they are loaded: {names}")
        if report.dropped:
            why = "; safetensors stores tensors only" if options.to == "safetensors" else ""
            print_line(f"{len(report.dropped)} names were not converted: {quoted(report.dropped)}{why}")


@contextmanager
def _process_group() -> Iterator[None]:
    """Join the process group of the ranks that torchrun started, if it did."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()
