"""Writes a manual page for l4ctx and for each of its commands, from what --help says.

python -m samples.documentation.man_pages FOLDER
man FOLDER/l4ctx-ask.1
"""

from __future__ import annotations

import argparse
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import typer.main

from l4ctx.cli.app import app
from l4ctx.cli.settings import KINDS, variable
from l4ctx.formatting import counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    written = pages()
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8")
    print(f"{counted(len(written), 'page')} in {folder}")


def pages() -> dict[str, str]:
    """The text of each page by the name of its file."""
    group: Any = typer.main.get_command(app)
    context = group.context_class(group, info_name="l4ctx")
    commands = {name: group.get_command(context, name) for name in group.list_commands(context)}
    commands = {name: command for name, command in commands.items() if not command.hidden}
    found = {"l4ctx.1": _overview(group, context, commands)}
    for name, command in commands.items():
        inner = command.context_class(command, info_name=name, parent=context)
        found[f"l4ctx-{name}.1"] = _page(f"l4ctx-{name}", command, inner, commands)
    return found


def _overview(group: Any, context: Any, commands: dict[str, Any]) -> str:
    rows = [(f"l4ctx {name}", command.get_short_help_str()) for name, command in commands.items()]
    parts = [_head("l4ctx", group), _synopsis("l4ctx [OPTIONS] COMMAND [ARGS]...")]
    parts += [".SH COMMANDS\n", *(_item(name, meaning) for name, meaning in rows)]
    return "".join([*parts, *_options(group, context), *_tail(group, [f"l4ctx-{name}" for name in commands])])


def _page(title: str, command: Any, context: Any, commands: dict[str, Any]) -> str:
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    paragraphs = [_escaped(" ".join(part.split())) for part in (command.help or "").split("\n\n")]
    parts = [_head(title, command), _synopsis(usage), ".SH DESCRIPTION\n", "\n.PP\n".join(paragraphs), "\n"]
    others = ["l4ctx", *(f"l4ctx-{name}" for name in commands if f"l4ctx-{name}" != title)]
    return "".join([*parts, *_options(command, context), *_environment(command), *_tail(command, others)])


def _head(title: str, command: Any) -> str:
    what = _escaped(command.get_short_help_str().rstrip("."))
    return f'.TH {title.upper()} 1 "" "l4ctx {version("l4ctx")}"\n.SH NAME\n{_escaped(title)} \\- {what}\n'


def _synopsis(usage: str) -> str:
    return f".SH SYNOPSIS\n{_escaped(usage)}\n"


def _options(command: Any, context: Any) -> list[str]:
    records = [record for parameter in command.get_params(context) if (record := parameter.get_help_record(context))]
    return [".SH OPTIONS\n", *(_item(re.sub(r" <.*>$", "", name), meaning) for name, meaning in records)]


def _environment(command: Any) -> list[str]:
    names = [name[2:] for parameter in command.params for name in parameter.opts if name[2:] in KINDS]
    if not names:
        return []
    told = "Defaults of these options, before those that the file of settings has (l4ctx config path):"
    return [".SH ENVIRONMENT\n", f"{_escaped(told)}\n.PP\n", f"{_escaped(', '.join(map(variable, names)))}\n"]


def _tail(command: Any, others: list[str]) -> list[str]:
    codes = re.sub(r"^Exit codes: ", "", " ".join((command.epilog or "").split()))
    also = ",\n".join(f".BR {_escaped(name)} (1)" for name in others).replace(",\n", " ,\n")
    return [".SH EXIT STATUS\n", f"{_escaped(codes)}\n", ".SH SEE ALSO\n", f"{also}\n"]


def _item(name: str, meaning: str) -> str:
    return f".TP\n\\fB{_escaped(name)}\\fR\n{_escaped(' '.join(meaning.split()))}\n"


def _escaped(text: str) -> str:
    """For roff: backslashes, hyphens that are meant as such, and lines that would begin a request."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", escaped)


if __name__ == "__main__":
    main()
