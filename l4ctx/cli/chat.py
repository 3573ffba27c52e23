"""The `chat` command as a person types it, and what is refused at once."""

from __future__ import annotations

import os
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
from l4ctx.errors import InputError, UsageError
from l4ctx.formatting import printable

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
Last = Annotated[
    bool,
    typer.Option("--last", help="Go on with the conversation held last; it was kept, unless --no-log was given."),
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
    last: Last = False,
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

    l4ctx chat --last

    printf 'Who wrote it?\\nWhen?\\n' | l4ctx chat letter.txt --model DIR

    A line that begins with a slash is a command: /help lists them. What is piped in is one turn a line.
    """
    with errors_as_exit_codes(checkpoint=model, context=context) as interruption, ExitStack() as opened:
        from l4ctx.cli.chat_room import Talk
        from l4ctx.cli.conversation import converse
        from l4ctx.run.request import ContextOptions, Request

        check_stdout("the answers to")
        file, told = _transcript(transcript, continued, is_last=last, is_kept=log)
        if file is not None:
            opened.callback(file.close if transcript or told is not None else file.discard_if_empty)
        if told is not None:
            _check_folder(told)
            paths, context = (paths or told.paths), (context or told.context)
            system = system if system is not None else told.system
            model = model if model is not None or context is not None else told.model
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
        is_kept_only = transcript is None and continued is None
        talk = Talk(system, told, file, is_kept_only, plain=plain, quiet=quiet, log=log)
        converse(request, talk, interruption)


def _transcript(
    written: Path | None, continued: Path | None, *, is_last: bool, is_kept: bool
) -> tuple[Transcript | None, Told | None]:
    """The file to append to, and what it holds of a conversation that goes on. Raises InputError."""
    from l4ctx.run.transcript import Transcript

    if (written, continued, is_last or None).count(None) < 2:
        raise UsageError(
            "--transcript, --continue and --last each name a file to append to: give one and leave the others out"
        )
    if is_last:
        file = _last_one()
    elif continued is not None:
        if not continued.exists():
            raise UsageError(f"--continue {continued}: no such file")
        file = Transcript(continued)
    elif written is not None:
        return Transcript(written), None
    else:
        return _kept() if is_kept else None, None
    try:
        return file, file.told()
    except BaseException:
        file.close()
        raise


def _last_one() -> Transcript:
    """That of the last conversation that is over. Raises UsageError where there is none."""
    from l4ctx.history.chats import Chats
    from l4ctx.run.transcript import InUseError, Transcript

    for file in Chats().files():
        try:
            return Transcript(file)
        except InUseError:
            continue
    raise UsageError("--last: no conversation has been kept")


def _kept() -> Transcript | None:
    """A new one beside the log of answers; None where that cannot be written, which is told when it is."""
    from l4ctx.history.chats import Chats
    from l4ctx.run.transcript import Transcript

    try:
        return Transcript(Chats().new())
    except (OSError, InputError):
        return None


def _check_folder(told: Told) -> None:
    """Raises UsageError where the conversation was held in another folder, and its paths are relative to that."""
    here = Path(os.path.abspath("."))
    if told.folder is None or told.folder == here or all(os.path.isabs(path) for path in told.all_paths):
        return
    where = printable(str(told.folder))
    raise UsageError(f"the conversation was held in {where}, and its paths are meant from there: cd to it first")
