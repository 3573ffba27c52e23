"""The `rm` command: deletes saved contexts."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from l4ctx.cli import options
from l4ctx.cli.exits import errors_as_exit_codes, leave, tell, write_json
from l4ctx.errors import INPUT


def rm(
    contexts: Annotated[
        list[Path],
        typer.Argument(
            parser=options.context_folder,
            metavar="CONTEXT",
            help="Saved contexts to delete. Other files in their folders stay.",
            show_default=False,
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Delete saved contexts, after asking.

    l4ctx rm CONTEXT

    Deletes what belongs to a saved context and nothing else; one that is being written or read is refused.
    """
    with errors_as_exit_codes(json=json) as interruption:
        from l4ctx.contexts.removing import check_removable, remove_context
        from l4ctx.formatting import counted, human_bytes, printable
        from l4ctx.history.seen import CONTEXTS, Seen

        interruption.kept = lambda: "what was not deleted stays"
        for folder in contexts:
            check_removable(folder)
        if not yes and not _is_wanted(contexts):
            tell("nothing was deleted")
            leave(INPUT)
        removed = []
        for folder in contexts:
            gone = remove_context(folder)
            removed.append({"path": str(folder), "files": gone.files, "bytes": gone.bytes})
            with suppress(OSError):
                Seen().forget(CONTEXTS, folder)
            if not quiet:
                rest = "" if gone.is_folder_gone else "; other files are in the folder, and stay"
                size = f"{counted(gone.files, 'file')}, {human_bytes(gone.bytes)}"
                tell(f"{printable(str(folder))} is deleted: {size}{rest}")
        if json:
            write_json({"removed": removed})


def _is_wanted(contexts: list[Path]) -> bool:
    from l4ctx.cli.confirming import confirmed
    from l4ctx.formatting import human_bytes, printable
    from l4ctx.inspection.saved_contexts import context_row

    rows = [context_row(folder) for folder in contexts]
    told = [
        f"{printable(row['path'])} ({row['tokens'] or 0:,} tokens, {human_bytes(row['bytes'] or 0)})" for row in rows
    ]
    return confirmed(f"delete {', '.join(told)}?")
