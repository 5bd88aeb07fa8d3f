"""The model of a training checkpoint as safetensors in bfloat16, for transformers and whoever reads these.

    python examples/convert_to_safetensors.py s3://bucket/run/step-20 model
    torchrun --nproc-per-node 4 examples/convert_to_safetensors.py s3://bucket/run/step-20 model

Under torchrun the ranks share the work. A call that was killed goes on when it is made again. The command line does
the same: reshard convert s3://bucket/run/step-20 model --to safetensors --rename 'model.*=*' --dtype bfloat16
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist

import reshard


def main(src: str, dst: str) -> None:
    # Convert the model without the optimizer, and remove the prefix "model." from its names.
    report = reshard.convert(
        src, dst, format="safetensors", include="model", rename={"model.*": "*"}, dtype=torch.bfloat16
    )
    if report.rank == 0:
        print(report.total)
        for name, info in reshard.open(dst).tensors.items():
            print(name, tuple(info.shape), info.dtype)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src")
    parser.add_argument("dst")
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        main(arguments.src, arguments.dst)
    else:
        dist.init_process_group("gloo")
        main(arguments.src, arguments.dst)
        dist.barrier()  # without it, a rank of torch 2.13 with gloo aborts now and then on its way out
        dist.destroy_process_group()
