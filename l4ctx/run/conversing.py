"""Whether a model can have a conversation, and how it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from l4ctx.errors import RequestError
from l4ctx.run.request import Request

if TYPE_CHECKING:
    from l4ctx.checkpoint.chat_template import ChatTemplate
    from l4ctx.checkpoint.tokenizer import Tokenizer
    from l4ctx.prompt.turns import Turns
    from model.config import TextConfig


def turns_of(
    request: Request,
    config: TextConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    has_system_prompt: bool | None = None,
) -> Turns:
    """The beginning, with the user's first message open. Without `has_system_prompt` the request says so.

    Raises RequestError where this model can have no conversation, PromptError and TokenizerError.
    """
    from l4ctx.prompt.turns import Turns

    if template is None:
        raise RequestError(
            f"{request.model}: no chat template, so this model takes no turns (a base model?); "
            "l4ctx ask gives it documents and question as plain text"
        )
    if config.rope_parameters.rope_type == "longrope":
        raise RequestError(
            "a conversation cannot be had with rope_type longrope, whose table depends on the length of the whole run"
        )
    has_system = bool((request.system or "").strip()) if has_system_prompt is None else has_system_prompt
    return Turns.begin(tokenizer, template, has_system_prompt=has_system)
