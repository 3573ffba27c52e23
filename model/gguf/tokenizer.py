"""The tokenizer in GGUF metadata, as the files that a checkpoint folder has for it. Imports no torch.

Byte-level BPE alone is read; what the metadata calls `pre`, the rule that splits text into words, is known by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from model.errors import CheckpointError
from model.gguf.files import GgufModel
from model.gguf.header import Strings

LLAMA4_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
STOP_TOKENS = (
    "<|end_of_text|>",
    "<|eom|>",
    "<|eot|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|endoftext|>",
    "<|im_end|>",
    "</s>",
)
"""Control tokens that end an answer although the metadata, which names one or two, does not list them."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_ADDED = (_UNKNOWN, _CONTROL, _USER_DEFINED)
_PREFIX = "tokenizer.ggml."
_BESIDE = "put the model's tokenizer.json beside the file"


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return _sequence(split, _byte_level(use_regex=False))


_SINGLE_DIGITS = _sequence({"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True))
_PRE_TOKENIZERS: Mapping[str, dict[str, Any]] = {
    **dict.fromkeys(("llama4", "gpt-4o"), _split(LLAMA4_PATTERN)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _split(LLAMA3_PATTERN)),
    **dict.fromkeys(("smollm", "starcoder", "refact"), _SINGLE_DIGITS),
    "gpt-2": _byte_level(use_regex=True),
}
_WHOLE_WORDS_FIRST = ("llama4", "gpt-4o", "llama-bpe", "llama3", "llama-v3")
"""Where a word that is a token as a whole is not merged from its parts (`ignore_merges`)."""


def tokenizer_of(model: GgufModel) -> str:
    """The content of a tokenizer.json. Raises CheckpointError."""
    kind, pre = model.metadata.get(f"{_PREFIX}model"), model.metadata.get(f"{_PREFIX}pre")
    if kind != "gpt2":
        raise CheckpointError(f"{model.path}: {_PREFIX}model {kind!r} is not read; {_BESIDE}")
    if pre not in list(_PRE_TOKENIZERS):
        raise CheckpointError(f"{model.path}: {_PREFIX}pre {pre!r} is not known; {_BESIDE}")
    tokens = _tokens(model)
    kinds = _kinds(model, len(tokens))
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = next(token for token_id, token in enumerate(tokens) if ids[token] != token_id)
        raise CheckpointError(f"{model.path}: {_PREFIX}tokens: {twice!r} appears twice; {_BESIDE}")
    added = dict.fromkeys(token_id for token_id, kind in enumerate(kinds) if kind in _ADDED)
    words = len(tokens)  # of the BPE model; added tokens at the end are no part of it
    while words - 1 in added:
        words -= 1
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(tokens[token_id], token_id, kinds[token_id]) for token_id in added],
        "normalizer": None,
        "pre_tokenizer": _PRE_TOKENIZERS[str(pre)],
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in _WHOLE_WORDS_FIRST,
            "vocab": {token: token_id for token, token_id in ids.items() if token_id < words},
            "merges": _merges(model),
        },
    }
    return json.dumps(content, ensure_ascii=False)


def tokenizer_config_of(model: GgufModel) -> dict[str, Any]:
    """The fields of a tokenizer_config.json: special tokens and chat template."""
    tokens = model.metadata.get(f"{_PREFIX}tokens")
    listed = list(tokens) if isinstance(tokens, Strings) else []
    fields: dict[str, Any] = {}
    for name in ("bos", "eos"):
        token_id = model.metadata.get(f"{_PREFIX}{name}_token_id")
        if type(token_id) is int and 0 <= token_id < len(listed):
            fields[f"{name}_token"] = listed[token_id]
    adds_bos = model.metadata.get(f"{_PREFIX}add_bos_token")
    if isinstance(adds_bos, bool):
        fields["add_bos_token"] = adds_bos
    template = model.metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        fields["chat_template"] = template
    return fields


def generation_config_of(model: GgufModel) -> dict[str, Any]:
    """The fields of a generation_config.json: the tokens that end an answer."""
    found = {model.metadata.get(f"{_PREFIX}{key}") for key in STOP_KEYS}
    tokens, kinds = model.metadata.get(f"{_PREFIX}tokens"), model.metadata.get(f"{_PREFIX}token_type")
    if isinstance(tokens, Strings) and isinstance(kinds, tuple):
        pairs = zip(tokens, kinds, strict=False)
        found |= {i for i, (token, kind) in enumerate(pairs) if kind == _CONTROL and token in STOP_TOKENS}
    ids = sorted(token_id for token_id in found if type(token_id) is int)
    return {"eos_token_id": ids} if ids else {}


def _added(token: str, token_id: int, kind: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": token, **flags, "special": kind != _USER_DEFINED}


def _tokens(model: GgufModel) -> list[str]:
    tokens = model.metadata.get(f"{_PREFIX}tokens")
    if not isinstance(tokens, Strings):
        raise CheckpointError(f"{model.path}: metadata key {_PREFIX}tokens is missing; {_BESIDE}")
    return list(tokens)


def _kinds(model: GgufModel, count: int) -> Sequence[int]:
    """The type of each of `count` tokens."""
    kinds = model.metadata.get(f"{_PREFIX}token_type")
    if kinds is None:
        return [_NORMAL] * count
    if not isinstance(kinds, tuple) or len(kinds) != count:
        raise CheckpointError(f"{model.path}: {_PREFIX}token_type does not hold a number for each token; {_BESIDE}")
    return [int(kind) for kind in kinds]


def _merges(model: GgufModel) -> list[str]:
    """Each two tokens with a space between them, which no token has: bytes are spelled as visible characters."""
    merges = model.metadata.get(f"{_PREFIX}merges")
    if not isinstance(merges, Strings):
        raise CheckpointError(f"{model.path}: metadata key {_PREFIX}merges is missing; {_BESIDE}")
    listed = list(merges)
    for merge in listed:
        if merge.count(" ") != 1:
            raise CheckpointError(f"{model.path}: {_PREFIX}merges: {merge[:40]!r} is not two tokens; {_BESIDE}")
    return listed
