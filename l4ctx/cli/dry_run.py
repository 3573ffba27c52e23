"""`--dry-run`: the exact prompt of a request on standard output, as text or as token ids."""

from __future__ import annotations

import json as json_format
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from l4ctx.cli.exits import Interruption, write
from l4ctx.errors import CHECKPOINT, UsageError
from l4ctx.formatting import without_controls

if TYPE_CHECKING:
    from l4ctx.machine.ranks import Launch
    from l4ctx.run.dry_run import ExactPrompt
    from l4ctx.run.request import Request

_IDS_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class DryRunFlags:
    """A command takes them as one parameter, and is decorated with `l4ctx.cli.sources.spread`."""

    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the exact prompt in place of an answer. Loads no weights.")
    ] = False
    token_ids: Annotated[
        bool, typer.Option("--token-ids", help="With --dry-run: print its token ids, a JSON list on one line.")
    ] = False

    def check(self, launch: Launch | None, *, many: bool = False) -> None:
        """Raises UsageError for options that do not go together; `many`: there are many questions."""
        if self.token_ids and not self.dry_run:
            raise UsageError("--token-ids is for --dry-run")
        if self.dry_run and many:
            raise UsageError("--dry-run prints the prompt of one question: give that in place of --questions")
        if self.dry_run and launch is not None:
            raise UsageError("--dry-run computes nothing: leave torchrun out")


def show_prompt(request: Request, interruption: Interruption, flags: DryRunFlags, *, json: bool, quiet: bool) -> None:
    """Prints the prompt; with `json`, as one object that also says what is where."""
    from l4ctx.cli.activity import Activity
    from l4ctx.cli.console import notes, stderr_console
    from l4ctx.run.dry_run import ExactPrompt
    from l4ctx.run.inputs import make_inputs, read_request
    from l4ctx.run.monitor import Monitor

    console = stderr_console()
    note = notes(console, quiet=quiet)
    activity = Activity(console, is_shown=not quiet)
    interruption.owners.setdefault(request.model, CHECKPOINT)
    with Monitor(note, activity.tell) as monitor:
        with nullcontext() if "-" in request.sources.paths else activity:
            choices, sources = read_request(request, monitor)
        with activity:
            prompt = ExactPrompt.of(make_inputs(choices, sources, monitor))
    on_terminal = sys.stdout.isatty()
    if json:
        pieces = _as_json(prompt, with_ids=flags.token_ids)
    elif flags.token_ids:
        pieces = _listed(prompt, end="\n")
    else:  # as it is, but for a terminal, which a document must not steer
        pieces = (without_controls(piece) if on_terminal else piece for piece in prompt.text())
    for piece in pieces:
        write(piece, "the prompt")
    if on_terminal and not json and not flags.token_ids:
        write("\n", "the prompt")


def _as_json(prompt: ExactPrompt, *, with_ids: bool) -> Iterator[str]:
    """One line of ASCII."""
    yield json_format.dumps(prompt.as_dict())[:-1]
    if with_ids:
        yield ', "token_ids": '
        yield from _listed(prompt, end="}\n")
        return
    yield ', "prompt": "'
    for piece in prompt.text():
        yield json_format.dumps(piece)[1:-1]
    yield '"}\n'


def _listed(prompt: ExactPrompt, end: str) -> Iterator[str]:
    """The token ids as a JSON list, in pieces."""
    ids = prompt.ids
    yield "["
    for start in range(0, len(ids), _IDS_AT_ONCE):
        yield (", " if start else "") + ", ".join(map(str, ids[start : start + _IDS_AT_ONCE]))
    yield f"]{end}"
