"""The contenders that save and load: reshard, DCP, DCP with the S3 connector, and TensorStore. All ranks take part."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

import reshard
from benchmarks.common import installed
from benchmarks.stores import REGION, BenchmarkStore, credentials
from reshard.planner.box import Box
from reshard.planner.grid import Grid
from reshard.storage.tensors.local_shards import local_shards

State = dict[str, Any]
Options = Mapping[str, Any]


class Contender(Protocol):
    """A library that saves and loads. `options` are storage_options of fsspec, and empty for a local store."""

    def save(self, state: State, uri: str, options: Options) -> None: ...

    def load(self, state: State, uri: str, options: Options) -> None: ...


@dataclass(frozen=True)
class Reshard:
    codec: str
    budget_bytes: int | None = None

    def save(self, state: State, uri: str, options: Options) -> None:
        reshard.save(state, uri, codec=self.codec, storage_options=options, budget_bytes=self.budget_bytes)

    def load(self, state: State, uri: str, options: Options) -> None:
        reshard.load(state, uri, storage_options=options, budget_bytes=self.budget_bytes)


class Dcp:
    """DCP with FileSystemWriter and FileSystemReader on a local disk, and with FsspecWriter and FsspecReader
    elsewhere."""

    def save(self, state: State, uri: str, options: Options) -> None:
        # With sync_files, FsspecWriter syncs all disks of the machine if a file has no descriptor.
        writer = FsspecWriter(uri, sync_files=False, **options) if options else dcp.FileSystemWriter(uri)
        dcp.save(state, storage_writer=writer)

    def load(self, state: State, uri: str, options: Options) -> None:
        dcp.load(state, storage_reader=FsspecReader(uri, **options) if options else dcp.FileSystemReader(uri))


class S3Connector:
    """DCP through Amazon's S3 connector for PyTorch."""

    def save(self, state: State, uri: str, options: Options) -> None:
        from s3torchconnector.dcp import S3StorageWriter

        writer = S3StorageWriter(REGION, f"{uri}/", s3client_config=self._config())
        self._set_endpoint(writer.fs, options)
        dcp.save(state, storage_writer=writer)

    def load(self, state: State, uri: str, options: Options) -> None:
        from s3torchconnector.dcp import S3StorageReader

        reader = S3StorageReader(REGION, f"{uri}/", s3client_config=self._config())
        self._set_endpoint(reader.fs, options)
        dcp.load(state, storage_reader=reader)

    @staticmethod
    def _config() -> Any:
        from s3torchconnector import S3ClientConfig

        credentials()
        return S3ClientConfig(force_path_style=True)

    def _set_endpoint(self, filesystem: Any, options: Options) -> None:
        """Set the endpoint: the client has an argument for it, the DCP classes have none."""
        from s3torchconnector._s3client import S3Client

        filesystem._client = S3Client(
            REGION, endpoint=options["client_kwargs"]["endpoint_url"], s3client_config=self._config()
        )


class TensorStore:
    """zarr3 with shards: one file per shard, with compressed chunks as large as those of reshard."""

    def save(self, state: State, uri: str, options: Options) -> None:
        import tensorstore as ts

        writing = []
        for name, tensor in state.items():
            for box, values in local_shards(name, tensor):
                spec = {**self._spec(name, uri, options), "metadata": self._metadata(tuple(tensor.shape), box)}
                writing.append((ts.open(spec, create=True, open=True), box, values))
        committed = [array.result()[box.slices].write(_bits(values)) for array, box, values in writing]
        for done in committed:
            done.result()

    def load(self, state: State, uri: str, options: Options) -> None:
        import tensorstore as ts

        reading = []
        for name, tensor in state.items():
            for box, values in local_shards(name, tensor):
                reading.append((ts.open(self._spec(name, uri, options)), box, values))
        copied = [ts.array(_bits(values)).write(array.result()[box.slices]) for array, box, values in reading]
        for done in copied:
            done.result()

    @staticmethod
    def _spec(name: str, uri: str, options: Options) -> dict[str, Any]:
        if not options:
            return {"driver": "zarr3", "kvstore": {"driver": "file", "path": os.path.join(uri, name) + "/"}}
        credentials()
        bucket, path = urlsplit(uri).netloc, urlsplit(uri).path.lstrip("/")
        s3 = {"driver": "s3", "bucket": bucket, "path": f"{path}/{name}/", "aws_region": REGION}
        s3["endpoint"] = options["client_kwargs"]["endpoint_url"]
        return {"driver": "zarr3", "kvstore": {**s3, "aws_credentials": {"type": "environment"}}}

    @staticmethod
    def _metadata(shape: tuple[int, ...], shard: Box) -> dict[str, Any]:
        grid = Grid.choose(shape, 2)
        chunk = [min(n // parts, size) for n, parts, size in zip(shape, grid.parts, shard.sizes, strict=True)]
        zstd = {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "typesize": 2}
        codecs = [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "blosc", "configuration": zstd},
        ]
        return {
            "shape": shape,
            "data_type": "uint16",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard.sizes}},
            "codecs": [{"name": "sharding_indexed", "configuration": {"chunk_shape": chunk, "codecs": codecs}}],
        }


def _bits(values: torch.Tensor) -> Any:
    return values.detach().view(torch.uint16).numpy()


CONTENDERS: dict[str, Callable[[], Contender]] = {
    "dcp": Dcp,
    "s3torchconnector": S3Connector,
    "tensorstore": TensorStore,
    "reshard-none": lambda: Reshard("none"),
    "reshard-zstd": lambda: Reshard("zstd"),
}


def available(names: list[str], store: BenchmarkStore) -> list[str]:
    """Return the contenders that are installed and support a store. Print those that are skipped."""
    optional = {name for name in names if name in ("s3torchconnector", "tensorstore")}
    missing = {name for name in optional if not installed(name)}
    if "s3torchconnector" in names and not store.is_s3:
        missing.add("s3torchconnector")  # it supports only S3
    return [name for name in names if name not in missing]
