"""A Hugging Face folder, a checkpoint of DCP, and a model to load into, on a store and on a disk."""

import contextlib
import io
import json
from typing import Any

import fsspec
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save
from torch import nn
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

import reshard as reshard  # the page does not import it

model = nn.Sequential(nn.Linear(64, 256, bias=False), nn.Linear(256, 64, bias=False))
files: Any = fsspec.filesystem("s3")
weights = {f"model.layers.{i}.{name}.weight": torch.randn(64, 64) for i in range(2) for name in ("up", "down")}
files.pipe_file("bucket/llama-3/model.safetensors", save(weights))
plan = {"layers.*.up": "colwise", "layers.*.down": "rowwise"}
files.pipe_file("bucket/llama-3/config.json", json.dumps({"base_model_tp_plan": plan}).encode())
state = {"model": model.state_dict()}
with contextlib.redirect_stderr(io.StringIO()):
    dcp.save(state, storage_writer=FsspecWriter("s3://bucket/step-1000", sync_files=False), no_dist=True)
    dcp.save(state, checkpoint_id="step-1000", no_dist=True)
