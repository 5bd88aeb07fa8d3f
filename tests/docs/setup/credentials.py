"""Files for the HTTP server of the page. `state` is random; the page creates it again from the same seed."""

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

import reshard

served = Path(os.environ["SERVED"])
torch.manual_seed(0)
state = {"w": torch.randn(100, 100)}
reshard.save(state, served / "private" / "step-1")
(served / "open").mkdir()
save_file(state, served / "open" / "model.safetensors")
torch.manual_seed(0)
