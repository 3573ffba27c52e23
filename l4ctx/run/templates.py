"""What stands around documents and question: the checkpoint's chat template, or what a user gives instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from l4ctx.errors import RequestError
from l4ctx.run.context import ContextChoices
from l4ctx.run.request import Request

if TYPE_CHECKING:
    from l4ctx.checkpoint.chat_template import ChatTemplate
    from l4ctx.prompt.wrapping import Wrapping


def chat_template(request: Request, choices: ContextChoices) -> ChatTemplate | None:
    """None: there is none, or none is wanted. Raises PromptError, and RequestError for tools that it cannot show."""
    from l4ctx.checkpoint.chat_template import ChatTemplate

    if request.template.raw:
        return None
    template = ChatTemplate.from_folder(request.model, date=choices.date)
    if template is not None:
        template.prepare()
    if request.template.tools is None:
        return template
    told = None if template is None else replace(template, tools=request.template.tools)
    if template is None or told is None or template.split(system=False) == told.split(system=False):
        raise RequestError("--tools: the checkpoint's chat template says nothing of tools")
    return told


def wrapping_of(request: Request, names: Sequence[str]) -> Wrapping | None:
    """What stands around the documents of these names. Raises PromptTemplateError."""
    from l4ctx.prompt.wrapping import Wrapping, wrapping

    if request.template.raw:
        return Wrapping.none(len(names))
    return None if request.template.wrapping is None else wrapping(request.template.wrapping, names)
