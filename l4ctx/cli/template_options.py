"""Options for what stands around documents and question in the prompt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from l4ctx.errors import UsageError

if TYPE_CHECKING:
    from l4ctx.run.request import TemplateOptions

_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class TemplateFlags:
    """A command takes them as one parameter, and is decorated with `l4ctx.cli.sources.spread`."""

    raw: Annotated[
        bool,
        typer.Option("--raw", help="Give documents and question to the model as they are, with nothing around them."),
    ] = False
    tools: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Tell the model of tools, a JSON list in FILE, as its chat template does.",
            show_default=False,
        ),
    ] = None
    prompt_template: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A Jinja template of what the user says, with documents (name, text, index) and question.",
            show_default=False,
        ),
    ] = None

    def options(self, *, many: bool, has_context: bool, has_system: bool, cites: bool) -> TemplateOptions:
        """Raises UsageError for options that do not go together, and for files that cannot be used."""
        from l4ctx.run.request import TemplateOptions

        given = [
            option
            for option, is_given in (
                ("--raw", self.raw),
                ("--tools", self.tools is not None),
                ("--prompt-template", self.prompt_template is not None),
            )
            if is_given
        ]
        if self.raw and len(given) > 1:
            raise UsageError(f"--raw puts nothing around documents and question, {given[1]} does: give one of them")
        if self.raw and has_system:
            raise UsageError("--raw: a system prompt needs a template; write it into the question, or leave out --raw")
        for option in given:
            if has_context:
                raise UsageError(
                    f"{option}: a saved context is what a chat template made of its documents; read them anew"
                )
            if cites and option != "--tools":
                raise UsageError(f"--cite looks documents up by what {option} replaces: give one of them")
            if many and option == "--prompt-template":
                raise UsageError(
                    "--prompt-template is for one question: --questions has many behind the same documents"
                )
        return TemplateOptions(self.raw, self._tools(), self._wrapping())

    def _tools(self) -> str | None:
        if self.tools is None:
            return None
        try:
            found = json.loads(_text(self.tools, "--tools"))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"--tools {self.tools}: not JSON: {error}") from None
        if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
            raise UsageError(f"--tools {self.tools}: not a list of objects")
        return json.dumps(found)

    def _wrapping(self) -> str | None:
        return None if self.prompt_template is None else _text(self.prompt_template, "--prompt-template")


def _text(file: Path, option: str) -> str:
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise UsageError(f"{option} {file}: larger than 1 MiB")
        return file.read_bytes().decode()
    except OSError as error:
        raise UsageError(f"{option} {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{option} {file}: not UTF-8") from None
