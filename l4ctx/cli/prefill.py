"""The `prefill` command as a person types it, and what is refused at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from l4ctx.cli import options
from l4ctx.cli.exits import check_stdout, errors_as_exit_codes
from l4ctx.cli.show import carry_out
from l4ctx.cli.stdin import (
    check_choices,
    checkpoint_folder,
    context_folder,
    encoding_named,
    paths_or_pipe,
    size,
    standard_input,
)
from l4ctx.errors import UsageError

if TYPE_CHECKING:
    from l4ctx.run.request import Request


def prefill(
    paths: options.Paths = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="CONTEXT",
            help="Folder to keep what is read in; made, or gone on with. Only you can read it.",
            show_default=False,
        ),
    ] = None,
    model: options.Model = None,
    no_images: options.NoImages = False,
    skip_unreadable: options.SkipUnreadable = False,
    pdf: options.Pdf = "text",
    encoding: options.Encoding = None,
    keep_payload: options.KeepPayload = False,
    system: options.System = None,
    replace: options.Replace = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every byte that CONTEXT holds, and read anew from the first damage.")
    ] = False,
    dtype: options.Dtype = "auto",
    kv_dtype: options.KVDtype = "auto",
    kv_device_memory: options.KVDeviceMemory = None,
    kv_host_memory: options.KVHostMemory = None,
    device: options.Device = "auto",
    attention: options.Attention = None,
    prefill_chunk_size: options.PrefillChunkSize = None,
    memory_report: options.MemoryReport = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Read documents once and keep what was read, to be asked many times.

    l4ctx prefill docs/ report.md -o CONTEXT --model DIR

    Interrupted, the same command goes on where it was. After documents changed, it reads from the first change on.
    """

    def request() -> Request:
        from l4ctx.run.request import Request

        check_choices(dtype, kv_dtype, attention, pdf)
        if json:
            check_stdout("to")
        folder = context_folder("-o", output)
        if folder is None:
            raise UsageError("no context: name a folder to keep what is read in, with -o CONTEXT")
        documents = paths_or_pipe(paths or [], quiet=quiet)
        if not documents:
            raise UsageError("no documents: l4ctx prefill PATH... -o CONTEXT, or pipe a text in")
        return Request(
            model=checkpoint_folder(model, folder, may_be_new=True),
            paths=documents,
            stdin=standard_input(),
            system=system,
            save_context=folder,
            replace=replace,
            no_images=no_images,
            skip_unreadable=skip_unreadable,
            pdf=pdf,
            encoding=encoding_named(encoding),
            keep_payload=keep_payload,
            verify=verify,
            dtype=dtype,
            kv_dtype=kv_dtype,
            kv_device_memory=size("--kv-device-memory", kv_device_memory),
            kv_host_memory=size("--kv-host-memory", kv_host_memory),
            device=device,
            attention=attention,
            prefill_chunk_size=prefill_chunk_size,
        )

    with errors_as_exit_codes(json=json) as interruption:
        carry_out(request(), interruption, json=json, quiet=quiet, memory_report=memory_report)
