"""The Jinja environment that chat templates are written for: what `transformers` adds to Jinja's own, in a sandbox.

Which variables a template is given, and what becomes of its text, is left to `l4ctx.prompt.builder`.
"""

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


class Generation(Extension):
    """`{% generation %}` … `{% endgeneration %}`: what the model is trained on. Nothing is marked at inference."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        """The tag's body, in a scope of its own: what is set in it is not seen behind it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class SafeNamespace(Namespace):
    """`namespace()` that refuses names with an underscore in front, by which a template could reach Python's own."""

    def __init__(*args: Any, **attributes: Any) -> None:
        self, *rest = args  # so that a template may call an attribute `self`
        attributes = dict(*rest, **attributes)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


class SafeDict:
    """`dict()` and `dict.fromkeys()`, and nothing else of the type."""

    def __call__(self, *args: Any, **entries: Any) -> dict[Any, Any]:
        return dict(*args, **entries)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def chat_environment(date: datetime.datetime | None = None) -> ImmutableSandboxedEnvironment:
    """An environment for untrusted templates; `date` is what `strftime_now` tells, None: now."""

    def strftime_now(format: str) -> str:  # its name can be given in a template
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
    """Plain JSON: Jinja's own `tojson` escapes for HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold the name {name!r}")
