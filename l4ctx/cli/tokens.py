"""The `tokens` command as a person types it, and its output."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from l4ctx.cli import options
from l4ctx.cli.exits import check_stdout, errors_as_exit_codes, write, write_json
from l4ctx.cli.sources import SourceFlags, spread
from l4ctx.cli.stdin import checkpoint_folder, paths_or_pipe
from l4ctx.errors import UsageError
from l4ctx.formatting import counted

if TYPE_CHECKING:
    from pathlib import Path

    from l4ctx.run.request import SourceOptions


@spread
def tokens(
    paths: options.Paths = None,
    model: options.Model = None,
    tree: Annotated[
        bool, typer.Option("--tree", help="Show folders as a tree, with what is in each together.")
    ] = False,
    *,
    read: SourceFlags,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Count the tokens of each document, the largest first. Loads no weights, and needs none.

    l4ctx tokens docs/ report.md --model DIR

    l4ctx tokens . --tree --model DIR

    Counts are those of a prompt, with what is put around each document.
    """
    with errors_as_exit_codes(json=json, checkpoint=model):
        check_stdout("to")
        documents, stdin = paths_or_pipe(read.named(paths or []), quiet=quiet)
        if not documents:
            raise UsageError("no documents: l4ctx tokens PATH..., or pipe a text in")
        _tokens(checkpoint_folder(model), read.options(documents, stdin), is_tree=tree, json=json, quiet=quiet)


def _tokens(model: Path, sources: SourceOptions, *, is_tree: bool, json: bool, quiet: bool) -> None:
    from l4ctx.cli.activity import Activity
    from l4ctx.cli.console import notes, stderr_console
    from l4ctx.cli.tables.tokens import token_lines, token_tree
    from l4ctx.run.token_counts import count_tokens

    console = stderr_console()
    note = notes(console, quiet=quiet)
    activity = Activity(console, is_shown=not quiet)
    with nullcontext() if "-" in sources.paths else activity:  # "-" may be typed in
        counts = count_tokens(model, sources, note, activity.tell)
    over = counts.prompt_tokens - counts.max_position_embeddings
    if over > 0:
        note(
            f"{counted(over, 'token')} more than the model's {counts.max_position_embeddings:,} positions "
            "(max_position_embeddings)"
        )
    if json:
        write_json(counts.as_dict())
        return
    for line in token_tree(counts) if is_tree else token_lines(counts):
        write(f"{line}\n", "the counts")
