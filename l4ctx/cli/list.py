"""The `list` command: the saved contexts and the models that this program has worked with."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l4ctx.cli import options
from l4ctx.cli.exits import check_stdout, errors_as_exit_codes, tell, write, write_json

if TYPE_CHECKING:
    from rich.console import RenderableType


def list(
    prune: Annotated[bool, typer.Option("--prune", help="Forget those that are not there any more.")] = False,
    json: options.Json = False,
) -> None:
    """List the saved contexts and the models that were used: tokens, bytes, date, state.

    Models of the settings and of the hub's cache are listed, too. l4ctx rm CONTEXT deletes a context.
    """
    with errors_as_exit_codes(json=json):
        check_stdout("to")
        from l4ctx.cli.console import rendered
        from l4ctx.cli.settings import read_settings
        from l4ctx.history.seen import CONTEXTS, MODELS, Seen
        from l4ctx.inspection.known_models import model_rows
        from l4ctx.inspection.saved_contexts import context_row

        seen = Seen()
        contexts = [context_row(Path(path)) for path in seen.entries(CONTEXTS)]
        models = model_rows(read_settings().models, seen.entries(MODELS))
        if prune:
            gone = [(CONTEXTS, row) for row in contexts if row["state"] in ("missing", "not a context")]
            gone += [(MODELS, row) for row in models if row["state"] != "here" and row["last_used"] is not None]
            for kind, row in gone:
                seen.forget(kind, Path(row["path"]))
            contexts = [row for row in contexts if (CONTEXTS, row) not in gone]
            models = [row for row in models if (MODELS, row) not in gone]
        if json:
            write_json({"contexts": contexts, "models": models})
        elif contexts or models:
            write(rendered(_tables(contexts, models)))
        else:
            tell("nothing yet: l4ctx prefill PATH... -o CONTEXT makes a context")


def _tables(contexts: Sequence[dict[str, Any]], models: Sequence[dict[str, Any]]) -> RenderableType:
    from rich.console import Group

    from l4ctx.cli.tables.layout import FigureTable
    from l4ctx.formatting import human_bytes, printable
    from l4ctx.inspection.model_names import shown_name

    parts: Any = []
    if contexts:
        table = FigureTable("contexts", ("tokens", "disk", "model", "written", "state"))
        for row in contexts:
            tokens = "" if row["tokens"] is None else f"{row['tokens']:,}"
            size = "" if row["bytes"] is None else human_bytes(row["bytes"])
            model = "" if row["model"] is None else printable(shown_name(Path(row["model"])))
            table.add_row(printable(row["path"]), tokens, size, model, _day(row["written"]), row["state"])
        parts += [table]
    if models:
        table = FigureTable("models", ("name", "weights", "last used", "state"))
        for row in models:
            size = "" if row["bytes"] is None else human_bytes(row["bytes"])
            name = printable(row["name"] or "")
            table.add_row(printable(row["path"]), name, size, _day(row["last_used"]), row["state"])
        parts += ["", table] if parts else [table]
    return Group(*parts)


def _day(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return datetime.datetime.fromtimestamp(min(seconds, 2**35)).strftime("%Y-%m-%d %H:%M")
