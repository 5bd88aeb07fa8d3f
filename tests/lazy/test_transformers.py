"""The loading code of transformers runs on lazy tensors: conversions of weights, tensor parallelism, other names."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import reshard
from reshard.storage.lazy.tensor import LazyTensor
from tests.ranks import RankPool

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
KINDS = ["llama", "mixtral", "qwen3_moe", "tied"]
SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}


def config_of(kind: str) -> Any:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("LlamaConfig", {}),
        "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
        "qwen3_moe": ("Qwen3MoeConfig", experts),
        "tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    }
    name, options = kinds[kind]
    return getattr(importlib.import_module("transformers"), name)(**SIZES, **options)


def class_of(kind: str) -> Any:
    return getattr(importlib.import_module("transformers"), f"{type(config_of(kind)).__name__[:-6]}ForCausalLM")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield a folder with each model, as transformers saves it, and the same weights in two other formats."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_HUB_OFFLINE", "1")
        made = tmp_path_factory.mktemp("models")
        for kind in KINDS:
            torch.manual_seed(0)
            module = class_of(kind)(config_of(kind)).to(torch.bfloat16)
            module.save_pretrained(made / kind / "safetensors")
            reshard.convert(made / kind / "safetensors", made / kind / "reshard")
            stored = reshard.open(made / kind / "safetensors").state_dict()
            dcp.save(stored, storage_writer=FileSystemWriter(made / kind / "dcp", sync_files=False), no_dist=True)
        yield made


def load_lazily(kind: str, location: str, **options: Any) -> tuple[Any, reshard.LazyWeights]:
    with reshard.open(location).lazy() as weights:
        made = class_of(kind).from_pretrained(
            None, config=config_of(kind), state_dict=weights, dtype=torch.bfloat16, **options
        )
        before = weights.report.bytes_needed
        weights.fill(made)
    assert before == 0  # nothing was read until the model was complete
    return made, weights


def compare(found: nn.Module, expected: nn.Module) -> int:
    """Check that two models have the same local tensors. Return their size in bytes."""
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    nbytes: dict[int, int] = {}
    for name, tensor in theirs.items():
        other = ours[name]
        assert type(other) is type(tensor), name
        if isinstance(tensor, DTensor):
            other, tensor = other.to_local(), tensor.to_local()
        assert not isinstance(other, LazyTensor)
        assert torch.equal(other, tensor), name
        nbytes[tensor.data_ptr()] = tensor.nbytes
    return sum(nbytes.values())


@pytest.mark.parametrize("format", ["reshard", "dcp", "safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_from_pretrained_has_the_parameters_of_the_stock_loader(folder: Path, kind: str, format: str) -> None:
    expected = class_of(kind).from_pretrained(folder / kind / "safetensors", dtype=torch.bfloat16)
    found, weights = load_lazily(kind, str(folder / kind / format))
    nbytes = compare(found, expected)
    assert weights.report.bytes_needed == nbytes
    assert not weights.unused_names
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == (kind == "tied")
    tokens = torch.arange(12)[None]
    assert torch.equal(found(tokens).logits, expected(tokens).logits)


def load_with_tp(folder: str, kind: str, format: str, *, experts: bool) -> tuple[int, reshard.RankReport]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    distributed: Any = importlib.import_module("transformers.distributed")
    world = dist.get_world_size()
    config = distributed.DistributedConfig(tp_size=world, tp_plan="auto", ep_size=world if experts else 1)
    options = {"distributed_config": config}
    expected = class_of(kind).from_pretrained(f"{folder}/{kind}/safetensors", dtype=torch.bfloat16, **options)
    found, weights = load_lazily(kind, f"{folder}/{kind}/{format}", **options)
    nbytes = compare(found, expected)
    assert any(isinstance(tensor, DTensor) for tensor in found.state_dict().values())
    return nbytes, weights.report


@pytest.mark.parametrize("format", ["reshard", "dcp", "safetensors"])
@pytest.mark.parametrize(
    ("kind", "experts"), [("llama", False), ("mixtral", False), ("mixtral", True), ("qwen3_moe", True)]
)
def test_each_rank_of_a_tp_plan_reads_its_part(
    ranks: RankPool, folder: Path, kind: str, experts: bool, format: str
) -> None:
    whole = class_of(kind)(config_of(kind)).to(torch.bfloat16)
    total = sum(parameter.nbytes for parameter in whole.parameters())
    for nbytes, report in ranks.run(2, partial(load_with_tp, experts=experts), str(folder), kind, format):
        assert nbytes < 0.52 * total
        assert report.bytes_needed == nbytes
        if format == "safetensors":
            header = 64 * 1024  # what the first read of a file fetches
            assert report.bytes_fetched - header <= 1.05 * nbytes


# Names and orders of a training library

TRAINING_NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
}


def training_name(name: str) -> str:
    head, layer, rest = name.rpartition("layers.")
    number, _, rest = rest.partition(".") if layer else ("", "", name)
    return f"layers.{number}.{TRAINING_NAMES[rest]}" if head else TRAINING_NAMES[name]


def turned(weight: torch.Tensor, heads: int, *, to_hf: bool) -> torch.Tensor:
    """Change the order of rows for the rotary embedding: pairs of rows, or halves of each head."""
    rows, columns = weight.shape
    size = rows // heads // 2
    split = weight.view(heads, size, 2, columns) if to_hf else weight.view(heads, 2, size, columns)
    return split.transpose(1, 2).reshape(rows, columns)


def heads_of(name: str) -> int:
    return {"q_proj": 8, "k_proj": 4}.get(name.split(".")[-2], 0)


def to_hf(state: Mapping[str, torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
    converted = {}
    for name in names:
        weight = state[training_name(name)]
        heads = heads_of(name)
        converted[name] = turned(weight, heads, to_hf=True) if heads else weight
    return converted


def from_hf(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        training_name(name): turned(weight, heads_of(name), to_hf=False) if heads_of(name) else weight
        for name, weight in state.items()
    }


class Training(nn.Module):
    """The parameters of a Llama model, with other names."""

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in state.items():
            *path, last = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in dict(owner.named_children()):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(last, nn.Parameter(torch.zeros_like(tensor)))


def train_and_return(folder: str, trained: str, back: str) -> None:
    """Load a Hugging Face model into an FSDP model with names of its own, and save it."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    expected = class_of("llama").from_pretrained(f"{folder}/llama/safetensors", dtype=torch.bfloat16).state_dict()
    module = Training(from_hf(expected))
    fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    with reshard.open(f"{folder}/llama/safetensors").lazy() as weights:
        module.load_state_dict(from_hf(weights))
    if dist.get_world_size() > 1:
        assert weights.report.bytes_fetched < 0.8 * sum(tensor.nbytes for tensor in expected.values())
    reshard.save({"model": module.state_dict(), "step": 3}, trained)


