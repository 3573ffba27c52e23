"""A tokenizer's added tokens: which are control tokens, and which are ordinary text that data may contain."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tokenizers

_CONTROL_FORM = re.compile(r"<\|.*\|>", re.DOTALL)
_WORDS = re.compile(r"[\w\s'’.-]+")


def control_tokens(
    added: Iterable[tokenizers.AddedToken], settings: Iterable[Mapping[str, Any]], template: str
) -> frozenset[str]:
    """The text of the added tokens that data must never be encoded as.

    These are: special tokens; tokens that one of `settings` (tokenizer_config.json, special_tokens_map.json) lists as
    special, whatever tokenizer.json says; tokens of Llama's form, `<|name|>`; and tokens that occur in the chat
    template's source, except plain words, which may occur there by chance.
    """
    named = {content for fields in settings for content in _named(fields)}
    return frozenset(
        token.content
        for token in added
        if token.special
        or token.content in named
        or _CONTROL_FORM.fullmatch(token.content)
        or (token.content in template and not _WORDS.fullmatch(token.content))
    )


def _named(fields: Mapping[str, Any]) -> Iterator[str]:
    """The special tokens listed in one settings file."""
    for key, value in fields.items():
        if key.endswith("_token"):
            yield from _contents(value)
        elif key in ("additional_special_tokens", "extra_special_tokens"):
            for entry in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
                yield from _contents(entry)
        elif key == "added_tokens_decoder" and isinstance(value, dict):
            for entry in value.values():
                if isinstance(entry, dict) and entry.get("special"):
                    yield from _contents(entry)


def _contents(value: Any) -> Iterator[str]:
    content = value.get("content") if isinstance(value, dict) else value
    if isinstance(content, str):
        yield content


def add_in_order(
    target: tokenizers.Tokenizer, added: Mapping[int, tokenizers.AddedToken], control: frozenset[str]
) -> bool:
    """Adds the same tokens to another tokenizer of the same model, with `control` as special tokens, which it then
    encodes as plain text. Returns whether every token kept its id."""
    in_order = (token for _, token in sorted(added.items()))
    for is_control, tokens in itertools.groupby(in_order, lambda token: token.content in control):
        if is_control:
            target.add_special_tokens(list(tokens))
        else:
            target.add_tokens(list(tokens))
    target.encode_special_tokens = True
    again = target.get_added_tokens_decoder()
    return {token_id: token.content for token_id, token in again.items()} == {
        token_id: token.content for token_id, token in added.items()
    }


class CutCheck:
    """Whether a text can be split at a position: no added token may span it or end there.

    Then both sides match the same added tokens as the whole, including stripped whitespace and single-word rules.
    """

    def __init__(self, contents: Iterable[str]) -> None:
        self._contents = sorted(contents, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, self._contents)))
        self._longest = len(self._contents[0])

    def is_clear(self, text: str, cut: int, prefix: str = "", suffix: str = "") -> bool:
        """Checks the split of `text` at `cut`, where `prefix` precedes and `suffix` follows the text."""
        n = self._longest
        before, after = text[max(0, cut - n) : cut], text[cut : cut + n]
        if len(before) < n:
            before = prefix[-(n - len(before)) :] + before
        if len(after) < n:
            after += suffix[: n - len(after)]
        window, at = before + after, len(before)
        return not self._any.search(window) or not any(
            content in window[max(0, at - len(content)) : at + len(content)] for content in self._contents
        )
