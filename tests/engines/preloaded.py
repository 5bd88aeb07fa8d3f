"""What the process imports from which the ranks are forked: vLLM, and the models of the tests."""

# pyright: reportMissingImports=false

from __future__ import annotations

import transformers as transformers
from vllm import ModelRegistry
from vllm.engine import arg_utils as arg_utils
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mixtral import MixtralForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

# Otherwise vLLM starts a process that imports everything again for each model, to look at its class.
for model in LlamaForCausalLM, MixtralForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM:
    ModelRegistry.register_model(model.__name__, model)
