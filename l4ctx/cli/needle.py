"""The `needle` command as a person types it, and its output."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from l4ctx.cli import options
from l4ctx.cli.compute_options import ComputeFlags
from l4ctx.cli.exits import check_stdout, errors_as_exit_codes
from l4ctx.cli.sources import SelectionFlags, spread
from l4ctx.cli.stdin import checkpoint_folder, paths_or_pipe
from l4ctx.errors import UsageError

if TYPE_CHECKING:
    from l4ctx.evaluation.needle import NeedleOptions
    from l4ctx.run.request import Request

NO_IMAGES = "facts are planted in text"
TASK_NAMES = ("single", "keys", "values", "distractors", "tracing", "counting")
DEFAULT_LENGTHS = (4096, 8192, 16384, 32768)


@spread
def needle(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATH",
            help="Files and folders whose text the facts are planted in (default: sentences that are made up).",
            show_default=False,
        ),
    ] = None,
    model: options.Model = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Tokens of the texts, question and answer included, such as 8k,64Ki,1Mi (default: 4096 to 32768, as "
            "far as the model has positions).",
            show_default=False,
        ),
    ] = None,
    depths: Annotated[
        int,
        typer.Option(min=1, max=100, metavar="N", help="Parts of each text, with a fact of each task in each part."),
    ] = 10,
    trials: Annotated[int, typer.Option(min=1, max=1000, metavar="N", help="Different texts of each length.")] = 3,
    tasks: Annotated[
        str,
        typer.Option(metavar="NAME,...", help=f"What is planted and asked for: {', '.join(TASK_NAMES)}, or all."),
    ] = "single",
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Append each answer to FILE, and ask only what it does not hold from an earlier run with the same "
            "settings; other lengths and more trials are added.",
            show_default=False,
        ),
    ] = None,
    output: options.Pictures = None,
    max_new_tokens: Annotated[
        int, typer.Option(parser=options.token_count(1), metavar="N", help="Maximum length of an answer in tokens.")
    ] = 64,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Another one makes other texts and facts.")] = 0,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Questions at a time (default: as many as fit into memory, at most 32).",
            show_default=False,
        ),
    ] = None,
    *,
    read: SelectionFlags,
    skip_unreadable: options.SkipUnreadable = False,
    encoding: options.Encoding = None,
    keep_payload: options.KeepPayload = False,
    computed: ComputeFlags,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure what the model finds: facts planted in long text, by length and depth.

    l4ctx needle --lengths 4k,16k,64k --output map.svg --model DIR

    l4ctx needle docs/ --tasks all --trials 5 --resume answers.jsonl --model DIR

    Each text is read once, with facts in all of its parts, and each fact is asked for separately.
    """

    def request() -> tuple[Request, NeedleOptions]:
        from l4ctx.evaluation.picture import check_picture
        from l4ctx.run.request import AnswerOptions, Request, SourceOptions

        check_stdout("to")
        for file in output or []:
            check_picture(file)
        documents, stdin = paths_or_pipe(read.named(paths or []), quiet=quiet, reads_pipe=False)
        folder = checkpoint_folder(model)
        return Request(
            folder,
            SourceOptions(
                paths=documents,
                stdin=stdin,
                encoding=encoding,
                no_images=NO_IMAGES,
                keep_payload=keep_payload,
                skip_unreadable=skip_unreadable,
                selection=read.selection(),
            ),
            answer=AnswerOptions(max_new_tokens=max_new_tokens, draft_tokens=0),
            compute=computed.compute_options(),
            kv=computed.kv_options(),
        ), _options(folder)

    def _options(folder: Path) -> NeedleOptions:
        from l4ctx.evaluation.needle import NeedleOptions

        return NeedleOptions(
            _lengths(lengths, folder),
            _tasks(tasks),
            depths,
            trials,
            max_new_tokens,
            seed,
            batch,
        )

    with errors_as_exit_codes(json=json, checkpoint=model) as interruption:
        from l4ctx.cli.finding import find

        find(*request(), resume, output or [], interruption, json=json, quiet=quiet)


def _lengths(given: str | None, model: Path) -> tuple[int, ...]:
    """In growing order. Raises UsageError."""
    from l4ctx.formatting import parse_tokens
    from model.config import TextConfig

    if given is None:
        most = TextConfig.from_folder(model).max_position_embeddings
        return tuple(length for length in DEFAULT_LENGTHS if length <= most) or (most,)
    try:
        found = {parse_tokens(part) for part in given.split(",")}
    except ValueError as error:
        raise UsageError(f"--lengths: {error}") from None
    if not 1 <= min(found) <= max(found) <= options.MOST_TOKENS or len(found) > 100:
        raise UsageError(f"--lengths {given}: give 1 to 100 lengths from 1 to {options.MOST_TOKENS:,} tokens")
    return tuple(sorted(found))


def _tasks(given: str) -> tuple[str, ...]:
    """In the order of TASK_NAMES. Raises UsageError."""
    wanted = set(TASK_NAMES) if given == "all" else {part.strip() for part in given.split(",")}
    if unknown := wanted - set(TASK_NAMES):
        raise UsageError(f"--tasks: there is no {sorted(unknown)[0]!r}; there are {', '.join(TASK_NAMES)}, or all")
    return tuple(name for name in TASK_NAMES if name in wanted)
