"""Tokenizer, template and model against each other: an id beyond the embeddings is named before it is computed with."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers

from l4ctx.checkpoint.chat_template import ChatTemplate, check_template
from l4ctx.checkpoint.generation_config import GenerationConfig, GenerationConfigError
from l4ctx.checkpoint.tokenizer import Tokenizer, TokenizerError
from l4ctx.documents.document import Document
from l4ctx.prompt.builder import build_prompt
from support.tokenizer_fixtures import CHAT_TEMPLATE, toy_tokenizer_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One whose vocabulary ends with a control token and a word."""
    toy_tokenizer_folder(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|doc|>"])
    tokenizer.add_tokens(["zorblax"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def loaded(folder: Path, missing: int) -> Tokenizer:
    """For a model that has no embeddings for the last `missing` tokens."""
    return Tokenizer.from_folder(folder, Tokenizer.from_folder(folder).vocab_size - missing)


def prompt_of(
    tokenizer: Tokenizer,
    *,
    template: str | None = CHAT_TEMPLATE,
    document: str = "text",
    question: str = "why?",
    system: str | None = None,
) -> list[int]:
    chat = None if template is None else ChatTemplate(template, {"bos_token": "<|begin_of_text|>"})
    documents = [Document("notes/a.txt", "", document)]
    return build_prompt(tokenizer, chat, documents, question, system=system).ids.tolist()


def test_tokens_that_are_not_used_do_no_harm(folder: Path) -> None:
    assert prompt_of(loaded(folder, 2)) == prompt_of(loaded(folder, 0))
    check_template(loaded(folder, 2), ChatTemplate(CHAT_TEMPLATE))


@pytest.mark.parametrize(
    ("changes", "user"),
    [
        ({"template": "<|doc|>" + CHAT_TEMPLATE}, "the chat template uses the token '<|doc|>'"),
        ({"template": CHAT_TEMPLATE + "<|doc|>"}, "the chat template uses the token '<|doc|>'"),
        ({"document": "a zorblax"}, "notes/a.txt uses the token 'zorblax'"),
        ({"question": "a zorblax?"}, "the question uses the token 'zorblax'"),
        ({"system": "zorblax"}, "the system prompt uses the token 'zorblax'"),
        ({"system": "zorblax", "template": None}, "the system prompt uses the token 'zorblax'"),
    ],
)
def test_a_token_beyond_the_embeddings_is_named(folder: Path, changes: dict[str, str], user: str) -> None:
    prompt_of(loaded(folder, 0), **changes)  # type: ignore[arg-type]
    tokenizer = loaded(folder, 2)
    with pytest.raises(TokenizerError) as caught:
        prompt_of(tokenizer, **changes)  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith(user) and "embeddings" in message and "\n" not in message
    assert f"the model has {tokenizer.vocab_size - 2:,} embeddings" in message


def test_the_first_token_of_a_base_model(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<|doc|>"}')
    with pytest.raises(TokenizerError, match=r"every prompt \(bos_token\) uses the token '<\|doc\|>'"):
        prompt_of(loaded(folder, 2), template=None)


def test_an_answer_must_be_able_to_end(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 99]}')
    GenerationConfig.from_folder(tmp_path).check(50)
    with pytest.raises(GenerationConfigError, match=r"eos_token_id.*token 5, .*5 embeddings"):
        GenerationConfig.from_folder(tmp_path).check(5)


def test_unknown_ids_in_an_answer_are_no_text(folder: Path) -> None:
    tokenizer = loaded(folder, 0)
    assert tokenizer.token_bytes(tokenizer.vocab_size + 9) == b""
    assert tokenizer.decode([tokenizer.vocab_size + 9]) == ""
