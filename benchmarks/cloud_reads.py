"""Loads from Google Cloud Storage and Azure through obstore, compared with loads through gcsfs and adlfs.

    python -m benchmarks.cloud_reads [--mb N] [--repeat N]

One process loads bf16 tensors, saved with codec "none", from emulators on loopback (fake-gcs-server and Azurite). To
load without obstore, it passes an option that obstore does not support. The contenders take turns. The processor time
is that of the process, user and system, without the emulator, which uses a part of the same cores.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import reshard
from benchmarks.bare_loop import processor_s
from benchmarks.common import Row, alternate, arguments_of, header, line, median, positive, write
from tests import servers

SERVERS = {"gcs": servers.fake_gcs, "azure": servers.azurite}
CONTENDERS: dict[str, dict[str, Any]] = {"obstore": {}, "gcsfs or adlfs": {"version_aware": True}}
"""The storage options of each contender, besides those of the server."""


def run(mb: int, repeat: int) -> list[Row]:
    """Return one row per store and contender."""
    header("store", "reads by", "s / GB", "CPU s / GB")
    rows: list[Row] = []
    saved = {f"w{at}": torch.full((1024, 1024 * mb // 16), float(at), dtype=torch.bfloat16) for at in range(8)}
    gigabytes = sum(tensor.nbytes for tensor in saved.values()) / 1e9
    for store, serve in SERVERS.items():
        with tempfile.TemporaryDirectory() as folder, serve(Path(folder)) as server:
            uri, loaded = server.place("checkpoint"), {name: torch.zeros_like(w) for name, w in saved.items()}
            reshard.save(saved, uri, codec="none", storage_options=server.options)
            seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTENDERS}
            for at, name in alternate(list(CONTENDERS), repeat + 1):
                begin, used_before = time.perf_counter(), processor_s()
                reshard.load(loaded, uri, storage_options={**server.options, **CONTENDERS[name]})
                took, used = time.perf_counter() - begin, processor_s() - used_before
                assert all(loaded[key].equal(w) for key, w in saved.items())
                for tensor in loaded.values():
                    tensor.zero_()
                if at > 0:
                    seconds[name].append((took / gigabytes, used / gigabytes))
        for name, runs in seconds.items():
            wall, cpu = (median(list(values)) for values in zip(*runs, strict=True))
            rows.append({"store": store, "contender": name, "seconds": wall, "cpu_seconds": cpu, "all": runs})
            line(store, name, f"{wall:.2f}", f"{cpu:.2f}")
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    """Draw bars of the processor time, one plot per store."""
    for axes, store in zip(figure.subplots(1, len(SERVERS)), SERVERS, strict=True):
        here = [row for row in rows if row["store"] == store]
        axes.bar_label(axes.bar([row["contender"] for row in here], [row["cpu_seconds"] for row in here]), fmt="%.2f")
        axes.set_ylabel("CPU seconds per GB", fontsize=8)
        axes.set_title(store, fontsize=9)


def main(argv: list[str] | None = None) -> None:
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # the emulator does not have the API that it calls
    parser = arguments_of(__doc__)
    parser.add_argument("--mb", type=positive, default=512, help="of tensors (default: %(default)s)")
    parser.add_argument("--repeat", type=positive, default=5, help="timed loads (default: %(default)s)")
    arguments = parser.parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write(arguments, run(arguments.mb, arguments.repeat), draw)


if __name__ == "__main__":
    main()
