"""Round trips: a checkpoint of transformers is converted to the native format and back, and transformers loads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import reshard

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    """Yield a folder with a small model that transformers saved in several files, and the model."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_HUB_OFFLINE", "1")
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
        model: Any = LlamaForCausalLM(config)
        model.to(torch.bfloat16)
        folder = tmp_path_factory.mktemp("hub") / "model"
        model.save_pretrained(folder, max_shard_size="20KB")
        yield folder, model


def test_transformers_loads_a_model_after_a_round_trip(saved: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = saved
    assert len(list(folder.glob("*.safetensors"))) > 2
    reshard.convert(folder, tmp_path / "native")
    reshard.convert(tmp_path / "native", tmp_path / "back", format="safetensors", max_file_bytes=20_000)
    for name in ("config.json", "generation_config.json"):
        (tmp_path / "back" / name).write_bytes((folder / name).read_bytes())
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    theirs, ours = (json.loads((location / INDEX).read_text()) for location in (folder, tmp_path / "back"))
    assert theirs["metadata"]["total_size"] == ours["metadata"]["total_size"]
    assert theirs["weight_map"].keys() == ours["weight_map"].keys()
    loaded, report = type(model).from_pretrained(tmp_path / "back", dtype=torch.bfloat16, output_loading_info=True)
    assert not any(report.values())
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(value.equal(expected[name]) for name, value in loaded.state_dict().items())
    tokens = torch.arange(12).reshape(2, 6)
    again = type(model).from_pretrained(folder, dtype=torch.bfloat16)
    assert loaded(tokens).logits.equal(again(tokens).logits)


def test_tp_plan_of_the_configuration_is_a_layout(saved: tuple[Path, Any], tmp_path: Path) -> None:
    """The configuration is copied to the converted checkpoint."""
    folder, model = saved
    config = json.loads((folder / "config.json").read_text())
    config["base_model_tp_plan"] = {
        pattern: word for pattern, word in model.config.base_model_tp_plan.items() if word in ("colwise", "rowwise")
    }
    assert len(config["base_model_tp_plan"]) == 7
    reshard.convert(folder, tmp_path / "native")
    (tmp_path / "native" / "config.json").write_text(json.dumps(config))
    checkpoint = reshard.open(tmp_path / "native")
    layout = reshard.Layout({"tp": 2}, checkpoint.tp_plan)
    for rank in range(2):
        tensors = checkpoint.load_rank(layout, rank)
        assert tensors.keys() == dict(model.named_parameters()).keys()
        for name, whole in model.named_parameters():
            module = name.split(".")[-2]
            dim = {"q": 0, "k": 0, "v": 0, "gate": 0, "up": 0, "o": 1, "down": 1}.get(module.removesuffix("_proj"))
            expected = whole.detach() if dim is None else whole.detach().chunk(2, dim)[rank]
            assert tensors[name].equal(expected), name
            assert (dim is None) == (not module.endswith("_proj"))
