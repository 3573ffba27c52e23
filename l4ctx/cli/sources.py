"""What a command reads, as a person says it: options that are the same for every command that reads documents."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, get_type_hints

import typer

from l4ctx.cli import options
from l4ctx.cli.named_paths import NamedPaths
from l4ctx.errors import UsageError

if TYPE_CHECKING:
    from l4ctx.documents.selection import Selection
    from l4ctx.run.request import SourceOptions

_OF_PATHS = ("files_from", "null", "skip_unreadable")  # say nothing about a text that a context holds already


def _pattern(text: str) -> str:
    if not text.strip() or "\n" in text:
        raise typer.BadParameter("a pattern is empty, or of several lines (is a shell variable unset?)")
    return text


def _revision(text: str) -> str:
    if not text.strip() or text.startswith("-") or "\n" in text or "\0" in text:
        raise typer.BadParameter(f"{text!r} names no commit")
    return text


@dataclass(frozen=True)
class SelectionFlags:
    """Which files are read, and how much of them.

    A command takes them as one parameter, and is decorated with `spread`.
    """

    files_from: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also read the files and folders that FILE names, one a line (- for standard input).",
            show_default=False,
        ),
    ] = None
    null: Annotated[
        bool, typer.Option("--null", "-0", help="With --files-from: names end with a NUL character, not with the line.")
    ] = False
    include: Annotated[
        list[str] | None,
        typer.Option(
            parser=_pattern,
            metavar="GLOB",
            help="Read only files that match, such as '*.py' or 'docs/**/*.md', as in .gitignore. Can be repeated.",
            show_default=False,
        ),
    ] = None
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            parser=_pattern,
            metavar="GLOB",
            help="Leave out files and folders that match. Can be repeated.",
            show_default=False,
        ),
    ] = None
    git_ref: Annotated[
        str | None,
        typer.Option(
            parser=_revision,
            metavar="REV",
            help="Read PATH (default: the current folder) as it is in a commit, such as HEAD~3 or v1.0.",
            show_default=False,
        ),
    ] = None
    diff: Annotated[
        str | None,
        typer.Option(
            parser=_revision,
            metavar="A..B",
            help="Read what differs in PATH (default: the current folder) between two commits; A...B: since B left A.",
            show_default=False,
        ),
    ] = None
    max_file_size: Annotated[
        int | None,
        typer.Option(
            parser=options.size,
            metavar="SIZE",
            help="Leave out larger files in folders, such as 1MiB; one that is named itself ends the run.",
        ),
    ] = None
    line_numbers: Annotated[
        bool, typer.Option("--line-numbers", help="Put the number of each line before it, as grep -n does.")
    ] = False
    keep_duplicates: Annotated[
        bool, typer.Option("--keep-duplicates", help="Read files of a folder again whose content was read already.")
    ] = False

    def named(self, paths: list[str]) -> NamedPaths:
        """Raises UsageError for options that do not go together."""
        if self.git_ref is not None and self.diff is not None:
            raise UsageError("--git-ref reads one commit, --diff what differs between two: give one of them")
        if self.diff is not None and self.line_numbers:
            raise UsageError("--line-numbers: a difference has the lines of two files, and says which these are")
        return NamedPaths(paths, self.files_from, null=self.null, are_in_git=bool(self.git_ref or self.diff))

    def selection(self) -> Selection:
        from l4ctx.documents.selection import Selection

        return Selection(
            include=tuple(self.include or ()),
            exclude=tuple(self.exclude or ()),
            max_file_size=self.max_file_size,
            line_numbers=self.line_numbers,
            keep_duplicates=self.keep_duplicates,
            git_ref=self.git_ref,
            diff=self.diff,
        )


@dataclass(frozen=True)
class SourceFlags(SelectionFlags):
    """The same, and how files are read."""

    no_images: options.NoImages = False
    skip_unreadable: options.SkipUnreadable = False
    pdf: options.Pdf = "text"
    encoding: options.Encoding = None
    keep_payload: options.KeepPayload = False
    html: options.Html = "source"

    def options(self, paths: list[str], stdin: BinaryIO | None) -> SourceOptions:
        from l4ctx.run.request import SourceOptions

        return SourceOptions(
            paths=paths,
            stdin=stdin,
            pdf=self.pdf,
            encoding=self.encoding,
            no_images=self.no_images,
            keep_payload=self.keep_payload,
            html=self.html,
            skip_unreadable=self.skip_unreadable,
            selection=self.selection(),
        )

    def given(self) -> list[str]:
        """The options that were given and change what is read of paths, as they are typed."""
        return [
            f"--{field.name.replace('_', '-')}"
            for field in fields(self)
            if field.name not in _OF_PATHS and getattr(self, field.name) not in (field.default, [])
        ]


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the fields of each parameter that is a dataclass, as parameters of its own.

    Such a parameter is a keyword's, and has no default.
    """
    types = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in types.items() if is_dataclass(kind)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        group = groups.get(parameter.name)
        if group is None:
            parameters.append(parameter.replace(annotation=types[parameter.name]))
            continue
        of_fields = get_type_hints(group, include_extras=True)
        for field in fields(group):
            annotation = of_fields[field.name]
            parameters.append(
                inspect.Parameter(field.name, parameter.kind, default=field.default, annotation=annotation)
            )

    def spread_command(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    spread_command.__name__, spread_command.__doc__ = command.__name__, command.__doc__
    spread_command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spread_command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return spread_command
