"""The `quantize` command: writes a checkpoint with quantized weights that other programs load, too."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from l4ctx.cli import options
from l4ctx.cli.exits import Interruption, check_stdout, errors_as_exit_codes, write_json
from l4ctx.errors import UsageError


def quantize(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="MODEL", help="Checkpoint folder with 16-bit weights.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder to write; created, or gone on with."),
    ] = None,
    to: Annotated[
        Literal["w4a16", "w8a16", "fp8"],
        typer.Option(
            "--to",
            metavar="w4a16|w8a16|fp8",
            help="int4 in groups, int8 or e4m3 with a scale a row. Activations stay in 16 bits.",
        ),
    ] = "w4a16",
    group_size: Annotated[
        int | None,
        typer.Option(
            parser=options.token_count(8),
            metavar="128|64|32",
            help="Weights of w4a16 that share a scale (default: the largest of these that divides all widths).",
            show_default=False,
        ),
    ] = None,
    with_attention: Annotated[
        bool, typer.Option("--with-attention", help="Quantize the matrices of attention, too.")
    ] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Allow writing over a checkpoint in DIR.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a checkpoint with quantized weights, in a form that other programs load.

    l4ctx quantize MODEL -o DIR --to w4a16

    Experts, shared experts and dense layers are quantized. After an interruption the same command goes on.
    """
    with errors_as_exit_codes(json=json, checkpoint=model) as interruption:
        if json:
            check_stdout("to")
        if model is None or output is None:
            raise UsageError("l4ctx quantize MODEL -o DIR: name the checkpoint and the folder to write")
        if group_size is not None and (to != "w4a16" or group_size not in (32, 64, 128)):
            raise UsageError(f"--group-size {group_size}: w4a16 has groups of 128, 64 or 32, other forms have none")
        _quantize(
            model, output, (to, with_attention, group_size or 0), interruption, replace=replace, json=json, quiet=quiet
        )


def _quantize(
    model: Path,
    output: Path,
    form: tuple[str, bool, int],
    interruption: Interruption,
    *,
    replace: bool,
    json: bool,
    quiet: bool,
) -> None:
    from l4ctx.cli.activity import Activity
    from l4ctx.cli.console import notes, stderr_console
    from l4ctx.conversion.forms import Form
    from l4ctx.formatting import counted, human_bytes, human_seconds
    from l4ctx.inspection.model_folder import check_model_folder
    from l4ctx.machine.device import prepare_torch

    check_model_folder(model)
    prepare_torch()
    from l4ctx.conversion.layout import Conversion
    from l4ctx.conversion.writing import check_output, write

    interruption.kept = lambda: "finished shards are kept, and the same command goes on"
    began, activity = time.perf_counter(), Activity(stderr_console(), is_shown=not quiet)
    activity.tell("checking the checkpoint")
    with activity:
        conversion = Conversion.of(model, Form(*form))
        check_output(conversion, output, replace=replace)
        found = write(
            conversion,
            output,
            lambda done, total: activity.tell(f"quantizing: {human_bytes(done)} of {human_bytes(total)} written"),
        )
    seconds = time.perf_counter() - began
    notes(stderr_console(), quiet=quiet)(
        f"{output}: {counted(len(conversion.shards), 'shard')}, {human_bytes(conversion.num_bytes)}, "
        f"{conversion.form.label}; {counted(found, 'shard')} had been there; {human_seconds(seconds)}"
    )
    if json:
        write_json(
            {
                "output": str(output),
                "form": conversion.form.label,
                "bytes": conversion.num_bytes,
                "shards": len(conversion.shards),
                "shards_found": found,
                "seconds": round(seconds, 3),
            }
        )
