"""The public errors: what they derive from, and how they behave as Python's own errors."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch

import reshard
from reshard import errors

BUILT_IN = {
    errors.MissingTensorError: KeyError,
    errors.CheckpointNotFoundError: FileNotFoundError,
    errors.NotCommittedError: FileNotFoundError,
    errors.CheckpointExistsError: FileExistsError,
    errors.StoreError: OSError,
    errors.ObjectNotFoundError: FileNotFoundError,
    errors.AccessDeniedError: PermissionError,
    errors.ArgumentError: ValueError,
}
ALL = [error for error in vars(errors).values() if isinstance(error, type)]


@pytest.mark.parametrize(("error", "built_in"), BUILT_IN.items(), ids=lambda kind: kind.__name__)
def test_errors_derive_from_the_built_in_error_that_callers_expect(
    error: type[errors.CheckpointError], built_in: type[Exception]
) -> None:
    assert issubclass(error, built_in)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_an_error_shows_its_message_and_rank_and_survives_pickling(kind: type[errors.CheckpointError]) -> None:
    error = kind("'w' is missing")
    assert str(error) == "'w' is missing"
    assert error.args == ("'w' is missing",)
    error.rank = 3
    for copied in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301
        assert type(copied) is kind
        assert copied.rank == 3
        assert str(copied) == "rank 3: 'w' is missing"


def test_callers_can_catch_python_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        reshard.open(tmp_path / "missing")
    reshard.save({"w": torch.ones(2)}, tmp_path / "c")
    with pytest.raises(FileExistsError):
        reshard.save({"w": torch.ones(2)}, tmp_path / "c")
    with pytest.raises(KeyError):
        reshard.load({"v": torch.ones(2)}, tmp_path / "c")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        reshard.save({"w": torch.ones(2)}, tmp_path / "file" / "c")
