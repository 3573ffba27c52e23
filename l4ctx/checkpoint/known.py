"""Files that were looked at: what they hold needs no confined process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

TEMPLATES: Mapping[str, str] = {
    "95a231a15c8c976ac511e62c6fdf477ea9e3ca7a87cbb9974e0dd653eccb4563": "Llama 4, chat_template.jinja",
    "38c930cf2019b864c42c1020baf10e60b053d34e00c17585b0a8f549a2468602": "samples/tiny, chat_template.jinja",
}
"""The SHA-256 of chat templates that end soon, whatever the messages: their only loop is over these."""

TOKENIZERS: Mapping[str, str] = {
    "83412b894999c30419404beff854cccb88810812496bc6d6db4d3108a4f9ac92": "Llama 4, tokenizer.json",
    "edbd827448849b9a8287ce9fb78abb37d8bf80f02d3d802d50e6b0319c64e093": "samples/tiny, tokenizer.json",
}
"""The SHA-256 of tokenizers that have no normalizer and Llama 4's pre-tokenizer."""


def is_known_template(source: str) -> bool:
    return hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest() in TEMPLATES


def is_known_tokenizer(content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() in TOKENIZERS
