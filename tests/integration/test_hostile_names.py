"""Names that are chosen to break something: every call works, or raises one clear error that can be printed safely."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import resource
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from typer.testing import CliRunner

import reshard
from reshard.cli.app import app
from reshard.cli.fold import fold, tree
from reshard.errors import CheckpointError, MissingTensorError, ShapeMismatchError
from reshard.planner.stages import even_stages

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

SHOWN = [
    "\x1b]0;TITLE\x07\x1b[2Jw\nfake\tfloat32", "\x9b31m", "a\nb\tc", "\r", "\x85", "\u2028", "\u202eabc", "\u2066x",
    "\u200b",
    "\x7f", "a\0b", "\ud800", "x.\udfff.y", "[bold]x[/bold]", "[link=http://e]x", "<script>", "é中文😀", "a%s", "{0}",
]  # fmt: skip
"""Names that a terminal, a table or a web page might misinterpret."""
ODD = [
    "a.²", "a.³", "a.٣", "a." + "9" * 5000, "a." + "٣" * 5000, ".".join("a" * 1100), "a." * 5000 + "b", "",
    ".", "..", "...",
    "__metadata__", "/etc/passwd", "../x", "*", "?", "[a]", " ", "=", "a=b", "'", '"', "\\", "$\\frac$", "data/x.shard",
    "layers.01", "layers.1",
]  # fmt: skip
"""Names that could be mistaken for a number, a path, a pattern or a level."""
LONG = ["n" * 10**6, "." * 10**6, "word " * 200_000]
VALUES = torch.arange(12.0).reshape(3, 4)
ROWWISE = reshard.Layout({"tp": 2}, {"*": "rowwise"})


NAMES = [*SHOWN, *ODD]


def state_of(names: Sequence[str]) -> dict[str, Any]:
    return {**dict.fromkeys(names, VALUES), "other.0.w": torch.zeros(3, 4), "other.1.w": torch.ones(3, 4)}


def call(*arguments: object) -> str:
    """Return the output of a command, after checking that any terminal can print it."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    for line in result.output.split("\n"):
        assert line.replace("\t", "").isprintable()
    result.output.encode()
    return result.output


def rows(output: str) -> list[list[str]]:
    """Return the first table of tensors in an output."""
    lines = output.split("\n")
    begin = next(at for at, line in enumerate(lines) if line.startswith(("tensor\t", "object\t", "uri\t", "name\t")))
    end = next((at for at in range(begin, len(lines)) if not lines[at]), len(lines))
    return list(csv.reader(io.StringIO("\n".join(lines[begin:end])), delimiter="\t", quoting=csv.QUOTE_NONE))


def check_error(error: CheckpointError) -> None:
    assert str(error).isprintable()
    assert len(str(error)) < 5000


def check_commands(location: Path, folder: Path, names: Sequence[str]) -> None:
    table = rows(call("inspect", location))
    assert {len(row) for row in table} == {6}
    assert sum(int(row[3]) for row in table[1:]) == len(names) + 2
    expected = {*names, "other.0.w", "other.1.w"}
    assert set(json.loads(call("inspect", location, "--json"))["tensors"]) == expected
    call("inspect", location, "*")
    assert set(json.loads(call("inspect", location, "*", "--json"))) == expected
    call("verify", location)
    call("verify", location, "--quick")
    call("plan", location, "--tp", 2, "--tp-plan", "*=rowwise", "--save", folder / "plan.json")
    call("plan", location, "--pp", 2)
    call("plan", folder / "plan.json")
    call("diff", location, location)


def test_every_function_accepts_every_name(tmp_path: Path) -> None:
    location = tmp_path / "c"
    reshard.save(state_of(NAMES), location)
    checkpoint = reshard.open(location)
    state = checkpoint.state_dict()
    of_rank = checkpoint.load_rank(ROWWISE, 1)
    loaded = {name: torch.zeros(3, 4) for name in NAMES}
    reshard.load(loaded, location)
    for text in (repr(checkpoint), checkpoint._repr_html_(), checkpoint.plan(ROWWISE)._repr_html_()):
        assert text.isprintable()
    for name in NAMES:
        assert checkpoint.read(name).equal(VALUES)
        assert state[name].equal(VALUES)
        assert of_rank[name].equal(VALUES[:, 2:])
        assert loaded[name].equal(VALUES)
        with pytest.raises(ShapeMismatchError) as wrong:
            reshard.load({name: torch.zeros(3, 5)}, location)
        check_error(wrong.value)
        with pytest.raises(MissingTensorError) as missing:
            checkpoint.read(f"{name}\ud800x")
        check_error(missing.value)
    check_commands(location, tmp_path, NAMES)


