"""The command line, on every format, on a disk and on S3."""

from __future__ import annotations

import datetime
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from typer.testing import CliRunner

import reshard
from reshard.cli import main
from reshard.cli.app import app
from reshard.cli.common import storage_options
from reshard.cli.fold import Folded, fold, tree
from reshard.errors import CheckpointError, CheckpointNotFoundError
from reshard.humanize import format_age, format_bytes
from reshard.storage.stores.open import open_store
from tests.conftest import Place

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

STATE: dict[str, Any] = {
    "model": {f"layers.{i}.{name}.weight": torch.randn(64, 64) for i in range(3) for name in ("up", "down")},
    "step": 7,
}
RULES = ("--tp-plan", "*.up=colwise", "--tp-plan", "*.down=rowwise")


def call(*arguments: object, code: int = 0, answer: str | None = None) -> str:
    """What a command prints."""
    result = CliRunner().invoke(app, list(map(str, arguments)), input=answer)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def as_json(*arguments: object, code: int = 0) -> Any:
    return json.loads(call(*arguments, "--json", code=code))


def native(folder: Path) -> None:
    reshard.save(STATE, folder)


def of_dcp(folder: Path) -> None:
    dcp.save(STATE, checkpoint_id=folder)


def of_safetensors(folder: Path) -> None:
    reshard.convert(saved(native, folder.parent), folder, format="safetensors")


def saved(save: Callable[[Path], None], folder: Path) -> Path:
    place = folder / f"{save.__name__}-100"
    if not place.exists():
        save(place)
    return place


@pytest.mark.parametrize("save", [native, of_dcp, of_safetensors])
def test_every_command_reads_every_format(save: Callable[[Path], None], tmp_path: Path) -> None:
    place = saved(save, tmp_path)
    told = as_json("inspect", place)
    assert told["parameters"] == 6 * 64 * 64
    assert told["format"] == {"native": "reshard", "of_dcp": "dcp", "of_safetensors": "safetensors"}[save.__name__]
    assert "model.layers.[0-2].up.weight\tfloat32\t64 x 64\t3\t" in call("inspect", place)
    one = as_json("inspect", place, "model.layers.0.up.weight")["model.layers.0.up.weight"]
    assert one["shape"] == [64, 64]
    assert one["shards"] == ["[0:64, 0:64]"]
    plan = as_json("plan", place, "--tp", 4, *RULES)
    assert [row["bytes_needed"] for row in plan["ranks"]] == [6 * 16 * 64 * 4] * 4
    assert all(row["whole_shards"]["nbytes"] == 6 * 64 * 64 * 4 for row in plan["ranks"])
    assert "read by tp 4\nranks\tneeded" in call("plan", place, "--tp", 4, *RULES)
    assert "of 6 tensors" in call("verify", place)
    assert "of 6 tensors exist, according to the sizes" in call("verify", place, "--quick")
    assert as_json("diff", saved(native, tmp_path), place, code=int(save is of_safetensors)) == (
        [
            {"name": "step", "what": "only in A", "a": "value of 1 bytes", "b": "", "changed": 0, "largest": 0.0},
        ]
        if save is of_safetensors
        else []
    )
    found = {row["uri"]: row for row in as_json("ls", tmp_path)}
    assert found[str(place)]["state"] == "complete"
    assert found[str(place)]["step"] == 100
    created = datetime.datetime.fromisoformat(found[str(place)]["created"])
    assert abs((datetime.datetime.now(datetime.UTC) - created).total_seconds()) < 600
    assert "entries\tage\tstate" in call("ls", tmp_path)


def test_a_checkpoint_without_its_objects_is_incomplete(tmp_path: Path) -> None:
    for save in (native, of_dcp):
        place = saved(save, tmp_path)
        next(path for path in place.rglob("*") if path.suffix in (".shard", ".distcp")).unlink()
    found = reshard.find_checkpoints(tmp_path)
    assert [(there.is_complete, there.state) for there in found] == [(False, "1 of 1 objects are missing")] * 2


