"""A checkpoint's chat template: untrusted Jinja, rendered to find the text around each message.

A template that is not known by its digest is rendered in a confined process, see `l4ctx.checkpoint.template_work`.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from l4ctx.checkpoint.known import is_known_template
from l4ctx.checkpoint.tokenizer import MOST_TEMPLATE, Tokenizer, TokenizerError, read_settings, special_tokens
from l4ctx.confinement.process import (
    LARGE,
    SLOW,
    ChildFailedError,
    Confined,
    Limits,
    NoChildError,
    RefusedError,
)
from l4ctx.errors import UnusableCheckpointError
from l4ctx.formatting import human_bytes, only_printable
from model.checkpoint_files import CHAT_TEMPLATE, TOKENIZER_CONFIG, checkpoint_files

LIMITS = Limits(memory=512 << 20, seconds=60.0, processor_seconds=3.0, reply=4 << 20)
CHILD = Confined("l4ctx.checkpoint.template_work")


class PromptError(UnusableCheckpointError):
    """A prompt that cannot be built, because of the template or the input."""


class TemplateLimitError(PromptError):
    """A template that takes more than a template may."""


@dataclass(frozen=True)
class ChatTemplate:
    """A checkpoint's Jinja chat template, untrusted; the special tokens that it may use; and the date it is given."""

    source: str
    special_tokens: dict[str, str] = field(default_factory=dict)
    date: datetime.datetime | None = None  # None means now
    tools: str | None = None  # a list in JSON

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str], *, date: datetime.datetime | None = None) -> ChatTemplate | None:
        """The chat template of a checkpoint; None for a base model, which has none.

        Searches `chat_template.jinja`, then `tokenizer_config.json` (a string, or a list of named templates of which
        "default" is used), then `chat_template.json`. Raises PromptError for broken files.
        """
        files = checkpoint_files(Path(path))
        try:
            tokens = special_tokens(files)
            if files.place(CHAT_TEMPLATE).is_file():
                return cls(files.content(CHAT_TEMPLATE).decode("utf-8"), tokens, date)
            for name in (TOKENIZER_CONFIG, "chat_template.json"):
                source = read_settings(files, name).get("chat_template")
                if source is not None:
                    return cls(_default_template(source, files.place(name)), tokens, date)
        except (OSError, UnicodeDecodeError) as error:
            raise PromptError(f"{files.place(CHAT_TEMPLATE)}: cannot be read: {_one_line(error)}") from None
        except TokenizerError as error:
            raise PromptError(str(error)) from None
        return None

    def prepare(self) -> None:
        """Starts the process that renders it, if it needs one; it is ready by the time the tokenizer is loaded."""
        if not is_known_template(self.source):
            CHILD.start()

    def split(self, *, system: bool) -> list[str]:
        """The template's own text around the messages: [before, "user", after], or with `system`
        [before, "system", between, "user", after], in the order in which the template renders the two.

        Raises PromptError if the template fails or does not render each message exactly once.
        """
        if len(self.source) > MOST_TEMPLATE:
            raise PromptError(f"the checkpoint's chat template has more than {MOST_TEMPLATE:,} characters")
        roles = {self._marker(role): role for role in (("system", "user") if system else ("user",))}
        return [roles.get(part, part) for part in self._split_rendering(roles)]

    def around(self, roles: Sequence[str]) -> list[str]:
        """The template's own text before, between and after messages of these roles, in this order: one text more than
        there are roles. After the last message an answer begins.

        Raises PromptError as `split` does, and for messages in another order.
        """
        markers = {self._marker(f"{role}{number}"): role for number, role in enumerate(roles)}
        parts = self._split_rendering(markers)
        if parts[1::2] != list(markers):
            raise PromptError("the chat template does not keep the order of messages")
        return parts[::2]

    def _split_rendering(self, markers: Mapping[str, str]) -> list[str]:
        """The template's own texts, and between them the markers, given with their roles."""
        try:
            return self._split_one_rendering(markers, as_parts=False)
        except TemplateLimitError:
            raise
        except PromptError:
            try:  # templates of multimodal checkpoints may support only lists of parts
                return self._split_one_rendering(markers, as_parts=True)
            except PromptError:
                pass
            raise

    def _marker(self, role: str) -> str:
        """A placeholder for a message that no filter trims and that occurs nowhere in the template."""
        text = self.source + "".join(self.special_tokens.values())
        start = f"l4ctx{role.title()}Text"
        taken = set(re.findall(rf"{start}(\d+)q", text))
        return next(f"{start}{n}q" for n in range(len(taken) + 1) if str(n) not in taken)

    def _split_one_rendering(self, markers: Mapping[str, str], *, as_parts: bool) -> list[str]:
        messages: list[dict[str, Any]] = []
        for marker, role in markers.items():
            messages.append({"role": role, "content": [{"type": "text", "text": marker}] if as_parts else marker})
        text = _render(self, messages)
        for marker, role in markers.items():
            part_shown = as_parts and re.search(f"[\"']{marker}[\"']", text)  # the part's repr, not its text
            if text.count(marker) != 1 or part_shown:
                found = f"shows it {text.count(marker)} times" if marker in text else "omits or alters it"
                raise PromptError(f"the chat template must show the {role} message exactly once, but {found}")
        return re.split(f"({'|'.join(markers)})", text)


