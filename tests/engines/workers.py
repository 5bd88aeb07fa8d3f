"""What the ranks of the tests run: they make models, save checkpoints, and load them as vLLM's workers do.

A rank creates a model with vLLM's model loader, as a worker of an engine does, but without the engine around it. So a
load takes a second, and the parameters can be compared before vLLM repacks them for its kernels.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import reshard

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
PRELOADED = [
    "reshard.storage.lazy.weights",
    "reshard.storage.save",
    "tests.engines.preloaded",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor",
]
"""The modules that the process imports from which the ranks are forked."""
SIZES: Any = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
MODELS = ("llama", "mixtral", "qwen3", "qwen3_moe")
WITH_EXPERTS = ("mixtral", "qwen3_moe")
FORMATS = ("reshard", "dcp", "safetensors")


def make_model(kind: str, folder: str, seed: int = 0) -> None:
    """Save a Hugging Face folder with random weights ~ N(0, 0.02²) in bf16, in several safetensors files."""
    from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3Config, Qwen3MoeConfig

    configs: dict[str, Callable[[], Any]] = {
        "llama": lambda: LlamaConfig(**SIZES, intermediate_size=1536),
        "mixtral": lambda: MixtralConfig(
            **SIZES | {"num_hidden_layers": 1}, intermediate_size=1536, num_local_experts=8
        ),
        "qwen3": lambda: Qwen3Config(**SIZES, intermediate_size=1536, head_dim=64, tie_word_embeddings=True),
        "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, intermediate_size=1536, moe_intermediate_size=512, num_experts=8),
    }
    with undisturbed_by_warnings():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(configs[kind](), dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
        model.save_pretrained(folder, max_shard_size="16MB")


def save(model: str, folder: str) -> None:
    """Save the weights of a Hugging Face folder as these ranks, in the other formats, each rank with its own shards.

    `folder/reshard` and `folder/dcp` have the names of the Hugging Face folder. `folder/training` has the weights in
    float32 under the key "model", and an optimizer and a step counter beside them.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    source = reshard.open(model)
    weights: dict[str, Any] = {}
    for name in source.tensors:
        weights[name] = distribute_tensor(source.read(name), mesh, [Shard(0)])
    reshard.save(weights, f"{folder}/reshard", codec="zstd")
    with undisturbed_by_warnings():
        dcp.save(weights, storage_writer=dcp.FileSystemWriter(f"{folder}/dcp", sync_files=False))
    masters = {name: weight.float() for name, weight in weights.items()}
    moments = {name: torch.zeros_like(weight) for name, weight in masters.items()}
    reshard.save({"model": masters, "optimizer": {"exp_avg": moments}, "step": 3}, f"{folder}/training", codec="zstd")


@dataclass(frozen=True)
class Loaded:
    """What one rank has loaded."""

    tensors: dict[str, tuple[str, str]]
    """The name of each parameter and buffer, its dtype and shape, and a digest of its bytes."""
    parameter_bytes: int
    """The size of the parameters of this rank."""
    expert_bytes: int
    """The part of them that belongs to experts."""
    bytes_fetched: int
    """What the report of the loader says. 0 for the stock loader."""


def load(
    folder: str,
    load_format: str,
    extra: dict[str, Any],
    meeting: str,
    expert_parallel: bool = False,
) -> Loaded:
    """Load a model as one of the workers of an engine with tensor parallelism over all ranks."""
    with engine(folder, load_format, extra, meeting, expert_parallel) as config:
        loader, model = new_model(config)
        loader.load_weights(model, config.model_config)
        report = getattr(loader, "report", None)
        return loaded(model, report.bytes_fetched if report else 0)


def loaded(model: torch.nn.Module, bytes_fetched: int = 0) -> Loaded:
    """Describe a model that has been loaded."""
    return Loaded(
        digests(model),
        sum(parameter.nbytes for parameter in model.parameters()),
        sum(parameter.nbytes for name, parameter in model.named_parameters() if ".experts." in name),
        bytes_fetched,
    )


def reload(folder: str, load_format: str, extra: dict[str, Any], other: str, meeting: str) -> list[Loaded]:
    """Load a model, reload it, and reload it from another location. Return what it has after each."""
    from vllm.model_executor.model_loader.reload.inplace import reload_weights

    keep_unpacked()
    with engine(folder, load_format, extra, meeting) as config:
        loader, model = new_model(config)
        loader.load_weights(model, config.model_config)
        found = [loaded(model)]
        for path in None, other:
            poison(model)
            reload_weights(config, model, None, path, True)
            found.append(loaded(model))
        return found


def load_by_layer(folder: str, load_format: str, extra: dict[str, Any], meeting: str) -> Loaded:
    """Load a model as vLLM quantizes it: each layer is changed as soon as it has been loaded.

    The quantization of vLLM itself does not run on CPUs.
    """
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    keep_unpacked(lambda layer: layer.weight.data.mul_(2))
    with engine(folder, load_format, extra, meeting) as config:
        loader, model = new_model(config)
        initialize_layerwise_reload(model)
        loader.load_weights(model, config.model_config)
        finalize_layerwise_reload(model, config.model_config)
        return loaded(model)


def keep_unpacked(process: Callable[[Any], object] = lambda layer: None) -> None:
    """Let vLLM process the weights of linear layers with a function, instead of packing them for its kernels."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    UnquantizedLinearMethod.process_weights_after_loading = lambda method, layer: process(layer)


@contextlib.contextmanager
def engine(
    folder: str, load_format: str, extra: dict[str, Any], meeting: str, expert_parallel: bool = False
) -> Iterator[Any]:
    """Join the groups of vLLM with all ranks, and yield the configuration of the engine.

    Args:
        meeting: A name for the groups, which no other call uses.
    """
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.engine.arg_utils import EngineArgs

    world_size, rank = dist.get_world_size(), dist.get_rank()
    os.environ["VLLM_DIST_IDENT"] = meeting  # a worker of an engine sets it, too
    with undisturbed_by_warnings():
        arguments = EngineArgs(
            model=folder,
            load_format=load_format,
            model_loader_extra_config=extra,
            skip_tokenizer_init=True,
            enforce_eager=True,
            tensor_parallel_size=world_size,
            distributed_executor_backend="mp" if world_size > 1 else None,
            enable_expert_parallel=expert_parallel,
        )
        config = arguments.create_engine_config()
        with set_current_vllm_config(config):
            init_distributed_environment(world_size, rank, local_rank=rank, backend="gloo")
            initialize_model_parallel(world_size)
            try:
                yield config
            finally:
                destroy_model_parallel()
                destroy_distributed_environment()


def new_model(config: Any) -> tuple[Any, torch.nn.Module]:
    """Return the loader of the engine and a model that contains only NaN, so that every value must be loaded."""
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.utils.torch_utils import set_default_torch_dtype

    loader = get_model_loader(config.load_config)
    with set_default_torch_dtype(config.model_config.dtype):
        model = loader.create_model(vllm_config=config, model_config=config.model_config)
    poison(model)
    return loader, model


@torch.no_grad()
def poison(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.fill_(torch.nan)


def digests(model: torch.nn.Module) -> dict[str, tuple[str, str]]:
    """Return the dtype and shape, and a digest of the bytes, of each parameter and buffer of a model."""
    found = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        found[name] = f"{tensor.dtype} {tuple(tensor.shape)}", hashlib.sha256(raw.tobytes()).hexdigest()
    return found


@contextlib.contextmanager
def undisturbed_by_warnings() -> Iterator[None]:
    """Ignore the warnings of vLLM, transformers and torch. Elsewhere, a warning is an error in a rank."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
