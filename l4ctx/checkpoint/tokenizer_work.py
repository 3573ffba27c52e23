"""What the confined process that tries tokenizers does: loads one, bounds what it makes of a text, encodes a little.

What it accepts is then loaded in the program itself.
"""

from __future__ import annotations

import json
from typing import Any

import tokenizers

from l4ctx.checkpoint.growth import (
    MOST_ADDED_TEXT,
    MOST_ADDED_TOKENS,
    MOST_DECODED_GROWTH,
    MOST_GROWTH,
    MOST_SPLIT_GROWTH,
    decoded_growth,
    normalized_growth,
    split_growth,
)
from l4ctx.confinement.work import Last, Receive, Refusal, Send, Work

_TRIED = (
    "The access code for the amber falcon is 48213.\n\n\tdef read(path):  # it's all\r\n" * 20,
    "naïve café 日本語の文章。 Привет, мир! 👍🏽 \u0301\u200d\ufdfa\u3300 ½ \x00\x7f\u2028" * 20,
    *(character * 2000 for character in "aA0 \n.,'/é日"),
    "ab" * 1000 + "!",
    "a" * 40 + "!",
    " " * 40 + "x",
    "1" * 40 + "a",
)


def work() -> Work:
    return Work(_serve)


def _serve(request: dict[str, Any], receive: Receive, send: Send) -> Last:
    """Tries the tokenizer.json in the body; refuses one that is broken or that makes too much of a text."""
    content = receive()
    tokenizer = _loaded(content)
    del content
    added = tokenizer.get_added_tokens_decoder().values()
    characters = sum(len(token.content) for token in added)
    if len(added) > MOST_ADDED_TOKENS or characters > MOST_ADDED_TEXT:
        raise Refusal(
            f"has {len(added):,} added tokens of {characters:,} characters; at most {MOST_ADDED_TOKENS:,} of "
            f"{MOST_ADDED_TEXT:,} are read"
        )
    split = split_growth(_state(tokenizer.pre_tokenizer))
    _check("pre-tokenizer", split, MOST_SPLIT_GROWTH)
    _check("normalizer", split * normalized_growth(_state(tokenizer.normalizer)), MOST_GROWTH)
    _check("decoder", decoded_growth(_state(tokenizer.decoder)), MOST_DECODED_GROWTH)
    for text in _TRIED:
        _encode(tokenizer, text)
    return {}, b""


def _check(part: str, growth: float, most: float) -> None:
    if growth > most:
        raise Refusal(
            f"has a {part} that can make a text {growth:,.0f} times as long; at most {most:,.0f} times is read"
            if growth < 1e9
            else f"has a {part} that can make a text longer without a bound"
        )


def _loaded(content: bytes) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except MemoryError:
        raise
    except BaseException as error:  # also a panic of the library, which is no Exception
        raise Refusal(f"cannot be loaded: {' '.join(str(error).split())}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> None:
    """Within this process's limits. An error is none yet: no such text may ever come."""
    try:
        tokenizer.encode(text, add_special_tokens=False)
    except MemoryError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise


def _state(component: Any) -> dict[str, Any]:
    """The JSON form of a part; empty if there is none."""
    return {} if component is None else json.loads(component.__getstate__())
