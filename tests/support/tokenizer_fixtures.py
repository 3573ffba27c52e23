"""A toy tokenizer folder in the published format, quick to make: Llama 4's pattern, bytes, about 400 tokens."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from l4ctx.checkpoint.tokenizer import Tokenizer
from support.places import SHARED

LLAMA4_TOKENIZER = SHARED / "llama4-tokenizer"

PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eot|>",
    "<|image|>",
)
CHAT_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|header_start|>' + message['role'] + '<|header_end|>\n\n' }}{{- message['content'] | trim }}"
    "{{- '<|eot|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|header_start|>assistant<|header_end|>\n\n' }}{%- endif %}"
)
CORPUS = (
    "The access code for the amber falcon is 48213.\nThe access code for the silver harbour is 90417.\n",
    "def read(path):\n    return open(path).read()\n\n\nclass Reader:\n    pass  # it's what they'll want\n",
    'Über die Brücke, 日本語の文章。 Привет, мир! 👍🏽 naïve café\r\nWindows line\r\n<document index="1">\n',
)


@functools.cache
def loaded_tokenizer(folder: Path) -> Tokenizer:
    """Of a folder that does not change. The published one takes seconds to load."""
    return Tokenizer.from_folder(folder)


@functools.cache
def transformers_tokenizer(folder: Path) -> Any:
    """The same for `PreTrainedTokenizerFast`."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


@functools.cache
def _trained(digits: str) -> str:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERN.replace(r"\p{N}{1,3}", digits)), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_special_tokens(list(CONTROL_TOKENS))
    tokenizer.add_tokens(["<|python_start|>"])  # not special, but still matched in text
    return tokenizer.to_str()


def toy_tokenizer_folder(
    path: Path, *, digits: str = r"\p{N}{1,3}", change: Callable[[dict[str, Any]], None] | None = None
) -> Path:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja to `path`; `change` edits the first."""
    content = json.loads(_trained(digits))
    if change is not None:
        change(content)
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot|>",
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return path
