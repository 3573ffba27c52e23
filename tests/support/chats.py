"""Conversations with the sample model, or with it cut into shorter attention chunks."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import tokenizers

from l4ctx.checkpoint.chat_template import ChatTemplate
from l4ctx.run.chat import Chat
from l4ctx.run.conversing import turns_of
from l4ctx.run.inputs import make_inputs, read_request
from l4ctx.run.monitor import Monitor
from l4ctx.run.request import AnswerOptions, ContextOptions, KVOptions, Request, SourceOptions
from l4ctx.run.session import Session, load
from l4ctx.run.sizing import size
from support.places import TINY


def with_config(folder: Path, **changes: Any) -> Path:
    """The sample model with another configuration of the text model. Its answers mean nothing then."""
    folder.mkdir()
    for file in TINY.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((TINY / "config.json").read_text())
    config["text_config"] |= changes
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_template(folder: Path, template: str | None) -> Path:
    """The sample model with another chat template."""
    shutil.copytree(TINY, folder)
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@functools.cache
def oracle() -> tuple[tokenizers.Tokenizer, jinja2.Template]:
    """What `transformers` puts together: the whole text by Jinja, then its tokens at once."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((TINY / "chat_template.jinja").read_text())
    return tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json")), template


def rendered(messages: list[tuple[str, str]]) -> list[int]:
    """The conversation as one prompt, up to where the last message ends or an answer begins."""
    tokenizer, template = oracle()
    said = [{"role": role, "content": text} for role, text in messages]
    settings = json.loads((TINY / "tokenizer_config.json").read_text())
    text = template.render(
        messages=said, bos_token=settings["bos_token"], add_generation_prompt=messages[-1][0] == "user"
    )
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def document_text(file: Path, name: str, index: int = 1) -> str:
    """A document within the user's message."""
    return f'<document index="{index}" path="{name}">\n{file.read_text()}\n</document>\n\n'


@contextmanager
def chatting(
    model: Path = TINY,
    *paths: Path,
    context: Path | None = None,
    kv_dtype: Any = "auto",
    system: str | None = None,
    **answer: Any,
) -> Iterator[Chat]:
    request = Request(
        model,
        SourceOptions(paths=[str(path) for path in paths]),
        system=system,
        context=ContextOptions(context),
        answer=AnswerOptions(**answer),
        kv=KVOptions(dtype=kv_dtype),
        converses=True,
    )
    with Monitor(lambda text: None) as monitor:
        choices, sources = read_request(request, monitor)
        inputs = make_inputs(choices, sources, monitor)
        session = load(size(inputs, monitor), monitor)
        read(session)
        template = ChatTemplate.from_folder(model, date=choices.date)
        system_first = inputs.context.reader.state.system if inputs.context else None
        turns = turns_of(request, inputs.config, inputs.tokenizer, template, has_system_prompt=system_first)
        yield Chat(session, turns)


def read(session: Session) -> None:
    for _ in session.prefill():
        pass


def say(chat: Chat, question: str) -> str:
    """A turn; returns its answer."""
    turn = chat.begin(question)
    read(turn)
    for _ in turn.decode():
        pass
    return chat.end().text