@pytest.mark.parametrize("to", ["reshard", "dcp", "safetensors"])
def test_every_name_can_be_converted(to: str, tmp_path: Path) -> None:
    names = [name for name in NAMES if (name, to) != ("__metadata__", "safetensors")]
    reshard.save(state_of(NAMES), tmp_path / "c")
    if to == "safetensors":
        with pytest.raises(CheckpointError, match="cannot have a tensor named '__metadata__'"):
            call("convert", tmp_path / "c", tmp_path / "refused", "--to", to)
    call(
        "convert",
        tmp_path / "c",
        tmp_path / to,
        "--to",
        to,
        *(["--exclude", "__metadata__"] if to == "safetensors" else []),
    )
    checkpoint = reshard.open(tmp_path / to)
    assert all(checkpoint.read(name).equal(VALUES) for name in names)
    check_commands(tmp_path / to, tmp_path, names)


@pytest.mark.parametrize("format", ["torch", "dcp", "safetensors"])
def test_every_format_can_contain_every_name(format: str, tmp_path: Path) -> None:
    location, names = tmp_path / format, NAMES
    if format == "torch":
        location = tmp_path / "m.pt"
        torch.save(state_of(names), location)
    elif format == "dcp":
        dcp.save(state_of(names), checkpoint_id=location)
    else:  # the safetensors writer does not accept surrogates
        names = [
            name for name in NAMES if name != "__metadata__" and not any("\ud800" <= char <= "\udfff" for char in name)
        ]
        location.mkdir()
        save_file(
            {name: tensor.clone() for name, tensor in state_of(names).items()},
            location / "model.safetensors",
            metadata={name: name for name in names} | {"format": "\x1b"},
        )
    checkpoint = reshard.open(location)
    assert all(checkpoint.read(name).equal(VALUES) for name in names)
    check_commands(location, tmp_path, names)
    call("convert", location, tmp_path / "copy")


@pytest.mark.parametrize("name", [*SHOWN[:6], "\ud800", *ODD[:8]], ids=lambda name: ascii(name)[:24])
def test_values_can_have_every_name(name: str, tmp_path: Path) -> None:
    reshard.save({name: {"a": 5}, "w": VALUES}, tmp_path / "a")
    reshard.save({name: VALUES, "w": VALUES}, tmp_path / "b")
    call("inspect", tmp_path / "a")
    call("inspect", tmp_path / "a", "*")
    assert {len(row) for row in rows(call("diff", tmp_path / "a", tmp_path / "b"))} == {6}


@pytest.mark.parametrize("name", LONG, ids=["n", "dots", "words"])
def test_long_names_are_shortened(name: str, tmp_path: Path) -> None:
    location = tmp_path / "c"
    reshard.save(state_of([name]), location)
    checkpoint = reshard.open(location)
    assert checkpoint.read(name).equal(VALUES)
    assert len(checkpoint._repr_html_()) < 100_000
    with pytest.raises(ShapeMismatchError) as wrong:
        reshard.load({name: torch.zeros(3, 5)}, location)
    assert len(str(wrong.value)) < 25_000
    assert all(len(row[0]) < 25_000 for row in rows(call("inspect", location)))
    assert name in json.loads(call("inspect", location, "--json"))["tensors"]
    call("verify", location)


def test_names_are_folded_only_by_plain_numbers() -> None:
    names = ["a.0", "a.1", "a.²", "a.³", "a.٣", "a.01", "a." + "9" * 5000, "a." + "9" * 19]
    folded = fold(dict.fromkeys(names, ()))
    assert [value.name for value in folded] == ["a.[0-1]", *names[2:]]
    assert even_stages(names, 2)["a.²"] == 1


