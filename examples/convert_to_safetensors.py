"""Convert the model of a training checkpoint to safetensors in bfloat16, for transformers and other libraries.

    python examples/convert_to_safetensors.py s3://bucket/run/step-20 model
    torchrun --nproc-per-node 4 examples/convert_to_safetensors.py s3://bucket/run/step-20 model

Under torchrun, the ranks share the work. If a conversion is interrupted, run it again: it continues. The same on the
command line:

    reshard convert s3://bucket/run/step-20 model --to safetensors \\
        --include model --rename 'model.*=*' --dtype bfloat16
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
    parser.add_argument("src", help="the location of a checkpoint of any format")
    parser.add_argument("dst", help="the location of the new checkpoint")
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        main(arguments.src, arguments.dst)
    else:
        dist.init_process_group("gloo")
        main(arguments.src, arguments.dst)
        dist.barrier()  # without it, a rank of torch 2.13 with gloo sometimes aborts at exit
        dist.destroy_process_group()