def test_a_training_checkpoint_is_loaded_into_a_hugging_face_model_and_back(
    ranks: RankPool, folder: Path, tmp_path: Path
) -> None:
    ranks.run(2, train_and_return, str(folder), str(tmp_path / "trained"), str(tmp_path / "back"))
    expected = class_of("llama").from_pretrained(folder / "llama" / "safetensors", dtype=torch.bfloat16)
    names = list(expected.state_dict())
    with reshard.open(tmp_path / "trained").lazy() as weights:
        model = {name.removeprefix("model."): weights[name] for name in weights}
        found = class_of("llama").from_pretrained(
            None, config=config_of("llama"), state_dict=to_hf(model, names), dtype=torch.bfloat16
        )
        weights.fill(found)
    compare(found, expected)


def test_layouts_know_the_words_of_the_plans_of_transformers() -> None:
    configs = importlib.import_module("transformers").CONFIG_MAPPING
    plans = {name: getattr(configs[name], "base_model_tp_plan", None) for name in configs}
    found = {name: plan for name, plan in plans.items() if isinstance(plan, dict) and plan}
    assert len(found) > 30
    for plan in found.values():
        layout = reshard.Layout({"tp": 2}, plan)
        for pattern in plan:
            name = f"{pattern.replace('*', '0')}.weight"
            boxes = [box for rank in range(2) for box in layout.local(name, (8, 4), rank).boxes]
            assert sum(box.numel for box in boxes) in (32, 64)