def check_template(tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
    """Raises TokenizerError if every prompt would contain a token that the model lacks; and PromptError."""
    if template is not None:
        for part in template.split(system=False)[::2]:
            tokenizer.encode_control(part)
    elif tokenizer.bos_id is not None:
        tokenizer.check_ids([tokenizer.bos_id], "the beginning of every prompt (bos_token)")


def _default_template(source: object, file: Path) -> str:
    """The template in a JSON file's `chat_template`, a string or a list of named templates."""
    if isinstance(source, list):
        named = {str(entry.get("name")): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        raise PromptError(f"{file}: chat_template is neither a text nor a list with one named default")
    return source


def _render(template: ChatTemplate, messages: list[dict[str, Any]]) -> str:
    """Renders an untrusted template as `transformers` does. Any failure in it becomes a PromptError."""
    variables = {
        **template.special_tokens,
        "messages": messages,
        "tools": None if template.tools is None else json.loads(template.tools),
        "documents": None,
        "add_generation_prompt": True,
    }
    return render_confined(template.source, variables, "the checkpoint's chat template", template.date)


def render_confined(source: str, variables: dict[str, Any], what: str, date: datetime.datetime | None = None) -> str:
    """Renders a Jinja template, in a confined process unless it is known; `what` is what errors call it.

    Any failure in it becomes a PromptError.
    """
    date = date or datetime.datetime.now()
    if is_known_template(source):
        from l4ctx.checkpoint.chat_environment import TemplateFailure, render

        try:
            return render(source, variables, date)
        except TemplateFailure as error:
            raise PromptError(f"{what} fails: {error}") from None
    asked = {"source": source, "variables": variables, "date": date.isoformat()}
    try:
        with CHILD.request({}, LIMITS, json.dumps(asked).encode()) as receive:
            return receive().body.decode("utf-8", "surrogatepass")
    except RefusedError as error:
        raise PromptError(f"{what} fails: {error}") from None
    except ChildFailedError as error:
        raise TemplateLimitError(f"{what} fails: it {_excess(error.why)}") from None
    except NoChildError as error:
        raise PromptError(f"the process that renders {what} {error}") from None


def _excess(why: str) -> str:
    """What of LIMITS a template exceeds."""
    if why == SLOW:
        return f"takes more than {LIMITS.processor_seconds:g} s"
    if why == LARGE:
        return f"renders more than {human_bytes(LIMITS.reply)} of text"
    return f"needs more than {human_bytes(LIMITS.memory)} of memory"


def _one_line(error: BaseException) -> str:
    return " ".join(only_printable(str(error), " ").split()) or type(error).__name__
