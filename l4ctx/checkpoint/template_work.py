"""What the confined process that renders chat templates does."""

from __future__ import annotations

import datetime
import importlib
import json
from typing import Any

from l4ctx.checkpoint.chat_environment import TemplateFailure, render
from l4ctx.confinement.work import Last, Receive, Refusal, Send, Work

_IMPORTED_LATE = ("jinja2.constants", "jinja2.debug", "unicodedata")  # by Jinja, when it first needs them


def work() -> Work:
    for name in _IMPORTED_LATE:
        importlib.import_module(name)
    render("{{ [1] | tojson(indent=1) }}{{ strftime_now('%c') }}", {})
    return Work(_serve)


def _serve(request: dict[str, Any], receive: Receive, send: Send) -> Last:
    """Renders a source with variables and a date, in JSON; the text is the reply's body."""
    asked = json.loads(receive())
    try:
        text = render(asked["source"], asked["variables"], datetime.datetime.fromisoformat(asked["date"]))
    except TemplateFailure as error:
        raise Refusal(str(error)) from None
    return {}, text.encode("utf-8", "surrogatepass")
