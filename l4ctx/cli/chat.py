"""The `chat` command as a person types it, and what is refused at once."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from l4ctx.cli import answer_options, options
from l4ctx.cli.answer_options import SamplingFlags
from l4ctx.cli.compute_options import ComputeFlags
from l4ctx.cli.exits import check_stdout, errors_as_exit_codes
from l4ctx.cli.sources import SourceFlags, spread
from l4ctx.cli.stdin import STDIN, checkpoint_folder, paths_or_pipe
from l4ctx.errors import UsageError

if TYPE_CHECKING:
    from l4ctx.run.transcript import Told, Transcript

Transcribed = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Append the conversation to FILE, as JSON lines.", show_default=False),
]
Continued = Annotated[
    Path | None,
    typer.Option(
        "--continue",
        metavar="FILE",
        help="Go on with the last conversation of such a file, and append to it. Its documents are read again.",
        show_default=False,
    ),
]


@spread
def chat(
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH", help="Files and folders to read, in this order.", show_default=False),
    ] = None,
    model: options.Model = None,
    context: answer_options.Context = None,
    transcript: Transcribed = None,
    continued: Continued = None,
    *,
    read: SourceFlags,
    system: options.System = None,
    sampled: SamplingFlags,
    loop_guard: answer_options.LoopGuard = True,
    cite: answer_options.Cite = False,
    computed: ComputeFlags,
    plain: options.Plain = False,
    log: options.Log = True,
    quiet: options.Quiet = False,
) -> None:
    """Talk about documents: they are read once, and each turn reads only what is new.

    l4ctx chat docs/ report.md --model DIR

    l4ctx chat --context CONTEXT --model DIR

    printf 'Who wrote it?\\nWhen?\\n' | l4ctx chat letter.txt --model DIR

    A line that begins with a slash is a command: /help lists them. What is piped in is one turn a line.
    """
    with errors_as_exit_codes(checkpoint=model, context=context) as interruption, ExitStack() as opened:
        from l4ctx.cli.conversation import Talk, converse
        from l4ctx.run.request import ContextOptions, Request

        check_stdout("the answers to")
        file, told = _transcript(transcript, continued)
        if file is not None:
            opened.callback(file.close)
        if told is not None:
            paths, context = (paths or told.paths), (context or told.context)
            system = system if system is not None else told.system
        if "-" in (paths or []) or read.files_from == STDIN:
            raise UsageError("-: standard input is what you say in a conversation; give the document as a file")
        documents, _ = paths_or_pipe(read.named(paths or []), quiet=quiet, reads_pipe=False)
        request = Request(
            checkpoint_folder(model, context),
            read.options(documents, None),
            system=None if context is not None else system,
            context=ContextOptions(context),
            answer=sampled.options(loop_guard=loop_guard, cites=cite),
            compute=computed.compute_options(),
            kv=computed.kv_options(),
            converses=True,
        )
        converse(
            request, Talk(system=system, told=told, transcript=file, plain=plain, quiet=quiet, log=log), interruption
        )


def _transcript(written: Path | None, continued: Path | None) -> tuple[Transcript | None, Told | None]:
    """The file to append to, and what it holds of a conversation that goes on. Raises TranscriptError."""
    from l4ctx.run.transcript import Transcript

    if written is not None and continued is not None:
        raise UsageError("--continue FILE also appends to FILE: leave --transcript out")
    if continued is not None:
        if not continued.exists():
            raise UsageError(f"--continue {continued}: no such file")
        file = Transcript(continued)
        try:
            return file, file.told()
        except BaseException:
            file.close()
            raise
    return (None if written is None else Transcript(written)), None
