"""The model loader of vLLM that reads any checkpoint that reshard can open.

Importing this module imports vLLM, and registers the loader as `load_format="reshard"`.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from vllm.distributed.parallel_state import get_world_group
from vllm.logger import init_logger
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

import reshard
from reshard.errors import ArgumentError, CheckpointError, CheckpointNotFoundError, MissingTensorError

logger = init_logger("vllm.reshard")  # vLLM prints only what is logged under its own name
CONFIG = "model_loader_extra_config"
_loaded_from: WeakKeyDictionary[torch.nn.Module, str] = WeakKeyDictionary()
"""The path of the model when its weights were loaded. vLLM changes the path to reload them from elsewhere."""


def _workers() -> torch.distributed.ProcessGroup | None:
    """Return the workers that load the model together. On an object store they read once what several of them need."""
    workers = get_world_group()
    return workers.cpu_group if workers.world_size > 1 else None


@dataclasses.dataclass(frozen=True, slots=True)
class LoaderOptions:
    """The options in `model_loader_extra_config`."""

    uri: str | None = None
    """The location of the checkpoint. Default: the folder of the model."""
    prefix: str = ""
    """The key under which the checkpoint has the model, such as "model". Default: none."""
    format: str | None = None
    """The format, see `reshard.open`. Default: determined from the files."""
    storage_options: dict[str, Any] | None = None
    """Options of the store, see `reshard.open`."""

    @classmethod
    def of(cls, extra_config: object) -> LoaderOptions:
        """Return the options of a `model_loader_extra_config`.

        Raises:
            ArgumentError: an option does not exist or has a wrong type.
        """
        if not isinstance(extra_config, dict):
            raise ArgumentError(f"{CONFIG} must be a dict, got {type(extra_config).__name__}")
        types = {"uri": str, "prefix": str, "format": str, "storage_options": dict}
        for key, value in extra_config.items():
            if key not in types:
                raise ArgumentError(
                    f"{CONFIG} has the key {key!r}: the keys of load_format='reshard' are {', '.join(types)}"
                )
            if not isinstance(value, types[key]):
                raise ArgumentError(f"{key!r} in {CONFIG} must be a {types[key].__name__}, got {type(value).__name__}")
        return cls(**extra_config)


@register_model_loader("reshard")
class ReshardModelLoader(DefaultModelLoader):  # type: ignore[misc]
    """Loads the weights of a model from any checkpoint that `reshard.open` can open.

    The `load_weights` of the model runs on lazy tensors. So each worker reads only the byte ranges of its own
    parameters, straight into them.
    """

    def __init__(self, load_config: Any) -> None:
        self._options = LoaderOptions.of(load_config.model_loader_extra_config)
        # The default loader reads the weights that some models need from other repositories.
        super().__init__(dataclasses.replace(load_config, load_format="auto", model_loader_extra_config={}))
        self.report: reshard.RankReport | None = None
        """What `load_weights` has read."""

    def download_model(self, model_config: Any) -> None:
        """Do nothing: each worker reads its own parts from the store."""

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        """Load the weights of this worker into the parameters of a model."""
        with self._open(model, model_config) as checkpoint:
            try:
                with checkpoint.lazy(process_group=_workers()) as weights:
                    loaded = model.load_weights(self._named(weights, checkpoint, model))  # type: ignore[operator]
                if model_config.quantization is None and loaded is not None:  # as vLLM's default loader does
                    self.track_weights_loading(model, loaded)
            except CheckpointError:
                raise
            except (KeyError, ValueError) as error:  # of vLLM, about names
                error.add_note(self._names_of(checkpoint))
                raise
            self.report = weights.report
            _loaded_from[model] = model_config.model
            logger.info("Loaded weights from %s: %s", checkpoint.location, self.report.words)

    def get_all_weights(self, model_config: Any, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the names and the weights. vLLM calls this to reload the weights of a model.

        vLLM copies a part of each weight at once or later, and that part is read at this time.
        """
        checkpoint = self._open(model, model_config)
        return self._named(checkpoint.lazy(), checkpoint, model)

    def _open(self, model: torch.nn.Module, model_config: Any) -> reshard.Checkpoint:
        options = self._options
        reloads_from_elsewhere = _loaded_from.get(model, model_config.model) != model_config.model
        location = model_config.model if options.uri is None or reloads_from_elsewhere else options.uri
        try:
            return reshard.open(location, storage_options=options.storage_options, format=options.format)
        except CheckpointNotFoundError as error:
            if options.uri is None:
                error.add_note(f"The weights are read from the model folder, unless {CONFIG} has the key 'uri'")
            raise

    def _named(
        self, weights: Mapping[str, torch.Tensor], checkpoint: reshard.Checkpoint, model: torch.nn.Module
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the weights of the model, by the names that it expects.

        Raises:
            MissingTensorError: no name begins with the prefix.
        """
        prefix = f"{self._options.prefix.removesuffix('.')}." if self._options.prefix else ""
        names = [name for name in weights if name.startswith(prefix)]
        if prefix and not names:
            raise MissingTensorError(
                f"no name begins with the prefix {prefix!r} of {CONFIG}. {self._names_of(checkpoint)}"
            )
        yield from ((name.removeprefix(prefix), weights[name]) for name in names)
        for source in getattr(model, "secondary_weights", ()):
            yield from self._get_weights_iterator(source)

    def _names_of(self, checkpoint: reshard.Checkpoint) -> str:
        """Return a sentence about the names of the checkpoint, for an error about missing or unexpected ones."""
        keys = ", ".join(sorted({repr(name.partition(".")[0]) for name in checkpoint.tensors}))
        return (
            f"The tensors of {checkpoint.location} are under the keys {keys}: if the whole model is under one of them, "
            f"pass this key as 'prefix' in {CONFIG}"
        )