@pytest.mark.parametrize("depth", [1, 31, 32, 33, 1100, 20_000])
def test_names_of_any_depth_form_a_tree(depth: int) -> None:
    names = [".".join("a" * n) for n in {1, depth // 2 or 1, depth - 1 or 1, depth}] + [f"{'a.' * depth}b", "z"]
    lines = tree(fold(dict.fromkeys(names, ())))
    assert {tensors.names[0] for _, tensors in lines if tensors is not None} == set(names)
    assert all(len(line) - len(line.lstrip()) <= 64 for line, _ in lines)


@pytest.mark.parametrize("name", ["a\x1b[2J\nb\tc", "\u202ex", "[bold]x", "é中", "x\udce9"], ids=ascii)
def test_folder_of_any_name_is_listed_in_one_row(name: str, tmp_path: Path) -> None:
    reshard.save({"w": VALUES}, tmp_path / name)
    (tmp_path / f"{name}-2").mkdir()
    (tmp_path / f"{name}-2" / "manifest.reshard").write_bytes(b"damaged")
    table = rows(call("ls", tmp_path))
    assert len(table) == 3
    assert {len(row) for row in table} == {7}
    assert {row["uri"] for row in json.loads(call("ls", tmp_path, "--json"))} == {
        f"{tmp_path}/{name}",
        f"{tmp_path}/{name}-2",
    }
    call("gc", tmp_path)
    call("inspect", tmp_path / name)
    with pytest.raises(CheckpointError) as damaged:
        reshard.open(tmp_path / f"{name}-2")
    check_error(damaged.value)
    call("rm", tmp_path / name, "--yes")


def test_values_and_files_are_shown_in_one_line(tmp_path: Path) -> None:
    hostile = "\x1b[2J\nb\tc\u202e\ud800"
    state = {
        "text": hostile,
        "keys": {hostile: 1},
        "list": [hostile],
        "t": VALUES,
        "many": {(1, hostile): torch.ones(1)},
    }
    reshard.save(state, tmp_path / "c")
    call("inspect", tmp_path / "c")
    assert "\\x1b[2J\\nb\\tc" in call("inspect", tmp_path / "c", "text")
    assert json.loads(call("inspect", tmp_path / "c", "text", "--json"))["text"]["value"] == hostile
    reshard.save({**state, "text": "other"}, tmp_path / "d")
    assert {len(row) for row in rows(call("diff", tmp_path / "c", tmp_path / "d"))} == {6}
    folder = tmp_path / "hf"
    folder.mkdir()
    save_file({"w": VALUES}, folder / "model.safetensors")
    save_file({"x": VALUES}, folder / "extra\x1b[2J\n.safetensors")
    index = {"weight_map": {"w": "model.safetensors", hostile: f"gone{hostile}.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    output = call("inspect", folder)
    assert "are not in the index" in output
    (folder / "config.json").write_text(json.dumps({"base_model_tp_plan": {hostile: hostile}}))
    for command in (["plan", folder, "--tp", 2], ["convert", folder, tmp_path / "copy"], ["inspect", folder, hostile]):
        with pytest.raises(CheckpointError) as refused:
            call(*command)
        check_error(refused.value)


@pytest.mark.parametrize(
    "info", [{"unindexed_files": 5}, {"unindexed_files": ["\x1b[2J\n"], "created": "\x1b\t", "writer": [1]}]
)
def test_a_checkpoint_with_info_of_any_kind_is_shown(
    info: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reshard.save({"w": VALUES}, tmp_path / "c")
    monkeypatch.setattr(reshard.Checkpoint, "info", info)
    assert call("inspect", tmp_path / "c").startswith(f"{tmp_path}/c: reshard")
    assert "complete" in call("ls", tmp_path)


def test_deeply_nested_values_are_shown_or_refused(tmp_path: Path) -> None:
    value: Any = 1
    for _ in range(90):
        value = [value]
    reshard.save({"deep": value, "w": VALUES}, tmp_path / "c")
    for arguments in ([], ["--json"]):
        try:
            call("inspect", tmp_path / "c", "deep", *arguments)
        except CheckpointError as error:
            check_error(error)


@pytest.mark.parametrize("in_folder", [False, True])
def test_globals_of_pickles_are_escaped(in_folder: bool, tmp_path: Path) -> None:
    pickled = b"(dp0\nVx\nc\x1b[2Jevil\nna\tme\n(tRs."
    location = tmp_path / "m.pt"
    if in_folder:
        location = tmp_path / "dcp"
        location.mkdir()
        (location / ".metadata").write_bytes(pickled)
    else:
        with zipfile.ZipFile(location, "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
            archive.writestr("archive/version", "3")
    with pytest.raises(CheckpointError) as refused:
        reshard.open(location)
    check_error(refused.value)
    call("ls", tmp_path)
    run = [sys.executable, "-m", "reshard.cli", "--debug", "inspect", str(location)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.replace("\n", "").isprintable()


@pytest.mark.parametrize("part", ["a\0b", "\ud800", "x" * 300])
def test_impossible_paths_raise_clear_errors(part: str, tmp_path: Path) -> None:
    location = f"{tmp_path}/{part}"
    for use in (
        lambda: reshard.open(location),
        lambda: reshard.save({"w": VALUES}, location),
        lambda: reshard.load({"w": VALUES.clone()}, f"{location}/c"),
        lambda: reshard.open(f"{location}.pt"),
        lambda: reshard.remove(location),
    ):
        with pytest.raises(CheckpointError) as refused:
            use()
        check_error(refused.value)


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_every_terminal_can_show_every_name(encoding: str, tmp_path: Path) -> None:
    hostile = dict.fromkeys([*SHOWN, *ODD[:7], LONG[0][:10_000]], torch.ones(2))
    reshard.save({**hostile, "text": "\x1b[2J²\ud800"}, tmp_path / "c")
    for arguments in (["inspect", "c"], ["inspect", "c", "no²\u202e"]):
        run = [sys.executable, "-m", "reshard.cli", *arguments]
        environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
        done = subprocess.run(
            run, cwd=tmp_path, env=environment, capture_output=True, timeout=90, check=False, preexec_fn=limited
        )
        assert done.returncode == (2 if len(arguments) == 3 else 0), done.stderr
        output = (done.stdout + done.stderr).decode(encoding)
        assert "Traceback" not in output
        assert output.replace("\n", "").replace("\t", "").isprintable()
        assert ("é中文😀" in output) == (encoding == "utf-8" and len(arguments) == 2)


def test_output_contains_no_terminal_control_codes(tmp_path: Path) -> None:
    reshard.save({**dict.fromkeys([*SHOWN, *ODD[:7]], torch.ones(2)), "z.a.b": VALUES, "z.a.c": VALUES}, tmp_path / "c")
    parent, child = pty.openpty()
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    run = [sys.executable, "-m", "reshard.cli", "inspect", "c"]
    process = subprocess.Popen(run, cwd=tmp_path, env=environment, stdout=child, stderr=child, preexec_fn=limited)
    os.close(child)
    output = b""
    try:
        while data := os.read(parent, 65536):
            output += data
    except OSError:  # how Linux reports the end
        pass
    finally:
        os.close(parent)
    assert process.wait(60) == 0, output
    text = output.decode()
    assert text.replace("\r\n", "").isprintable()
    assert "\\x1b]0;TITLE\\x07" in text
    assert "[bold]x[/bold]" in text


def test_pictures_show_every_name(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    for at, name in enumerate(["$\\frac$", "\x1b[2J\n\ud800", LONG[0], "<b>"]):
        reshard.save({name: VALUES}, tmp_path / str(at))
        figure = reshard.pictures.chunk_map(reshard.open(tmp_path / str(at)).plan(ROWWISE), name)
        assert isinstance(figure, Figure)
        figure.savefig(tmp_path / f"{at}.svg")
        assert (tmp_path / f"{at}.svg").stat().st_size < 1_000_000


@pytest.mark.parametrize("digits", ["9" * 5000, "٣" * 5000, "²", "٣"])
def test_folders_and_ranks_with_unusual_numbers(digits: str) -> None:
    location = f"memory://odd-{ascii(digits)[:9]}/step-{digits}"
    reshard.save({"w": VALUES}, location)
    (found,) = reshard.find_checkpoints(location)
    assert found.step is None
    reshard.remove(location)
    import fsspec

    with fsspec.filesystem("memory").open(f"{location}/__{digits}.metadata", "wb") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError) as refused:
        reshard.open(location)
    check_error(refused.value)