def test_a_file_that_cannot_be_read_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(4)}, tmp_path / "x.pt")
    (tmp_path / "a.pt").mkdir()
    (tmp_path / "a.pt" / "manifest.reshard").write_bytes(b"damaged")

    def denied(*arguments: object) -> None:
        raise reshard.errors.AccessDeniedError("no permission")

    assert [os.path.basename(there.uri) for there in reshard.find_checkpoints(tmp_path)] == ["a.pt", "x.pt"]
    monkeypatch.setattr("reshard.storage.formats.detect.TorchSaveSource", denied)
    assert [there.state for there in reshard.find_checkpoints(tmp_path)][1] == "no permission"


def test_files_of_torch_save_are_listed_in_folders_without_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    torch.save({"a": torch.ones(4)}, tmp_path / "run" / "step-3.pt")
    (tmp_path / "run" / "other.bin").write_bytes(b"of something else")
    torch.save({}, saved(native, tmp_path) / "rng.pt")
    found = {row["uri"]: row for row in as_json("ls", tmp_path)}
    assert set(found) == {str(tmp_path / "run" / "step-3.pt"), str(tmp_path / "native-100")}
    file = found[str(tmp_path / "run" / "step-3.pt")]
    assert (file["format"], file["state"], file["step"], file["entries"]) == ("torch", "complete", 3, 1)


@pytest.mark.parametrize("to", ["reshard", "dcp", "safetensors"])
def test_every_command_on_s3(to: str, s3: Place, tmp_path: Path) -> None:
    uri, options = s3
    endpoint = options["client_kwargs"]["endpoint_url"]
    pairs = [f"key={options['key']}", f"secret={options['secret']}", f"client_kwargs.endpoint_url={endpoint}"]
    given = [word for pair in pairs for word in ("-o", pair)]
    into = [word for pair in pairs for word in ("--dst-option", pair)]
    place = f"{uri}/a-1"
    call("convert", saved(native, tmp_path), place, "--to", to, *into)
    assert as_json("inspect", place, *given)["format"] == to
    assert as_json("inspect", place, "model.layers.0.up.weight", *given)["model.layers.0.up.weight"]["shape"] == [
        64,
        64,
    ]
    drawn = tmp_path / "plan.png"
    assert as_json("plan", place, "--tp", 2, *RULES, "--plot", drawn, *given)["ranks"][0]["requests"] > 0
    assert drawn.exists()
    assert "of 6 tensors" in call("verify", place, *given)
    assert "of 6 tensors exist" in call("verify", place, "--quick", *given)
    assert "no difference" in call("diff", place, place, *given)
    assert [row["uri"] for row in as_json("ls", uri, *given)] == [place]
    assert "no data that is older" in call("gc", uri, "--dry-run", *given)
    call("convert", place, tmp_path / "back", *given)
    assert len(reshard.open(tmp_path / "back").tensors) == 6
    if to == "safetensors":
        with pytest.raises(reshard.errors.ArgumentError):
            call("rm", place, "--yes", *given)
    else:
        call("rm", place, "--yes", *given)
        assert as_json("ls", uri, *given) == []


def test_a_plan_for_fsdp_and_tp_agrees_with_torch(tmp_path: Path) -> None:
    ranks = as_json("plan", saved(native, tmp_path), "--fsdp", 2, "--tp", 2, "--dp", 2, *RULES)["ranks"]
    assert [row["bytes_needed"] for row in ranks] == [6 * 64 * 64] * 8, "a fourth of each, on two replicas"


