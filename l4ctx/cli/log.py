"""The `log` command: earlier answers, searched and shown."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from l4ctx.cli.exits import check_stdout, errors_as_exit_codes, leave, tell, write, write_json
from l4ctx.errors import INPUT, UsageError
from l4ctx.formatting import printable

SHOWN = 20
SHOWN_SOURCES = 5


def log(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="WORD",
            help="Only those with all of these words in the question, the answer or the names of documents.",
            show_default=False,
        ),
    ] = None,
    number: Annotated[
        int | None,
        typer.Option("--number", "-n", min=1, metavar="N", help=f"Show the newest N (default: {SHOWN})."),
    ] = None,
    last: Annotated[bool, typer.Option("--last", help="Show the newest one in full.")] = False,
    path: Annotated[bool, typer.Option("--path", help="Show the name of the file.")] = False,
    clear: Annotated[
        bool, typer.Option("--clear", help="Delete all of it, and kept conversations, after asking.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="With --clear: do not ask.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line for programs.")] = False,
) -> None:
    """Show what was asked and answered before.

    l4ctx log drinking water

    Questions, answers and the names of documents are kept in a file that only you can read. --no-log of the commands
    that answer, L4CTX_LOG=0, or log = false in the settings switches that off.
    """
    with errors_as_exit_codes(json=json):
        check_stdout("to")
        from l4ctx.history.answers import AnswerLog, matches

        kept = AnswerLog()
        if clear:
            _clear(kept, yes=yes)
            return
        if path:
            write_json({"file": str(kept.file)}) if json else write(f"{printable(str(kept.file))}\n")
            return
        if last and number is not None:
            raise UsageError("--last shows one, --number N several: give one of them")
        found = [record for record in kept.records() if matches(record, words or [])]
        found = found[-(1 if last else number or SHOWN) :]
        if json:
            for record in found:
                write_json(record)
        elif not found:
            tell("no such answer is in the log" if words else f"no answers yet in {printable(str(kept.file))}")
        else:
            write("".join(map(_whole if last else _row, found)))


def _row(record: dict[str, Any]) -> str:
    """The time, the question, and the beginning of the answer below."""
    from l4ctx.cli.console import shortened
    from l4ctx.formatting import as_one_line

    question, answer = (
        shortened(as_one_line(record[name]), width) for name, width in (("question", 60), ("answer", 74))
    )
    return f"{as_one_line(record['time'])[:16].replace('T', ' ')}  {question}\n    {answer}\n"


def _whole(record: dict[str, Any]) -> str:
    from l4ctx.formatting import as_one_line, without_controls

    sources = record["sources"]
    more = len(sources) - SHOWN_SOURCES + int(record.get("more_sources") or 0)
    about = ", ".join(map(as_one_line, sources[:SHOWN_SOURCES])) + (f" and {more:,} more" if more > 0 else "")
    rows = {"time": record["time"], "model": record.get("model"), "context": record.get("context"), "about": about}
    lines = [f"{name}: {as_one_line(str(value))}" for name, value in rows.items() if value]
    question, answer = (without_controls(record[name]).strip("\n") for name in ("question", "answer"))
    return "\n".join([*lines, "", question, "", answer, ""])


def _clear(kept: Any, *, yes: bool) -> None:
    from l4ctx.cli.confirming import confirmed
    from l4ctx.formatting import counted
    from l4ctx.history.chats import Chats

    if not yes and not confirmed(f"delete all answers in {kept.file}, and the conversations kept beside it?"):
        tell("nothing was deleted")
        leave(INPUT)
    answers, conversations = kept.clear(), Chats().clear()
    tell("the log of answers is deleted" if answers else "there is no log of answers")
    if conversations:
        tell(f"{counted(conversations, 'conversation')} deleted")
