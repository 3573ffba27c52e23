"""The Jinja environment that chat templates expect: Jinja plus the extensions of `transformers`, sandboxed."""

from __future__ import annotations

import datetime
import json
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from l4ctx.formatting import only_printable


class TemplateFailure(Exception):
    """A template that fails; the message says why, in one line."""


class Generation(Extension):
    """`{% generation %}` … `{% endgeneration %}` marks training targets; at inference it has no effect."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        """Parses the tag's body into its own scope: variables set in it are not visible after it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class SafeNamespace(Namespace):
    """`namespace()` that rejects names with a leading underscore, through which a template could reach internals."""

    def __init__(*args: Any, **attributes: Any) -> None:
        self, *rest = args  # so that a template can name an attribute `self`
        attributes = dict(*rest, **attributes)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


class SafeDict:
    """`dict()` and `dict.fromkeys()`, without the type's other attributes."""

    def __call__(self, *args: Any, **entries: Any) -> dict[Any, Any]:
        return dict(*args, **entries)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def render(source: str, variables: dict[str, Any], date: datetime.datetime | None = None) -> str:
    """Renders an untrusted template as `transformers` does. Raises TemplateFailure.

    Its loops may never end, and its texts may fill the memory: see `l4ctx.checkpoint.template_work`.
    """
    try:
        return chat_environment(date).from_string(source).render(variables)
    except MemoryError:
        raise
    except Exception as error:  # a template can raise anything
        reason = " ".join(only_printable(str(error), " ").split())
        raise TemplateFailure(reason or type(error).__name__) from None


def chat_environment(date: datetime.datetime | None = None) -> ImmutableSandboxedEnvironment:
    """An environment for untrusted templates; `strftime_now` formats `date`, or the current time if None."""

    def strftime_now(format: str) -> str:  # templates may pass `format` by name
        return (date or datetime.datetime.now()).strftime(format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, LoopControlExtension]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": strftime_now,
        "dict": SafeDict(),
        "namespace": SafeNamespace,
    }
    return environment


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own `tojson` escapes HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold the name {name!r}")
