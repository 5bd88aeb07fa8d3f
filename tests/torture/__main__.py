"""Run kills, damages, faults and hostile inputs for as long as you like, and count how they ended.

python -m tests.torture [--kills N] [--damages N] [--faults N] [--structures N] [--seed S]
"""

from __future__ import annotations

import argparse
import collections
import os
import tempfile
import time
import warnings
from pathlib import Path

from tests.proxy import Faults
from tests.ranks import RankPool
from tests.servers import seaweedfs
from tests.torture import damage, faults, kills, managed_kills, structure
from tests.torture.grammars import FORMATS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="saves to kill (default: %(default)s)")
    parser.add_argument(
        "--damages", type=int, default=20_000, help="damaged checkpoints to load (default: %(default)s)"
    )
    parser.add_argument("--faults", type=int, default=20, help="rounds through a faulty network (default: %(default)s)")
    parser.add_argument(
        "--structures", type=int, default=5000, help="hostile inputs to read per format (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=int(time.time()), help="(default: the time)")
    parser.add_argument(
        "--managed-kills", type=int, default=50, help="runs of a CheckpointManager to kill (default: %(default)s)"
    )
    arguments = parser.parse_args()
    os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")
    warnings.simplefilter("ignore", ResourceWarning)  # for connections that are broken on purpose
    seed = arguments.seed
    print(f"seed {seed}", flush=True)
    show("accidental damage", damage.accidents(arguments.damaged_chunks * 3 // 4, seed))
    show("false manifests", damage.falsehoods(arguments.damaged_chunks // 4, seed))
    show("known hostile inputs", structure.rounds("known", 1, seed))
    for format in FORMATS:
        show(f"hostile inputs, {format}", structure.rounds(format, arguments.structures, seed))
    with tempfile.TemporaryDirectory() as folder:
        with seaweedfs(Path(folder)) as server:
            mixed = Faults(reset=0.02, truncate=0.02, slow_down=0.2, latency_s=0.002, seed=seed)
            for client in faults.CLIENTS:
                show(f"network faults, {client}", faults.rounds(arguments.faults, server, mixed, client))
        with RankPool() as pool:
            show("killed saves", kills.rounds(arguments.kills, seed, Path(folder, "killed"), pool))
        managed = Path(folder, "managed")
        managed.mkdir()
        show("killed runs", managed_kills.rounds(arguments.managed_kills, seed, managed))


def show(what: str, ended: collections.Counter[str]) -> None:
    details = ", ".join(f"{count} {how}" for how, count in ended.most_common())
    print(f"{what}: {ended.total()} ({details})", flush=True)


if __name__ == "__main__":
    main()