def test_a_plan_is_drawn_saved_and_read_back(tmp_path: Path) -> None:
    place, kept = saved(native, tmp_path), tmp_path / "plan.json"
    told = as_json("plan", place, "--tp", 4, *RULES, "--save", kept, "--plot", tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert as_json("plan", kept) == told
    assert "a saved plan, read by tp 4" in call("plan", kept, "--plot", tmp_path / "again.svg")
    assert "<svg" in (tmp_path / "again.svg").read_text()
    refused = CliRunner().invoke(app, ["plan", str(kept), "--tp", "2"])
    assert refused.exit_code == 2
    assert "a saved plan has its own ranks and rules" in refused.output
    refused = CliRunner().invoke(app, ["plan", str(kept), "--plot", str(tmp_path / "plan.what")])
    assert refused.exit_code == 2
    assert "cannot be written" in refused.output
    kept.write_text("{}")
    with pytest.raises(reshard.errors.InvalidPlanError):
        call("plan", kept)
    with pytest.raises(reshard.errors.MissingTensorError, match=r"no rank reads|has no"):
        call("plan", place, "--tp", 4, *RULES, "--plot", tmp_path / "x.png", "--tensor", "nothing")


def test_a_stage_of_a_pipeline_reads_its_layers(tmp_path: Path) -> None:
    ranks = as_json("plan", saved(native, tmp_path), "--pp", 3, "--tp", 2, *RULES)["ranks"]
    assert [row["bytes_needed"] for row in ranks] == [2 * 32 * 64 * 4] * 6, "of one layer, a half"


def test_plan_uses_the_tp_plan_of_config_json(tmp_path: Path) -> None:
    place = saved(of_safetensors, tmp_path)
    (place / "config.json").write_text(json.dumps({"base_model_tp_plan": {"layers.*.up": "colwise"}}))
    (first, _) = as_json("plan", place, "--tp", 2)["ranks"]
    assert first["bytes_needed"] == 3 * (64 * 64 + 32 * 64) * 4
    (tmp_path / "plan.json").write_text(json.dumps({"*.up": "colwise", "*.down": "rowwise"}))
    (first, _) = as_json("plan", place, "--tp", 2, "--tp-plan", tmp_path / "plan.json")["ranks"]
    assert first["bytes_needed"] == 6 * 32 * 64 * 4


@pytest.mark.parametrize("mesh", [("--tp", 2), ("--tp", 2, "--fsdp", 2)], ids=["tp", "fsdp and tp"])
def test_plan_warns_of_rules_that_match_no_tensor(
    mesh: tuple[object, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    call("plan", saved(native, tmp_path), *mesh, *RULES, "--tp-plan", "*.dwn=rowwise")
    (message,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "1 of 3 patterns of the layout match no tensor" in message
    assert "'*.dwn'" in message


def test_verify_names_the_damaged_tensor(tmp_path: Path) -> None:
    place = saved(native, tmp_path)
    (data,) = (place / "data").iterdir()
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    (damage,) = as_json("verify", place, code=1)
    assert damage["tensor"].startswith("model.layers.")
    assert "of 6 tensors exist" in call("verify", place, "--quick")
    data.write_bytes(content[:100])
    assert "cut short" in call("verify", place, "--quick", code=1)
    data.unlink()
    assert "the object is missing" in call("verify", place, "--quick", code=1)


def test_diff_shows_the_largest_differences_first(tmp_path: Path) -> None:
    a: dict[str, Any] = {
        "same": torch.ones(8),
        "little": torch.zeros(100, 100),
        "much": torch.zeros(9),
        "cast": torch.ones(4),
        "n": 1,
    }
    b = {**a, "little": a["little"] + 0.5, "much": a["much"].clone(), "cast": a["cast"].double(), "n": 2}
    b["much"][3] = 9
    b["new"] = b.pop("same").clone()
    reshard.save(a, tmp_path / "a")
    reshard.save(b, tmp_path / "b")
    rows = as_json("diff", tmp_path / "a", tmp_path / "b", code=1)
    first = [(row["name"], row["what"], row["changed"]) for row in rows[:2]]
    assert first == [("much", "elements", 1), ("little", "elements", 10_000)]
    assert [row["largest"] for row in rows[:2]] == [9.0, 0.5]
    assert {row["name"]: row["what"] for row in rows[2:]} == {
        "cast": "dtype", "n": "value", "new": "only in B", "same": "only in A",
    }  # fmt: skip


def test_mistakes_are_answered_with_the_way_out(tmp_path: Path) -> None:
    place = saved(native, tmp_path)
    runner = CliRunner()
    for arguments, expected in (
        (["ls", tmp_path / "nowhere"], "there is no folder"),
        (["gc", tmp_path / "nowhere"], "there is no folder"),
        (["plan", place, "--tp", 2], "--tp 2 needs rules, such as --tp-plan"),
        (["convert", place, tmp_path / "c", "--dtype", "bf16"], "pass 'bfloat16'"),
    ):
        result = runner.invoke(app, list(map(str, arguments)))
        assert result.exit_code != 0
        told = str(result.exception) if isinstance(result.exception, CheckpointError) else result.output
        assert expected in " ".join(told.replace("│", " ").split())


def test_gc_removes_data_of_unfinished_saves_when_it_is_old(tmp_path: Path) -> None:
    place = saved(native, tmp_path)
    other = tmp_path / "killed-2"
    (other / "data").mkdir(parents=True)
    written = f"{'0123456789abcdef' * 2}-00000.shard"
    for folder in (place, other):
        (folder / "data" / written).write_bytes(b"RESHARDD and more")
    others = {
        place / "data" / "notes.txt",
        place / "data" / "train-00000.shard",
        other / "data" / f"{'f' * 32}-1.shard",
    }
    for path in others:
        path.write_bytes(b"somebody's")
    told = call("gc", tmp_path)
    assert told.startswith("no data that is older than 24 hours\n")
    assert told.count("1 younger object, 17 B: a save may be running") == 2
    old = time.time() - 48 * 3600
    for folder in (place, other):
        for path in (folder / "data").iterdir():
            os.utime(path, (old, old))
    assert [row["state"] for row in as_json("ls", tmp_path)] == ["not committed", "complete"]
    assert call("gc", tmp_path, "--dry-run").count("1 object, 17 B") == 2
    call("gc", tmp_path, code=1, answer="n\n")
    assert (other / "data" / written).exists()
    (other / ".reshard-convert.json").write_text("{}")
    assert call("gc", tmp_path, answer="y\n").count("1 object, ") == 1, "a conversion goes on, and is left alone"
    assert (other / "data" / written).exists()
    assert not (place / "data" / written).exists()
    assert all(path.exists() for path in others)
    assert "match their checksums" in call("verify", place)


def test_rm_removes_only_the_checkpoint(tmp_path: Path) -> None:
    place = saved(native, tmp_path)
    (place / "notes.txt").write_text("mine")
    call("rm", place, code=1, answer="n\n")
    assert "match their checksums" in call("verify", place)
    assert call("rm", place, answer="y\n").endswith("2 objects removed\n")
    assert list(open_store(place).list()) == ["notes.txt"]
    assert not (place / "data").exists()
    (tmp_path / "alone" / "logs" / "empty").mkdir(parents=True)
    native(tmp_path / "alone" / "run")
    call("rm", tmp_path / "alone" / "run", "--yes")
    assert not (tmp_path / "alone" / "run").exists()
    assert (tmp_path / "alone" / "logs" / "empty").exists()
    (tmp_path / "alone" / "logs" / "empty").rmdir()
    (tmp_path / "alone" / "logs").rmdir()
    native(tmp_path / "alone")
    call("rm", tmp_path / "alone", "--yes")
    assert not (tmp_path / "alone").exists()


def test_rm_refuses_formats_that_do_not_list_their_objects(tmp_path: Path) -> None:
    place = saved(of_safetensors, tmp_path)
    with pytest.raises(reshard.errors.ArgumentError, match="only checkpoints of reshard and DCP can be removed"):
        call("rm", place, "--yes")
    assert len(reshard.open(place).tensors) == 6


def test_diff_compares_values_exactly(tmp_path: Path) -> None:
    a = {"i": torch.tensor([2**60]), "c": torch.tensor([1 + 1j]), "f": torch.tensor([float("inf"), float("nan"), 1.0])}
    b = {
        "i": torch.tensor([2**60 + 1]),
        "c": torch.tensor([1 + 2j]),
        "f": torch.tensor([float("inf"), float("nan"), 2.0]),
    }
    reshard.save(a, tmp_path / "a")
    reshard.save(b, tmp_path / "b")
    rows = {row["name"]: row for row in as_json("diff", tmp_path / "a", tmp_path / "b", code=1)}
    assert {name: row["changed"] for name, row in rows.items()} == {"i": 1, "c": 1, "f": 1}
    assert rows["c"]["largest"] == rows["f"]["largest"] == 1.0


def test_plan_is_for_the_own_store_or_another_one(tmp_path: Path) -> None:
    big = {"w": torch.randn(2048, 1024)}
    dcp.save(big, checkpoint_id=tmp_path / "a")
    here = reshard.open(tmp_path / "a").plan(reshard.Layout({"tp": 4}, {"w": "rowwise"}))
    rules = ("--tp", 4, "--tp-plan", "w=rowwise")
    told = as_json("plan", tmp_path / "a", *rules)["ranks"]
    assert [row["bytes_fetched"] for row in told] == [plan.report.bytes_fetched for plan in here]
    far = as_json("plan", tmp_path / "a", *rules, "--latency", 50)["ranks"]
    assert far[0]["bytes_fetched"] > 2 * told[0]["bytes_fetched"]


def test_plan_shows_what_ranks_send_and_receive(tmp_path: Path) -> None:
    reshard.save({"w": torch.randn(2048, 1024)}, tmp_path / "a")
    rules = ("--dp", 2, "--tp", 2, "--tp-plan", "w=rowwise", "--cooperative")
    saved_plan = tmp_path / "plan.json"
    rows = as_json("plan", tmp_path / "a", *rules, "--save", saved_plan)["ranks"]
    whole = reshard.open(tmp_path / "a").tensors["w"].stored_bytes
    assert sum(row["bytes_fetched"] for row in rows) == pytest.approx(whole, rel=0.01)
    assert sum(row["bytes_sent"] for row in rows) == sum(row["bytes_received"] for row in rows) > 0.9 * whole
    shown = call("plan", tmp_path / "a", *rules)
    assert {"sent", "received"} <= set(shown.split())
    assert as_json("plan", saved_plan)["ranks"] == rows
    assert "received" not in call("plan", tmp_path / "a", *rules[:-1])


def test_plan_shows_how_much_is_compressed(tmp_path: Path) -> None:
    state = {"w": torch.randn(2048, 1024)}
    for codec, is_compressed in (("zstd", True), ("none", False)):
        reshard.save(state, tmp_path / codec, codec=codec)
        assert ("is compressed" in call("plan", tmp_path / codec)) == is_compressed
        (row,) = as_json("plan", tmp_path / codec)["ranks"]
        assert row["bytes_compressed"] == (row["bytes_wanted"] if is_compressed else 0)


def test_verify_reports_a_damaged_manifest_as_damage(tmp_path: Path) -> None:
    reshard.save({"w": torch.ones(4)}, tmp_path / "c")
    (tmp_path / "c" / "manifest.reshard").write_bytes(b"RESHARD")
    assert "the metadata is damaged: the manifest" in call("verify", tmp_path / "c", code=1)
    (row,) = as_json("verify", tmp_path / "c", code=1)
    assert "manifest" in row["reason"]


def test_verify_counts_tensors_and_values(tmp_path: Path) -> None:
    reshard.save({"w": torch.ones(4), "x": torch.ones(3), "step": 3}, tmp_path, codec="none")
    (data,) = (tmp_path / "data").iterdir()
    data.write_bytes(b"")
    result = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert result.exit_code == 1
    assert "3 chunks of 2 tensors and 1 value damaged or missing" in result.stderr


def test_ls_shows_why_a_file_cannot_be_opened(tmp_path: Path) -> None:
    save_file({"w": torch.ones(400)}, tmp_path / "m.safetensors")
    torch.save({"w": torch.ones(400)}, tmp_path / "m.pt")
    for name in ("m.safetensors", "m.pt"):
        os.truncate(tmp_path / name, 700)
        (row,) = as_json("ls", tmp_path / name)
        assert row["state"] != "complete"
        assert row["uri"] == str(tmp_path / name)


def test_plan_refuses_what_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reshard.save({"w": torch.ones(4)}, tmp_path / "c")
    reshard.save({"step": 1}, tmp_path / "values")
    saved_plan = tmp_path / "plan.json"
    call("plan", tmp_path / "c", "--save", saved_plan)
    for arguments, message in (
        ((tmp_path / "c", "--bandwidth", "inf"), "must be finite"),
        ((tmp_path / "c", "--latency", "inf"), "must be finite"),
        ((tmp_path / "values",), "has no tensors, only values such as 'step'"),
        ((saved_plan, "--format", "dcp"), "a saved plan has no format to choose"),
    ):
        monkeypatch.setattr(sys, "argv", ["reshard", "plan", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_verify_reports_a_folder_instead_of_data(tmp_path: Path) -> None:
    reshard.save({"w": torch.ones(4)}, tmp_path / "c")
    (data,) = (tmp_path / "c" / "data").iterdir()
    data.unlink()
    data.mkdir()
    for options, reason in (((), "the object is not a file"), (("--quick",), "the object is missing")):
        assert {row["reason"] for row in as_json("verify", *options, tmp_path / "c", code=1)} == {reason}


def test_a_folder_of_checkpoints_is_recognised(tmp_path: Path) -> None:
    reshard.save({"w": torch.ones(4)}, tmp_path / "run" / "step-1")
    with pytest.raises(CheckpointNotFoundError, match="There are some below it, such as 'step-1'; `reshard ls` lists"):
        call("inspect", tmp_path / "run")


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "reshard", "--help"], capture_output=True, text=True, check=True)
    assert "verify" in done.stdout


def test_inspect_shows_metadata(tmp_path: Path) -> None:
    reshard.save({"w": torch.ones(4)}, tmp_path / "c", metadata={"step": 1000, "loss": math.nan})
    assert as_json("inspect", tmp_path / "c")["metadata"] == {"step": 1000, "loss": "nan"}
    assert "\n  step: 1000\n  loss: nan\n" in call("inspect", tmp_path / "c")


def test_inspect_accepts_patterns(tmp_path: Path) -> None:
    assert set(as_json("inspect", saved(native, tmp_path), "model.layers.*.up.weight")) == {
        f"model.layers.{i}.up.weight" for i in range(3)
    }


def test_diff_shows_values(tmp_path: Path) -> None:
    reshard.save({"n": 1}, tmp_path / "a")
    reshard.save({"n": "x" * 100}, tmp_path / "b")
    (row,) = as_json("diff", tmp_path / "a", tmp_path / "b", code=1)
    assert row["a"] == "1"
    assert row["b"].startswith('"xxx')
    assert len(row["b"]) < 50


def test_demo_refuses_a_folder_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo-run").mkdir()
    (tmp_path / "demo-run" / "mine.txt").touch()
    with pytest.raises(reshard.errors.ArgumentError, match="was not created by a demo"):
        call("demo")
    assert (tmp_path / "demo-run" / "mine.txt").exists()


def test_invalid_options_are_refused(tmp_path: Path) -> None:
    place = saved(native, tmp_path)
    call("plan", place, "--tensor", "x", code=2)
    call("plan", place, "--save", tmp_path / "plan", code=2)
    (tmp_path / "latin.json").write_bytes(b"\xe9")
    call("plan", tmp_path / "latin.json", code=2)
    for wrong in (
        ["--bandwidth", 0],
        ["--concurrent-requests", 0],
        ["--tp", 0],
        ["--latency", -5],
        ["--max-over-read", -1],
    ):
        call("plan", place, *wrong, code=2)
    call("plan", place, "--tp", 2, code=2)  # no rules, and no config.json that has them
    call("inspect", place, "-o", "a=1", "-o", "a.b=2", code=2)
    with pytest.raises(reshard.errors.ArgumentError, match="max_over_read"):
        reshard.load({"model": {}}, place, max_over_read=float("nan"))


def test_convert_selects_renames_and_casts(tmp_path: Path) -> None:
    place = saved(native, tmp_path)
    said = call(
        "convert",
        place,
        tmp_path / "x",
        *["--to", "safetensors", "--include", "model", "--rename", "model.*=*", "--dtype", "bfloat16"],
    )
    assert "written" in said
    tensors = reshard.open(tmp_path / "x").tensors
    assert tensors["layers.0.up.weight"].dtype == torch.bfloat16
    call("convert", place, tmp_path / "y", "--dtype", "nothing", code=2)
    call("convert", place, tmp_path / "y", "--rename", "nothing", code=2)
    call(
        "convert",
        place,
        tmp_path / "y",
        "--rename",
        "model.layers.*.up.*=l*.up.*",
        "--exclude",
        "*.1.*",
    )
    assert {name.partition(".up")[0] for name in as_json("inspect", tmp_path / "y")["tensors"] if "up" in name} == {
        "l0",
        "l2",
    }


def test_an_error_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["reshard", "inspect", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("reshard: there is no checkpoint at ")
    assert captured.err.count("\n") == 1
    monkeypatch.setattr("sys.argv", ["reshard", "--debug", "inspect", str(tmp_path / "nothing")])
    with pytest.raises(reshard.errors.CheckpointNotFoundError):
        main()


def test_ls_shows_metrics(tmp_path: Path) -> None:
    with reshard.CheckpointManager(tmp_path, asynchronous=False) as manager:
        manager.save(1, {"step": 1}, {"loss": 0.25, "accuracy": math.nan}, metadata={"tokens": 7})
    reshard.save({"step": 2}, tmp_path / "step-2")
    lines = call("ls", tmp_path).splitlines()
    assert lines[0].split("\t")[-2:] == ["metrics", "state"]
    assert [line.split("\t")[-2:] for line in lines[1:]] == [["loss=0.25 accuracy=nan", "complete"], ["", "complete"]]
    first, second = as_json("ls", tmp_path)
    assert (first["metadata"]["metrics"]["loss"], first["metadata"]["tokens"]) == (0.25, 7)
    assert second["metadata"] == {}


COMMANDS = ("inspect", "plan", "verify", "convert", "diff", "ls", "rm", "gc", "demo")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_and_has_an_example(command: str) -> None:
    help = call(command, "--help")
    assert len(help.splitlines()) <= 50
    assert "Example: reshard" in help


def test_similar_names_are_folded() -> None:
    folded = fold({"a.0.w": (1,), "a.1.w": (1,), "a.3.w": (1,), "a.2.w": (2,), "b": (1,)})
    assert folded == [
        Folded("a.[0-1,3].w", ("a.0.w", "a.1.w", "a.3.w")),
        Folded("a.2.w", ("a.2.w",)),
        Folded("b", ("b",)),
    ]


def test_names_form_a_tree() -> None:
    names = ("m.layers.0.up.w", "m.layers.0.up.b", "m.layers.0.down.w", "m.norm", "m.norm.w", "step")
    lines = [(line, tensors.name if tensors else "") for line, tensors in tree(fold(dict.fromkeys(names, (1,))))]
    assert lines == [
        ("m", ""),
        ("  layers.0", ""),
        ("    up", ""),
        ("      w", names[0]),
        ("      b", names[1]),
        ("    down.w", names[2]),
        ("  norm", names[3]),
        ("    w", names[4]),
        ("step", names[5]),
    ]


def test_numbers_are_formatted() -> None:
    assert [format_bytes(n) for n in (0, 999, 1000, 12_345, 999_999, 5_000_000_000)] == [
        "0 B", "999 B", "1 kB", "12.3 kB", "1000 kB", "5 GB",
    ]  # fmt: skip


def test_the_shell_completes_commands() -> None:
    environment = {"_RESHARD_COMPLETE": "complete_bash", "COMP_WORDS": "reshard in", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "from reshard.cli.app import app; app(prog_name='reshard')"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["inspect"]


def test_ages_are_formatted() -> None:
    assert [format_age(s) for s in (-1, 0, 59, 61, 7300, 200_000)] == ["0 s", "0 s", "59 s", "1 min", "2 h", "2 d"]


def test_options_nest_by_dots() -> None:
    assert storage_options(["a=1", "b.c=x", "b.d=true"]) == {"a": 1, "b": {"c": "x", "d": True}}


def test_tensors_that_an_index_lists_but_no_file_has_are_shown(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(3), "extra": torch.ones(1)}, tmp_path / "one.safetensors")
    index = {"a": "one.safetensors", "b": "one.safetensors", "lost": "one.safetensors", "far": "gone.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    told = call("inspect", tmp_path, code=1)
    assert "'lost' is in 'one.safetensors', which does not have it" in told
    assert "'far' is in 'gone.safetensors', which is missing" in told
    assert "not in the index\tcount\nextra\t1" in told
    told = as_json("inspect", tmp_path, code=1)
    assert sorted(told["missing"]) == ["far", "lost"]
    assert told["unindexed"] == ["extra"]
    for options in ((), ("--quick",)):
        told = call("verify", tmp_path, *options, code=1)
        assert "'far' is in 'gone.safetensors', which is missing" in told
        assert sorted(row["tensor"] for row in as_json("verify", tmp_path, *options, code=1)) == ["far", "lost"]
    (row,) = as_json("ls", tmp_path)
    assert row["state"] == "2 tensors are missing"


def test_unreadable_names_are_shown(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(4), "odd": torch.ones(3).expand(2, 3)}, tmp_path / "x.pt")
    assert "cannot be read\twhy\nodd\tthe torch.save file 'x.pt'" in call("inspect", tmp_path / "x.pt")
    told = call("verify", tmp_path / "x.pt")
    assert "cannot be read: the torch.save file 'x.pt'" in told
    assert "1 names that cannot be read were not checked" in told
    (row,) = as_json("diff", tmp_path / "x.pt", tmp_path / "x.pt", code=1)
    assert (row["name"], row["what"]) == ("odd", "unreadable")


def test_convert_lists_the_names_that_it_drops(tmp_path: Path) -> None:
    told = call("convert", saved(native, tmp_path), tmp_path / "dst", "--include", "model.layers.0")
    assert "5 names were not converted: 'model.layers.1." in told
    with pytest.raises(reshard.errors.MissingTensorError, match=r"no name that matches 'modle\.\*'; .*'model\.\*'"):
        call("convert", saved(native, tmp_path), tmp_path / "other", "--rename", "modle.*=*")


@pytest.mark.parametrize("with_index", [True, False])
def test_a_sharded_bin_folder_is_listed_once(with_index: bool, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    for name in names:
        torch.save({name[:19]: torch.ones(2)}, folder / name)
    torch.save({"lr": 1}, folder / "training_args.bin")
    if with_index:
        index = {name[:19]: name for name in names}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    (row,) = as_json("ls", tmp_path)
    assert (row["uri"], row["format"], row["state"], row["entries"]) == (str(folder), "torch", "complete", 2)


def test_weight_files_that_are_not_in_the_index_are_shown(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    index = {"weight_map": {"a": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "are not in the index and were not read: consolidated.safetensors" in call("inspect", tmp_path)
    assert as_json("inspect", tmp_path)["unindexed_files"] == ["consolidated.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["inspect", "c"], ["inspect", "c", "--json"], ["ls", "."], ["verify", "c"]])
def test_the_exit_code_shows_that_the_reader_of_the_output_has_ended(arguments: list[str], tmp_path: Path) -> None:
    """Code 1 would mean damage or a difference."""
    reshard.save({f"w{at}": torch.zeros(3) for at in range(3000)}, tmp_path / "c")
    command = [sys.executable, "-c", "from reshard.cli import main; main()", *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        done = subprocess.run(command, cwd=tmp_path, stdout=closed, stderr=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("arguments", [["inspect", "c"], ["inspect", "c", "--json"], ["ls", "."], ["--help"]])
def test_a_full_disk_behind_the_output_is_one_error(arguments: list[str], tmp_path: Path) -> None:
    reshard.save({"w": torch.zeros(3)}, tmp_path / "c")
    command = [sys.executable, "-c", "from reshard.cli import main; main()", *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr == "reshard: the output cannot be written: No space left on device\n"
