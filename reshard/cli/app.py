"""The commands and their options. Each command imports its implementation when it runs, so that `--help` is fast."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import AsJson, Format, Options, Uri

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Inspect, plan, verify, convert, compare and clean up checkpoints of PyTorch models.",
)
Include = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Names to read. Repeatable."),
]
Exclude = Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Names to leave out. Repeatable.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        import reshard

        print(reshard.__version__)
        raise typer.Exit


@app.callback()
def options_of_all_commands(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def inspect(
    uri: Uri,
    names: Annotated[
        list[str] | None, typer.Argument(help="Names or patterns of tensors to show in detail.", show_default=False)
    ] = None,
    format: Format = None,
    storage_option: Options = None,
    as_json: AsJson = False,
) -> None:
    """Show the format, the sizes by dtype and the tensors of a checkpoint. Similar layers are shown as one row.

    The exit code is 1 if tensors are missing.

    Example: reshard inspect s3://bucket/run/step-1000 model.layers.0.up.weight
    """
    from .inspect import run

    raise typer.Exit(run(uri, names or [], format, storage_option, as_json))


@app.command()
def plan(
    uri: Uri,
    tp: Annotated[int, typer.Option(min=1, metavar="N", help="TP ranks.")] = 1,
    fsdp: Annotated[int, typer.Option(min=1, metavar="N", help="FSDP ranks.")] = 1,
    pp: Annotated[int, typer.Option(min=1, metavar="N", help="Pipeline stages.")] = 1,
    dp: Annotated[int, typer.Option(min=1, metavar="N", help="Replicas.")] = 1,
    tp_plan: Annotated[
        list[str] | None,
        typer.Option("--tp-plan", metavar="RULE|FILE", help="'*.up=colwise', or a JSON file."),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    latency: Annotated[float | None, typer.Option(min=0, metavar="MS", help="Request latency. Default: 20.")] = None,
    bandwidth: Annotated[
        float | None, typer.Option(min=0.001, metavar="MB/S", help="Of a rank. Default: 1000.")
    ] = None,
    concurrent_requests: Annotated[int, typer.Option(min=1, metavar="N", help="Of a rank.")] = 32,
    price: Annotated[
        float, typer.Option("--price-per-1000-gets", min=0, metavar="DOLLARS", help="Price of the requests.")
    ] = 0.0004,
    max_over_read: Annotated[
        float | None,
        typer.Option(min=0, metavar="FRACTION", help="Over-read bytes per wanted byte."),
    ] = None,
    cooperative: Annotated[bool, typer.Option("--cooperative", help="The ranks share the read.")] = False,
    plot: Annotated[str | None, typer.Option(metavar="FILE", help="Draw a .png, .svg or .pdf.")] = None,
    tensor: Annotated[str | None, typer.Option(metavar="NAME", help="Tensor for --plot.")] = None,
    save: Annotated[str | None, typer.Option(metavar="FILE.json", help="Save the plan; usable as URI.")] = None,
    format: Format = None,
    storage_option: Options = None,
    as_json: AsJson = False,
) -> None:
    """Show what each rank of a layout would read, from metadata only, and what DCP would read (whole shards).

    Without --tp-plan, the plan in config.json is used. --latency and --bandwidth plan for another store. With
    --cooperative, the ranks read once what several of them need, and send it to each other, as in reshard.load.

    Example: reshard plan s3://bucket/run/step-1000 --tp 8 --tp-plan '*.up=colwise' --tp-plan '*.down=rowwise'
    """
    from .plan import Link, PlanOptions, run

    sizes = {"pp": pp, "dp": dp, "fsdp": fsdp, "tp": tp}
    mesh = {name: size for name, size in sizes.items() if size > 1}
    options = PlanOptions(mesh, tp_plan or [], include or ["*"], exclude or [], max_over_read, tensor, cooperative)
    link = Link(
        (20.0 if latency is None else latency) / 1e3,
        (1000.0 if bandwidth is None else bandwidth) * 1e6,
        concurrent_requests,
        price,
        is_given=latency is not None or bandwidth is not None,
    )
    run(uri, options, link, plot, save, format, storage_option, as_json)


@app.command()
def verify(
    uri: Uri,
    quick: Annotated[bool, typer.Option("--quick", help="Check only the sizes of the objects.")] = False,
    format: Format = None,
    storage_option: Options = None,
    as_json: AsJson = False,
) -> None:
    """Compare every chunk with its checksum, if the format has checksums. The exit code is 1 if there is damage.

    Example: reshard verify s3://bucket/run/step-1000
    """
    from .verify import run

    raise typer.Exit(run(uri, quick, format, storage_option, as_json))


@app.command()
def convert(
    src: Annotated[str, typer.Argument(help="A checkpoint of any format.", show_default=False)],
    dst: Annotated[str, typer.Argument(help="A folder without a checkpoint.", show_default=False)],
    to: Annotated[str, typer.Option(help="reshard, dcp or safetensors.")] = "reshard",
    include: Include = None,
    exclude: Exclude = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OLD=NEW",
            help="'model.*=*'; others stay. Repeatable.",
        ),
    ] = None,
    allow_missing: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Skip if unreadable. Repeatable."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Cast floats, as to bfloat16.")] = None,
    codec: Annotated[str, typer.Option(help="zstd or none.")] = "zstd",
    max_file_gb: Annotated[float, typer.Option(min=0.001, help="Size of safetensors files.")] = 5.0,
    format: Format = None,
    src_option: Options = None,
    dst_option: Annotated[
        list[str] | None,
        typer.Option("--dst-option", metavar="KEY=VALUE", help="Options of DST, if different."),
    ] = None,
) -> None:
    """Convert a checkpoint to another format, dtype or names. An interrupted conversion continues if run again.

    Under torchrun, the ranks share the work.

    Example: reshard convert s3://bucket/run/step-1000 model --to safetensors --include model --rename 'model.*=*'
    """
    from .convert import ConvertOptions, run

    options = ConvertOptions(
        to, include or ["*"], exclude or [], rename or [], allow_missing or [], dtype, codec, max_file_gb
    )
    run(src, dst, options, format, src_option, dst_option)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="A checkpoint.", show_default=False)],
    b: Annotated[str, typer.Argument(help="Another checkpoint.", show_default=False)],
    storage_option: Options = None,
    as_json: AsJson = False,
) -> None:
    """Show the names, shapes, dtypes and values that differ between two checkpoints, the largest differences first.

    The exit code is 1 if there are differences. This does not detect damaged data; `reshard verify` does.

    Example: reshard diff step-1000 step-2000
    """
    from .diff import run

    raise typer.Exit(run(a, b, storage_option, as_json))


@app.command()
def ls(uri: Uri, storage_option: Options = None, as_json: AsJson = False) -> None:
    """List the checkpoints at and below a location: format, step, size, age, and whether they are complete.

    Example: reshard ls s3://bucket/run
    """
    from .catalog import ls as run

    run(uri, storage_option, as_json)


@app.command()
def rm(
    uri: Uri,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    storage_option: Options = None,
) -> None:
    """Remove a checkpoint of reshard or DCP. Its metadata is removed first, then its data.

    Example: reshard rm s3://bucket/run/step-1000
    """
    from .catalog import rm as run

    run(uri, yes, storage_option)


@app.command()
def gc(
    uri: Uri,
    older_than: Annotated[
        float,
        typer.Option(min=0, help="Minimum age in hours, at least 1. Younger data may belong to a running save."),
    ] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be removed.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    no_save_running: Annotated[
        bool,
        typer.Option(
            "--no-save-running", help="Allow less than an hour. This would damage a save that is running there."
        ),
    ] = False,
    storage_option: Options = None,
) -> None:
    """Remove data that failed or killed saves left at and below a location. Complete checkpoints are not touched.

    Example: reshard gc s3://bucket/run --dry-run
    """
    from .catalog import gc as run

    run(uri, older_than, dry_run, yes, no_save_running, storage_option)


@app.command()
def demo(
    uri: Annotated[str | None, typer.Option(help="Where to save. Default: demo-run/checkpoint.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps before the save.")] = 60,
    storage_option: Options = None,
) -> None:
    """Train with FSDP on 4 processes, save, serve with TP on 2, and resume on 3.

    This takes about a minute on two cores. It writes to ./demo-run and removes what an earlier demo left there.

    Example: reshard demo --uri s3://bucket/demo
    """
    from .demo import demo as run

    run(uri, steps, storage_option)
