"""A small Llama model in a Hugging Face folder, in reshard's format, and with the names of a training library."""

import os
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import LlamaForCausalLM

import reshard as reshard
from tests.lazy.test_transformers import Training, config_of, from_hf

torch.manual_seed(0)
made: Any = LlamaForCausalLM(config_of("llama"))
made.to(torch.bfloat16)
made.save_pretrained("models/llama")
reshard.convert("models/llama", "s3://bucket/llama/step-1000")
training_model: Any = Training(from_hf(made.state_dict()))
trained_state = {"model": from_hf(made.state_dict()), "step": 1000}
reshard.save(trained_state, "s3://bucket/run/step-1000")
