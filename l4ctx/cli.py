"""The command line: what a person types, and the only module that opens the terminal or exits.

The answer goes to stdout, all else to stderr. Every error that a user can cause ends as one line and an exit code.
Heavy modules are imported where they are needed, so that help and argument errors are quick.
"""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from l4ctx import options
from l4ctx.bench.command import bench
from l4ctx.errors import INTERRUPTED, MEMORY, TOO_LONG, UsageError
from l4ctx.exits import EXIT_CODES, Interruption, check_stdout, errors_as_exit_codes, leave, write, write_json
from l4ctx.help import Command, Group, show
from l4ctx.inputs import (
    check_choices,
    checkpoint_folder,
    context_folder,
    encoding_named,
    holds_data,
    inputs,
    paths_or_pipe,
    size,
    standard_input,
    warn_of_forgotten_pipe,
)
from l4ctx.machine.processor import share_cores
from l4ctx.usage import USAGE_ERROR, refuse_arguments

if TYPE_CHECKING:
    from l4ctx.run.estimate import PlanRequest
    from l4ctx.run.request import Request

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> NoReturn:
    """Entry point of the `l4ctx` command."""
    share_cores()
    if sys.stderr is None:  # closed by the caller
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
    try:
        code = app(prog_name="l4ctx", standalone_mode=False)
    except KeyboardInterrupt:
        leave(INTERRUPTED)
    except USAGE_ERROR as error:
        refuse_arguments(error)
    sys.exit(code or 0)


@app.callback(cls=Group, epilog=EXIT_CODES)
def l4ctx(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=lambda wanted: _show_version(wanted), is_eager=True
        ),
    ] = False,
) -> None:
    """Ask questions over documents of millions of tokens with Llama 4."""


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        show(f"l4ctx {version('l4ctx')}", "the version")
        raise typer.Exit()


@app.command(cls=Command, epilog=EXIT_CODES)
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
        _run(request(), interruption, json=json, quiet=quiet, memory_report=memory_report)


@app.command(cls=Command, epilog=EXIT_CODES)
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
        _run(request(), interruption, json=json, quiet=quiet, memory_report=memory_report)


@app.command(cls=Command, epilog=EXIT_CODES)
def inspect(
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL|CONTEXT", help="Checkpoint folder, or folder of a saved context.", show_default=False
        ),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte, not headers and lengths alone.")] = False,
    json: options.Json = False,
) -> None:
    """Show what a checkpoint or a saved context holds, and what is damaged in it. Changes nothing.

    l4ctx inspect CONTEXT --verify

    Ends with exit code 3 for a damaged checkpoint, and with 7 for a damaged context.
    """
    with errors_as_exit_codes(json=json) as interruption:
        interruption.kept = lambda: "nothing was changed"
        _inspect(path, verify=verify, json=json)


def _inspect(path: str | None, *, verify: bool, json: bool) -> NoReturn:
    if path is None:
        raise UsageError("nothing to inspect: l4ctx inspect MODEL|CONTEXT")
    check_stdout("to")
    from l4ctx.activity import Activity
    from l4ctx.inspection.folder import exit_code, inspect_folder
    from l4ctx.listing import listing
    from l4ctx.terminal import columns, stderr_console

    activity = Activity(stderr_console(), is_shown=verify)
    activity.tell("reading every byte")
    with activity:
        report = inspect_folder(path, verify=verify)
    if json:
        write_json(report)
    else:
        write(listing(report, columns(sys.stdout) if sys.stdout.isatty() else None))
    leave(exit_code(report))


