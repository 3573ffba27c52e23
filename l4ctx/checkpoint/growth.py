"""How much longer a tokenizer's parts can make a text: bounds from their JSON alone, before a text is given to them."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterable, Mapping
from typing import Any

MOST_GROWTH = 1024.0  # bytes of normalized and split text for each byte of the text, at worst
MOST_SPLIT_GROWTH = 24.0  # the same by splitting alone
MOST_DECODED_GROWTH = 24.0  # bytes of text for each byte of the tokens
MOST_ADDED_TOKENS = 1 << 14  # Llama 4's has 1,135
MOST_ADDED_TEXT = 1 << 20  # characters of all added tokens

_UNCHANGED = 1.0
_BYTES_AS_CHARACTERS = 2.0 + 2.0  # of byte-level BPE; and a space before each piece
_NORMALIZERS: Mapping[str, float] = {  # for UTF-8, as Unicode's annex 15 states for its forms
    "NFC": 3.0,
    "NFD": 3.0,
    "NFKC": 11.0,
    "NFKD": 11.0,
    "Nmt": _UNCHANGED,
    "Strip": _UNCHANGED,
    "StripAccents": _UNCHANGED,
    "Lowercase": 1.5,
    "BertNormalizer": 3.0 * 5 / 3 * 1.5,  # accents stripped from NFD, spaces around ideographs, lower case
    "ByteLevel": _BYTES_AS_CHARACTERS,
}
_PRE_TOKENIZERS: Mapping[str, float] = {
    "ByteLevel": _BYTES_AS_CHARACTERS,
    **dict.fromkeys(
        (
            "BertPreTokenizer",
            "CharDelimiterSplit",
            "Digits",
            "FixedLength",
            "Punctuation",
            "Split",
            "UnicodeScripts",
            "Whitespace",
            "WhitespaceSplit",
        ),
        _UNCHANGED,
    ),
}
_DECODERS: Mapping[str, float] = {
    "ByteLevel": 3.0,  # U+FFFD for a byte
    "ByteFallback": 3.0,
    "Fuse": _UNCHANGED,
    "Strip": _UNCHANGED,
    "BPEDecoder": 2.0,  # a space for each token
    "CTC": 2.0,
}


def normalized_growth(normalizer: Mapping[str, Any]) -> float:
    """The most bytes that a normalizer makes of a byte; infinite for one that is not known here."""
    kind = normalizer.get("type")
    if kind is None:
        return _UNCHANGED
    if kind == "Sequence":
        return math.prod(map(normalized_growth, _parts(normalizer, "normalizers")))
    if kind == "Prepend":  # to each part of a text between added tokens
        return 1.0 + _bytes(normalizer.get("prepend"))
    if kind == "Replace":
        return _replaced_growth(normalizer)
    if kind == "Precompiled":
        return _precompiled_growth(normalizer.get("precompiled_charsmap"))
    return _NORMALIZERS.get(str(kind), math.inf)


def split_growth(pre_tokenizer: Mapping[str, Any]) -> float:
    """The most bytes that a pre-tokenizer makes of a byte."""
    kind = pre_tokenizer.get("type")
    if kind is None:
        return _UNCHANGED
    if kind == "Sequence":
        return math.prod(map(split_growth, _parts(pre_tokenizer, "pretokenizers")))
    if kind == "Metaspace":  # for a space, and before each piece
        return 2.0 * _bytes(pre_tokenizer.get("replacement"))
    return _PRE_TOKENIZERS.get(str(kind), math.inf)


def decoded_growth(decoder: Mapping[str, Any]) -> float:
    """The most bytes that a decoder makes of a byte of tokens."""
    kind = decoder.get("type")
    if kind is None:
        return 2.0  # a space between tokens
    if kind == "Sequence":
        return math.prod(map(decoded_growth, _parts(decoder, "decoders")))
    if kind == "Replace":
        return _replaced_growth(decoder)
    if kind == "Metaspace":
        return _UNCHANGED
    if kind == "WordPiece":
        return 2.0
    return _DECODERS.get(str(kind), math.inf)


def _replaced_growth(replace: Mapping[str, Any]) -> float:
    """A string is replaced where it occurs; an expression may match at every byte and at the end, and match nothing."""
    content, pattern = _bytes(replace.get("content")), replace.get("pattern")
    literal = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(literal, str) and literal:
        return max(_UNCHANGED, content / len(literal.encode("utf-8", "replace")))
    return _UNCHANGED + 2.0 * content


def _precompiled_growth(charsmap: object) -> float:
    """The longest of the texts that SentencePiece's table, a trie and texts that end with a NUL, puts for another."""
    try:
        raw = base64.b64decode(charsmap if isinstance(charsmap, str) else "", validate=True)
    except (binascii.Error, ValueError):
        return math.inf
    texts = raw[4 + int.from_bytes(raw[:4], "little") :]
    return max(_UNCHANGED, float(max(map(len, texts.split(b"\0")))))


def _parts(component: Mapping[str, Any], name: str) -> Iterable[Mapping[str, Any]]:
    return [part for part in component.get(name, ()) if isinstance(part, dict)]


def _bytes(value: object) -> int:
    return len(value.encode("utf-8", "replace")) if isinstance(value, str) else 0
