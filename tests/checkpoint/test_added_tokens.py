"""Words that were added to a tokenizer are text with ids of their own, as in `transformers`; control tokens are not."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from l4ctx.checkpoint import pieces as pieces_module
from l4ctx.checkpoint import tokenizer as module
from l4ctx.checkpoint.tokenizer import Tokenizer, TokenizerError
from support.tokenizer_fixtures import CHAT_TEMPLATE, CONTROL_TOKENS, toy_tokenizer_folder

WORDS: dict[str, AddedToken | str] = {
    "a new word": "zorblax",
    "a word of the vocabulary": "read",
    "a single word": AddedToken("falcon", single_word=True),
    "one that takes white space in": AddedToken("harb", lstrip=True),
    "one that takes white space behind": AddedToken("<x>", rstrip=True),
    "both": AddedToken("==>", lstrip=True, rstrip=True),
    "one within another": "zorb",
    "within a control token": "eot",
    "longer than a control token": "x<|eot|>y",
    "several words": "amber falcon is",
    "white space": "    ",
    "a line end within": "one\ntwo",
    "not normalized": AddedToken("Silver", normalized=False),
    "not ASCII": "Brücke",
    "punctuation": "!?",
}
TEXTS = [
    "zorblax",
    "zorb",
    "code",
    "codename",
    "encode",
    "falcon",
    " falcon ",
    "falcons",
    "harb",
    "  \n harb",
    "our",
    "<x>",
    "<x>  \n",
    "==>",
    " ==> \n",
    "<|eot|>",
    "x<|eot|>y",
    "eot",
    "amber falcon is",
    "amber",
    "    ",
    "     ",
    "one\ntwo",
    "one\n",
    "two",
    "Silver",
    "silver",
    "Brücke",
    "!?",
    "!",
    "?",
    " ",
    "\n",
    "\r\n",
    "a",
    "7",
    ".",
    "é",
    "日",
    "/",
    "\t",
    "\u2028",
    "_",
    "'s",
    "read",
    "reads",
    "thread",
]


def with_words(folder: Path, words: list[AddedToken | str], **files: str) -> Path:
    toy_tokenizer_folder(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for word in words:
        tokenizer.add_tokens([word])
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


def oracle(folder: Path) -> Any:
    """`transformers`, told to take special tokens as text, of a file in which `<|python_start|>` is special."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for token in content["added_tokens"]:
        token["special"] |= token["content"].startswith("<|")
    (folder / "oracle.json").write_text(json.dumps(content), encoding="utf-8")
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "oracle.json"), split_special_tokens=True)


def ids(tokenizer: Tokenizer, text: str, **around: str) -> list[int]:
    return tokenizer.encode_data(text, **around).ids.tolist()


@pytest.fixture(params=[1, 4096], ids=["small pieces", "whole"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(pieces_module, "PIECE_CHARACTERS", request.param)
    return int(request.param)


@pytest.mark.parametrize(
    "words",
    [*([word] for word in WORDS.values()), list(WORDS.values()), list(WORDS.values())[::-1]],
    ids=[*WORDS, "all", "all, in reverse"],
)
def test_ids_are_those_of_transformers(tmp_path: Path, words: list[AddedToken | str], pieces: int) -> None:
    tokenizer, theirs = Tokenizer.from_folder(with_words(tmp_path, words)), oracle(tmp_path)
    draw = random.Random(11)
    for _ in range(150):
        text = "".join(draw.choices(TEXTS, k=30))
        assert ids(tokenizer, text) == theirs(text, add_special_tokens=False).input_ids, repr(text)
        before, after = draw.choices(TEXTS, k=2)
        assert (
            ids(tokenizer, text, prefix=before, suffix=after)
            == theirs(before + text + after, add_special_tokens=False).input_ids
        ), repr((before, text, after))


def test_long_texts_are_still_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, theirs = Tokenizer.from_folder(with_words(tmp_path, list(WORDS.values()))), oracle(tmp_path)
    text = "".join(random.Random(5).choices([*TEXTS, " the access ", " is 48213.\n"], k=30_000))
    calls: list[int] = []
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 20_000)
    encoded = tokenizer.encode_data(text, progress=calls.append)
    assert encoded.ids.tolist() == theirs(text, add_special_tokens=False).input_ids
    assert len(calls) > 4 and encoded.forced_cuts == ()


def test_an_added_word_gets_its_own_id(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(with_words(tmp_path, ["zorblax", "read"]))
    word = tokenizer.special_id("zorblax")
    assert word is not None and ids(tokenizer, "The zorblax is")[2] == word
    assert tokenizer.decode([word]) == "zorblax" and tokenizer.token_bytes(word) == b"zorblax"
    assert tokenizer.special_id("read") in ids(tokenizer, "a\nread\n")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config__json", '{"pad_token": "<end>"}'),
        ("tokenizer_config__json", '{"additional_special_tokens": ["<end>"]}'),
        ("tokenizer_config__json", '{"extra_special_tokens": {"image_token": "<end>"}}'),
        ("tokenizer_config__json", '{"added_tokens_decoder": {"9": {"content": "<end>", "special": true}}}'),
        ("special_tokens_map__json", '{"eos_token": {"content": "<end>", "lstrip": false}}'),
        ("special_tokens_map__json", '{"additional_special_tokens": [{"content": "<end>"}]}'),
        ("chat_template__jinja", CHAT_TEMPLATE.replace("<|eot|>", "<end>")),
        ("chat_template__json", json.dumps({"chat_template": CHAT_TEMPLATE + "<end>"})),
        ("tokenizer_config__json", json.dumps({"chat_template": [{"name": "default", "template": "<end>"}]})),
    ],
)
def test_what_is_used_as_a_control_token_is_none_in_data(tmp_path: Path, name: str, content: str) -> None:
    tokenizer = Tokenizer.from_folder(with_words(tmp_path, ["<end>", "zorblax"], **{name: content}))
    found = ids(tokenizer, "a <end> b zorblax <|python_start|> <|eot|>")
    assert tokenizer.special_id("zorblax") in found
    assert not {tokenizer.special_id(token) for token in ("<end>", "<|python_start|>", *CONTROL_TOKENS)} & set(found)
    assert tokenizer.encode_control("<end>") == [tokenizer.special_id("<end>")]
    assert tokenizer.decode(found).startswith("a <end> b")


def test_a_plain_word_of_the_template_stays_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(with_words(tmp_path, ["assistant"]))
    assert tokenizer.special_id("assistant") in ids(tokenizer, "my assistant") + ids(tokenizer, "assistant")


def test_a_control_token_that_text_is_made_of_is_refused(tmp_path: Path) -> None:
    """A special token that the vocabulary has, too: data cannot be kept apart from it."""
    toy_tokenizer_folder(tmp_path)
    content = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    content.add_special_tokens(["read"])
    content.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="control token 'read'"):
        Tokenizer.from_folder(tmp_path).encode_data("a\nread")
