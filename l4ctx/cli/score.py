"""The `score` command as a person types it, and its output."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from l4ctx.cli import options
from l4ctx.cli.compute_options import ComputeFlags
from l4ctx.cli.exits import Interruption, check_stdout, errors_as_exit_codes, write, write_json
from l4ctx.cli.sources import SelectionFlags, spread
from l4ctx.cli.stdin import checkpoint_folder, paths_or_pipe
from l4ctx.errors import UsageError

if TYPE_CHECKING:
    from l4ctx.run.request import Request

NO_IMAGES = "a score is of text"


@spread
def score(
    paths: options.Paths = None,
    model: options.Model = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            parser=options.token_count(2),
            metavar="N",
            help="Score the first N tokens alone (default: all).",
            show_default=False,
        ),
    ] = None,
    output: options.Pictures = None,
    *,
    read: SelectionFlags,
    skip_unreadable: options.SkipUnreadable = False,
    encoding: options.Encoding = None,
    keep_payload: options.KeepPayload = False,
    html: options.Html = "source",
    computed: ComputeFlags,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure how well the model predicts documents: perplexity, in all and by how much text comes before.

    l4ctx score docs/ --model DIR

    l4ctx score book.txt --tokens 100k --output curve.svg --model DIR

    The documents are read once, as text alone, with the cache that `ask` uses.
    """

    def request() -> Request:
        from l4ctx.evaluation.picture import check_picture
        from l4ctx.run.request import Request, SourceOptions

        check_stdout("to")
        for file in output or []:
            check_picture(file)
        documents, stdin = paths_or_pipe(read.named(paths or []), quiet=quiet)
        if not documents:
            raise UsageError("no documents: l4ctx score PATH..., or pipe a text in")
        return Request(
            checkpoint_folder(model),
            SourceOptions(
                paths=documents,
                stdin=stdin,
                encoding=encoding,
                no_images=NO_IMAGES,
                keep_payload=keep_payload,
                html=html,
                skip_unreadable=skip_unreadable,
                selection=read.selection(),
            ),
            compute=computed.compute_options(),
            kv=computed.kv_options(),
        )

    with errors_as_exit_codes(json=json, checkpoint=model) as interruption:
        _score(request(), tokens, output or [], interruption, json=json, quiet=quiet)


def _score(
    request: Request, limit: int | None, pictures: list[Path], interruption: Interruption, *, json: bool, quiet: bool
) -> None:
    from contextlib import nullcontext

    from l4ctx.cli.activity import Activity
    from l4ctx.cli.console import PIPED_COLUMNS, columns, notes, stderr_console
    from l4ctx.cli.progress import Reading
    from l4ctx.cli.tables.score import score_lines
    from l4ctx.evaluation.curve import perplexity_curve
    from l4ctx.evaluation.picture import save
    from l4ctx.evaluation.score import Score, prepare, read, report
    from l4ctx.run.inputs import read_request
    from l4ctx.run.monitor import Monitor
    from l4ctx.run.session import load
    from l4ctx.run.sizing import size

    console = stderr_console()
    note = notes(console, quiet=quiet)
    activity = Activity(console, is_shown=not quiet)
    score = Score()
    interruption.when = lambda: f" after {score.total.tokens:,} tokens"
    with Monitor(note, activity.tell) as monitor:
        with nullcontext() if "-" in request.sources.paths else activity:  # "-" may be typed in
            choices, sources = read_request(request, monitor)
        with activity:
            scoring = prepare(choices, sources, limit, monitor)
            sized = size(scoring.inputs, monitor)
            session = load(sized, monitor)
            reading = Reading(sized.operations, 0, scoring.inputs.prompt_tokens, scoring.inputs.prompt.spans)
            activity.show(reading)
            for step in read(session, score):
                reading.observe(step)
                activity.beat()
        found = report(session, scoring, score)
    name = request.model.resolve().name
    for file in pictures:
        title = f"{name}: {found['predicted_tokens']:,} tokens, perplexity {found['perplexity']:.2f}"
        save(perplexity_curve(score.by_position, title), file)
    if json:
        write_json(found)
    else:
        import sys

        width = columns(sys.stdout) if sys.stdout.isatty() else PIPED_COLUMNS
        write(score_lines(found, score.by_position.filled(), width))
    for file in pictures:
        note(f"the picture is in {file}")
