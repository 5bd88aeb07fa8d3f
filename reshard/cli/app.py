"""The commands and their options. What they do is imported when they run, so that `--help` is quick."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import AsJson, Format, Options, Uri

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Checkpoints for PyTorch: look into them, plan how ranks read them, verify, convert, compare, tidy up.",
)
Names = Annotated[str, typer.Option("--names", help="A pattern of tensors; 'model' stands for all below it.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        import reshard

        print(reshard.__version__)
        raise typer.Exit


@app.callback()
def everywhere(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error was raised.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def inspect(
    uri: Uri,
    names: Annotated[
        list[str] | None, typer.Argument(help="Tensors to tell all of, or patterns.", show_default=False)
    ] = None,
    format: Format = None,
    storage_option: Options = None,
    as_json: AsJson = False,
) -> None:
    """What a checkpoint is: format, sizes by dtype, tensors with like layers folded. Exit code 1 if some are missing.

    Example: reshard inspect s3://bucket/run/step-1000 model.layers.0.up.weight
    """
    from .inspect import run

    raise typer.Exit(run(uri, names or [], format, storage_option, as_json))


@app.command()
def plan(
    uri: Uri,
    tp: Annotated[int, typer.Option(min=1, metavar="N", help="Ranks of TP.")] = 1,
    fsdp: Annotated[int, typer.Option(min=1, metavar="N", help="Ranks of FSDP.")] = 1,
    pp: Annotated[int, typer.Option(min=1, metavar="N", help="Stages of a pipeline.")] = 1,
    dp: Annotated[int, typer.Option(min=1, metavar="N", help="Replicas.")] = 1,
    tp_plan: Annotated[
        list[str] | None,
        typer.Option("--tp-plan", metavar="RULE|FILE", help="'*.up=colwise', or a JSON file of such."),
    ] = None,
    names: Names = "*",
    latency: Annotated[
        float | None, typer.Option(min=0, metavar="MS", help="Of a request; 20 for the seconds.")
    ] = None,
    bandwidth: Annotated[float | None, typer.Option(min=0.001, metavar="MB/S", help="Of a rank; 1000.")] = None,
    requests_at_once: Annotated[int, typer.Option(min=1, metavar="N", help="Of a rank.")] = 32,
    price: Annotated[float, typer.Option("--price-per-1000-gets", min=0, metavar="DOLLARS")] = 0.0004,
    max_over_read: Annotated[
        float | None, typer.Option(min=0, metavar="FRACTION", help="Bytes, per byte needed.")
    ] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE", help="Draw it: a .png, .svg or .pdf.")] = None,
    tensor: Annotated[str | None, typer.Option(metavar="NAME", help="Whose chunks to draw.")] = None,
    save: Annotated[str | None, typer.Option(metavar="FILE.json", help="Keep it; give it as URI later.")] = None,
    format: Format = None,
    storage_option: Options = None,
    as_json: AsJson = False,
) -> None:
    """What each rank would read under another layout, and what it costs; beside it DCP, which reads whole shards.

    Without --tp-plan the plan in the checkpoint's config.json is taken. With --latency or --bandwidth it is planned
    for such a store, else for the one that it is on.

    Example: reshard plan s3://bucket/run/step-1000 --tp 8 --tp-plan '*.up=colwise' --tp-plan '*.down=rowwise'
    """
    from .plan import Link, Wanted, run

    sizes = {"pp": pp, "dp": dp, "fsdp": fsdp, "tp": tp}
    mesh = {name: size for name, size in sizes.items() if size > 1}
    wanted = Wanted(mesh, tp_plan or [], names, max_over_read, tensor)
    link = Link(
        (20.0 if latency is None else latency) / 1e3,
        (1000.0 if bandwidth is None else bandwidth) * 1e6,
        requests_at_once,
        price,
        is_given=latency is not None or bandwidth is not None,
    )
    run(uri, wanted, link, plot, save, format, storage_option, as_json)


@app.command()
def verify(
    uri: Uri,
    quick: Annotated[bool, typer.Option("--quick", help="Sizes only.")] = False,
    format: Format = None,
    storage_option: Options = None,
    as_json: AsJson = False,
) -> None:
    """Every chunk against its checksum, as far as the format has some; exit code 1 where any is damaged or missing.

    Example: reshard verify s3://bucket/run/step-1000
    """
    from .verify import run

    raise typer.Exit(run(uri, quick, format, storage_option, as_json))


@app.command()
def convert(
    src: Annotated[str, typer.Argument(help="A checkpoint of any format.", show_default=False)],
    dst: Annotated[str, typer.Argument(help="An empty place.", show_default=False)],
    to: Annotated[str, typer.Option(help="reshard, dcp or safetensors.")] = "reshard",
    names: Names = "*",
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Names that are left out. May be repeated.")
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(metavar="OLD=NEW", help="Patterns with stars: 'model.*=*'. Other names are left out."),
    ] = None,
    keep_others: Annotated[
        bool, typer.Option("--keep-others", help="With --rename: names that no pattern matches stay as they are.")
    ] = False,
    allow_missing: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Names that are left out where they cannot be read. May be repeated."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of floating-point tensors, as bfloat16.")] = None,
    codec: Annotated[str, typer.Option(help="zstd or none.")] = "zstd",
    max_file_gb: Annotated[float, typer.Option(min=0.001, help="Of safetensors files.")] = 5.0,
    format: Format = None,
    src_option: Options = None,
    dst_option: Annotated[
        list[str] | None, typer.Option("--dst-option", metavar="KEY=VALUE", help="Of DST, where they differ.")
    ] = None,
) -> None:
    """Into another format, dtype or other names. Made again after a kill, it goes on. torchrun shares the work.

    Example: reshard convert s3://bucket/run/step-1000 model --to safetensors --rename 'model.*=*' --dtype bfloat16
    """
    from .convert import run

    run(
        src,
        dst,
        to,
        names,
        exclude or [],
        rename or [],
        keep_others,
        allow_missing or [],
        dtype,
        codec,
        max_file_gb,
        format,
        src_option,
        dst_option,
    )


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="A checkpoint.", show_default=False)],
    b: Annotated[str, typer.Argument(help="Another.", show_default=False)],
    storage_option: Options = None,
    as_json: AsJson = False,
) -> None:
    """Names, shapes, dtypes and values in which two checkpoints differ, the largest changes first; exit code 1 if any.

    Example: reshard diff step-1000 step-2000
    """
    from .diff import run

    raise typer.Exit(run(a, b, storage_option, as_json))


@app.command()
def ls(uri: Uri, storage_option: Options = None, as_json: AsJson = False) -> None:
    """The checkpoints at a place and below it: format, step, size, age, and whether they are whole.

    Example: reshard ls s3://bucket/run
    """
    from .places import ls as run

    run(uri, storage_option, as_json)


@app.command()
def rm(
    uri: Uri,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    storage_option: Options = None,
) -> None:
    """Remove a checkpoint of reshard or DCP: first what makes it one, then its data.

    Example: reshard rm s3://bucket/run/step-1000
    """
    from .places import rm as run

    run(uri, yes, storage_option)


@app.command()
def gc(
    uri: Uri,
    older_than: Annotated[
        float, typer.Option(min=0, help="Hours, 1 or more; younger data may be of a save in progress.")
    ] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    no_save_running: Annotated[
        bool,
        typer.Option(
            "--no-save-running", help="No save is in progress there: allows less than an hour, which would damage it."
        ),
    ] = False,
    storage_option: Options = None,
) -> None:
    """Remove data of saves that failed or were killed, at a place and below it; never what a checkpoint is made of.

    Example: reshard gc s3://bucket/run --dry-run
    """
    from .places import gc as run

    run(uri, older_than, dry_run, yes, no_save_running, storage_option)


@app.command()
def demo(
    uri: Annotated[str | None, typer.Option(help="Where to save; demo-run/checkpoint by default.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps before the save.")] = 60,
    storage_option: Options = None,
) -> None:
    """The main job on real input: train under FSDP on 4 processes, save, serve under TP on 2, resume on 3.

    Takes a minute on two cores, and writes to ./demo-run, which it makes; what an earlier demo left there goes.

    Example: reshard demo --uri s3://bucket/demo
    """
    from .demo import demo as run

    run(uri, steps, storage_option)
