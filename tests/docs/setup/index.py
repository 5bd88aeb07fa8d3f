"""What the landing page assumes: the state of a model, a model to load into, and a layout."""

import torch
from torch import nn

import reshard

tp_model = nn.Linear(64, 64)
weights, moments, step = {"weight": torch.randn(64, 64), "bias": torch.zeros(64)}, {"lr": 1e-3}, 1000
layout = reshard.Layout({"tp": 4}, {"model": "colwise"})
