"""The `ask` command as a person types it, and what is refused at once."""

from __future__ import annotations

from pathlib import Path
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
    holds_data,
    inputs,
    size,
)
from l4ctx.errors import UsageError

if TYPE_CHECKING:
    from l4ctx.run.request import Request


def ask(
    question: Annotated[
        str | None,
        typer.Argument(
            metavar="QUESTION", help="What to ask; - reads the question from standard input.", show_default=False
        ),
    ] = None,
    paths: options.Paths = None,
    model: options.Model = None,
    question_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Read the question from a file; every argument is then a path. - is standard input."
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            metavar="CONTEXT",
            help="Answer from what l4ctx prefill has read, or has read so far. With paths that begin "
            "as CONTEXT does, answer from these, and read only what is new.",
        ),
    ] = None,
    save_context: Annotated[
        str | None, typer.Option(metavar="CONTEXT", help="Keep what is read in this folder, to ask more later.")
    ] = None,
    add: Annotated[
        list[str] | None,
        typer.Option(
            "--add",
            metavar="PATH",
            help="With --context: read this, too, behind what CONTEXT holds; CONTEXT stays as it is. Can be repeated.",
            show_default=False,
        ),
    ] = None,
    replace: options.Replace = False,
    no_documents: Annotated[bool, typer.Option("--no-documents", help="Ask the model alone, about nothing.")] = False,
    no_images: options.NoImages = False,
    skip_unreadable: options.SkipUnreadable = False,
    pdf: options.Pdf = "text",
    encoding: options.Encoding = None,
    keep_payload: options.KeepPayload = False,
    system: options.System = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            parser=options.token_count(1),
            metavar="N",
            help="Length of the answer at most, in tokens; 1024 unless told.",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, help="0 takes the likeliest token each time, which is the default.", show_default=False),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens of this total probability.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Draw from that many of the likeliest tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws, for the same answer twice.")] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Draw as the checkpoint's authors recommend.")] = False,
    loop_guard: Annotated[
        bool, typer.Option("--loop-guard/--no-loop-guard", help="End an answer that repeats the same words for good.")
    ] = True,
    dtype: options.Dtype = "auto",
    kv_dtype: options.KVDtype = "auto",
    kv_device_memory: options.KVDeviceMemory = None,
    kv_host_memory: options.KVHostMemory = None,
    kv_dir: options.KVDir = None,
    device: options.Device = "auto",
    attention: options.Attention = None,
    prefill_chunk_size: options.PrefillChunkSize = None,
    memory_report: options.MemoryReport = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Read documents and answer a question about them.

    l4ctx ask "What changed in version 2?" notes/ report.md --model DIR

    git log | l4ctx ask "Who worked on the parser?" --model DIR

    l4ctx ask "And who tested it?" --context CONTEXT --model DIR
    """
    if question_file is not None and question is not None:
        paths = [question, *(paths or [])]
        question = None

    def request() -> Request:
        from l4ctx.run.request import Request

        check_choices(dtype, kv_dtype, attention, pdf)
        if seed is not None and not 0 <= seed < 2**63:
            raise UsageError(f"--seed: {seed} is not between 0 and {2**63 - 1}")
        check_stdout("the answer to")
        if context is not None and save_context is not None:
            raise UsageError(
                "--context answers from what was kept, --save-context keeps: give one of them "
                "(l4ctx prefill adds documents to a context)"
            )
        if add and (context is None or paths):
            raise UsageError(
                "--add PATH reads PATH behind what --context CONTEXT holds: give a context, and no other paths"
            )
        if replace and save_context is None:
            raise UsageError("--replace is for --save-context")
        asked, kept = context_folder("--context", context), context_folder("--save-context", save_context)
        text, documents, stdin = inputs(
            question, question_file, paths or add or [], quiet=quiet, reads_pipe=context is None and not no_documents
        )
        if no_documents:
            if documents or context is not None or save_context is not None or (stdin and holds_data(stdin)):
                raise UsageError(
                    "--no-documents asks the model alone: leave out paths, --context, --save-context and "
                    "what is piped in, or leave out --no-documents"
                )
        elif not documents and context is None:
            raise UsageError(
                "no documents: name files or folders, pipe a text in, or add --context CONTEXT; "
                "--no-documents asks the model alone"
            )
        if context is not None and (add or not documents):
            for option, is_given in (
                ("--system", system is not None),
                ("--pdf", pdf != "text" and not add),
                ("--no-images", no_images and not add),
                ("--encoding", encoding is not None and not add),
                ("--keep-payload", keep_payload and not add),
            ):
                if is_given:
                    raise UsageError(
                        f"{option}: what it is about is part of what the context holds; give it to l4ctx prefill"
                    )
        checkpoint = checkpoint_folder(model, asked or kept, may_be_new=asked is None)
        return Request(
            model=checkpoint,
            question=text,
            paths=documents,
            stdin=stdin,
            system=system,
            context=asked,
            save_context=kept,
            added=bool(add),
            replace=replace,
            no_images=no_images,
            skip_unreadable=skip_unreadable,
            pdf=pdf,
            encoding=encoding_named(encoding),
            keep_payload=keep_payload,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            sample=sample,
            loop_guard=loop_guard,
            dtype=dtype,
            kv_dtype=kv_dtype,
            kv_device_memory=size("--kv-device-memory", kv_device_memory),
            kv_host_memory=size("--kv-host-memory", kv_host_memory),
            kv_dir=kv_dir,
            device=device,
            attention=attention,
            prefill_chunk_size=prefill_chunk_size,
        )

    with errors_as_exit_codes(json=json) as interruption:
        carry_out(request(), interruption, json=json, quiet=quiet, memory_report=memory_report)
