"""Read one tensor, or some of its rows, from a remote checkpoint of any format. Nothing else is fetched.

    python examples/read_remote_tensor.py s3://bucket/run/step-20 model.0.up.weight
    python examples/read_remote_tensor.py s3://bucket/run/step-20 model.0.up.weight --rows 64:96

Credentials come from the environment, as for every client of the store.
"""

from __future__ import annotations

import argparse

import reshard


def main(uri: str, name: str, rows: str) -> None:
    checkpoint = reshard.open(uri)
    if name not in checkpoint.tensors:
        raise SystemExit(
            f"{uri} has no tensor {name}; its first tensors are {', '.join(list(checkpoint.tensors)[:10])}"
        )
    info = checkpoint.tensors[name]
    print(f"{checkpoint.format}: {name}, {info.shape} {info.dtype}, {info.stored_bytes} bytes in {info.chunks} chunks")
    box = None
    if rows:
        begin, end = (int(part) for part in rows.split(":"))
        box = reshard.Box(offsets=(begin, *(0 for _ in info.shape[1:])), sizes=(end - begin, *info.shape[1:]))
    values = checkpoint.read(name, box)
    print(f"read {tuple(values.shape)}, mean {values.double().mean():.6f}, norm {values.double().norm():.6f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("uri")
    parser.add_argument("name")
    parser.add_argument("--rows", default="", metavar="BEGIN:END")
    arguments = parser.parse_args()
    main(arguments.uri, arguments.name, arguments.rows)
