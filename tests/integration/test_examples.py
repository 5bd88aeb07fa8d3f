"""Runs the examples as their docstrings say: with torchrun, on a local disk and on S3."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import reshard
from tests import servers

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("train_fsdp_serve_tp", "resume_elastic", "read_remote_tensor", "convert_to_safetensors")
Run = Callable[..., str]


@pytest.fixture
def bucket(moto: servers.Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return an empty location on S3 that the examples can open without options."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", servers.KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", servers.SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto.endpoint)
    return moto.place(uuid.uuid4().hex)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a function that runs an example on some ranks (0: without torchrun) and returns its output."""

    def run(ranks: int, name: str, *arguments: str) -> str:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
        done = subprocess.run(
            [sys.executable, *torchrun, str(EXAMPLES / f"{name}.py"), *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.mark.timeout(600)
def test_examples_train_serve_read_and_convert(run: Run, bucket: str, tmp_path: Path) -> None:
    uri = f"{bucket}/step-20"
    assert "saved: all ranks:" in run(2, "train_fsdp_serve_tp", "train", uri)
    assert "load and load_rank return the same 8 tensors" in run(2, "train_fsdp_serve_tp", "serve", uri)

    weight = reshard.open(uri).read("model.0.up.weight")
    printed = run(0, "read_remote_tensor", uri, "model.0.up.weight", "--rows", "64:96")
    assert "reshard: model.0.up.weight, (1024, 256) torch.float32" in printed
    assert f"read (32, 256), mean {weight[64:96].double().mean():.6f}" in printed

    printed = run(1, "convert_to_safetensors", uri, str(tmp_path / "model"))
    assert "0.up.weight (1024, 256) torch.bfloat16" in printed
    [file] = (tmp_path / "model").glob("*.safetensors")
    assert load_file(file)["0.up.weight"].equal(weight.to(torch.bfloat16))


def test_training_resumes_on_another_number_of_ranks(run: Run, tmp_path: Path) -> None:
    location = str(tmp_path / "run")
    losses = re.findall(r"step (\d+): loss ([\d.]+)", run(1, "resume_elastic", location, "--steps", "8"))
    assert [int(step) for step, _ in losses] == list(range(1, 9))
    printed = run(2, "resume_elastic", location, "--steps", "8")
    assert f"resumed from {location}/step-00000006 on 2 ranks" in printed
    again = re.findall(r"step (\d+): loss ([\d.]+)", printed)
    assert [step for step, _ in again] == ["7", "8"]
    for (_, before), (_, after) in zip(losses[6:], again, strict=True):
        assert float(after) == pytest.approx(float(before), rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_example_is_short_and_says_how_to_run_it(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) < 100
    assert f"examples/{name}.py" in text.split('"""')[1]
