"""The checkpoint of a trained model on a store."""

import torch

import reshard

torch.manual_seed(0)
shapes = {"q": (256, 256), "k": (256, 256), "v": (256, 256), "o": (256, 256), "up": (1024, 256), "down": (256, 1024)}
layers = [{name: {"weight": torch.randn(shape)} for name, shape in shapes.items()} for _ in range(2)]
state = {"model": {"layers": layers}, "optimizer": {"exp_avg": torch.zeros(10)}, "step": 1000}
reshard.save(state, "s3://bucket/run/step-1000")