@app.command(cls=Command, epilog=EXIT_CODES)
def plan(
    paths: options.Paths = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            parser=options.token_count(1),
            metavar="N",
            help="Plan for so many tokens, without any document: 128k is 128,000, 10M is 10,000,000, 128Ki is 131,072.",
            show_default=False,
        ),
    ] = None,
    model: options.Model = None,
    no_images: options.NoImages = False,
    skip_unreadable: options.SkipUnreadable = False,
    pdf: options.Pdf = "text",
    encoding: options.Encoding = None,
    keep_payload: options.KeepPayload = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            parser=options.token_count(0), metavar="N", help="Length of an answer, in tokens.", show_default=False
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            metavar="TOKENS/S",
            help="Reading speed at the beginning of a text, to predict the time by.",
            show_default=False,
        ),
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure how fast this machine is instead.")] = False,
    dtype: options.Dtype = "auto",
    kv_dtype: options.KVDtype = "auto",
    kv_device_memory: options.KVDeviceMemory = None,
    kv_host_memory: options.KVHostMemory = None,
    kv_dir: options.KVDir = None,
    device: options.Device = "auto",
    prefill_chunk_size: options.PrefillChunkSize = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show what reading documents would take: tokens, memory and disk by owner, time. Loads no weights.

    l4ctx plan docs/ report.md --model DIR

    l4ctx plan --tokens 10000000 --kv-dir /fast/disk --model DIR

    Ends with exit code 5 when it would not fit.
    """

    def request() -> PlanRequest:
        from l4ctx.run.estimate import PlanRequest

        check_stdout("to")
        check_choices(dtype, kv_dtype, None, pdf)
        documents = paths_or_pipe(paths or [], quiet=quiet, reads_pipe=tokens is None)
        if (tokens is None) == (not documents):
            raise UsageError("l4ctx plan PATH..., or l4ctx plan --tokens N: give one of them")
        if rate is not None and measure:
            raise UsageError("--rate gives the speed, --measure finds it out: give one of them")
        return PlanRequest(
            model=checkpoint_folder(model),
            paths=documents,
            stdin=standard_input(),
            tokens=tokens,
            no_images=no_images,
            skip_unreadable=skip_unreadable,
            pdf=pdf,
            encoding=encoding_named(encoding),
            keep_payload=keep_payload,
            dtype=dtype,
            kv_dtype=kv_dtype,
            device=device,
            kv_device_memory=size("--kv-device-memory", kv_device_memory),
            kv_host_memory=size("--kv-host-memory", kv_host_memory),
            kv_dir=kv_dir,
            prefill_chunk_size=prefill_chunk_size,
            max_new_tokens=max_new_tokens,
            rate=rate,
            measure=measure,
        )

    with errors_as_exit_codes(json=json):
        leave(_plan(request(), json=json, quiet=quiet))


app.command(cls=Command, epilog=EXIT_CODES)(bench)


def _plan(request: PlanRequest, *, json: bool, quiet: bool) -> int:
    """Shows the plan; returns the exit code."""
    from l4ctx.plan_table import plan_table
    from l4ctx.run.estimate import make_plan
    from l4ctx.terminal import notes, rendered, stderr_console

    report = make_plan(request, notes(stderr_console(), quiet=quiet))
    if json:
        write_json(report.as_dict())
    else:
        write(rendered(plan_table(report)))
    return 0 if report.fits else TOO_LONG if report.exceeds_positions else MEMORY


def _run(request: Request, interruption: Interruption, *, json: bool, quiet: bool, memory_report: bool) -> None:
    """Carries the request out; prints the answer as it comes, then what there is to report."""
    from l4ctx.activity import Activity
    from l4ctx.answer import show_answer
    from l4ctx.memory_table import memory_table
    from l4ctx.reading_progress import read_shown, reading_summary
    from l4ctx.run.report import run_report
    from l4ctx.run.session import Run
    from l4ctx.terminal import notes, stderr_console

    console = stderr_console()
    note = notes(console, quiet=quiet)
    activity = Activity(console, is_shown=not quiet)
    run = Run(request, note, activity.tell)
    interruption.kept = run.kept
    with run.sampling_memory(), closing(run):
        with nullcontext() if "-" in request.paths else activity:  # "-" may be typed in
            run.read_documents()
        with activity:
            run.make_prompt()
            run.plan_memory()
            run.load_model()
            warn_of_forgotten_pipe(request, note)
            read_shown(run, activity)
            if (summary := reading_summary(run)) is not None:
                note(summary)
        if request.question is not None:
            show_answer(run, note, interruption, json=json)
        elif not json:
            note(
                f"{run.prompt_tokens:,} tokens are kept in {request.save_context}; ask with: l4ctx ask QUESTION "
                f"--context {shlex.quote(str(request.save_context))}"
            )
        if json:
            write_json(run_report(run))
    if memory_report:
        console.print(memory_table(run.memory_report()))
