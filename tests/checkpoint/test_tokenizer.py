"""Tokenizing: data is never control, pieces equal the whole, streams equal the whole text."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from l4ctx.checkpoint import pieces as pieces_module
from l4ctx.checkpoint import tokenizer as module
from l4ctx.checkpoint.pieces import LONGEST_PIECE, piece_ends
from l4ctx.checkpoint.tokenizer import StreamDecoder, Tokenizer, TokenizerError
from support.places import ROOT
from support.tokenizer_fixtures import CONTROL_TOKENS, LLAMA4_TOKENIZER, loaded_tokenizer, toy_tokenizer_folder

HOSTILE = "".join(CONTROL_TOKENS) + "<|python_start|><|eot|> <|eot|>\n<|image|>x"
ALPHABET = [
    "a",
    "Z",
    "é",
    "ß",
    "日",
    "か",
    "\u0301",
    "'s",
    "'",
    "7",
    "42",
    "²",
    "٣",
    " ",
    "  ",
    "\t",
    "\n",
    "\r",
    "\r\n",
]
ALPHABET += [
    "/",
    ".",
    "!",
    "_",
    "-",
    "\u2028",
    "\xa0",
    "\x1c",
    "\x85",
    "👍🏽",
    "\u200d",
    "<|eot|>",
    "//\n",
    " word",
    "x y",
]


@pytest.fixture(scope="module", params=["toy", "single digits", "llama 4"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "llama 4":
        if not LLAMA4_TOKENIZER.is_dir():
            pytest.skip("the real Llama 4 tokenizer is not at ../shared/llama4-tokenizer")
        return LLAMA4_TOKENIZER
    digits = r"\p{N}" if request.param == "single digits" else r"\p{N}{1,3}"
    return toy_tokenizer_folder(tmp_path_factory.mktemp("toy"), digits=digits)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return loaded_tokenizer(folder)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> tokenizers.Tokenizer:
    """The same JSON with its added tokens removed."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
    return tokenizers.Tokenizer.from_str(json.dumps(content))


@pytest.fixture(scope="module")
def whole(oracle: tokenizers.Tokenizer) -> Callable[[str], list[int]]:
    """The oracle's encoding of a whole text at once."""
    return lambda text: oracle.encode(text, add_special_tokens=False).ids


def words(oracle: tokenizers.Tokenizer, text: str) -> list[str]:
    """What the pre-tokenizer splits `text` into: unlike ids, different for any wrong cut."""
    return [word for word, _ in oracle.pre_tokenizer.pre_tokenize_str(text)]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces_module, "PIECE_CHARACTERS", 1)
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 40)


def toy(path: Path, change: Callable[[dict[str, Any]], None] | None = None) -> Tokenizer:
    return Tokenizer.from_folder(toy_tokenizer_folder(path, change=change))


@pytest.mark.usefixtures("small_pieces")
def test_every_safe_cut_is_safe(
    oracle: tokenizers.Tokenizer, tokenizer: Tokenizer, whole: Callable[[str], list[int]]
) -> None:
    draw = random.Random(5)
    cuts = 0
    for _ in range(300):
        text = "".join(draw.choices(ALPHABET, k=60))
        forced: list[int] = []
        ends = list(piece_ends(text, forced))
        cuts += len(ends) - 1
        pieces = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        assert [word for piece in pieces for word in words(oracle, piece)] == words(oracle, text), repr(text)
        assert tokenizer.encode_data(text).ids.tolist() == whole(text), repr(text)
        assert forced == []
    assert cuts > 1500


@pytest.mark.usefixtures("small_pieces")
def test_every_character_around_a_cut(tokenizer: Tokenizer, whole: Callable[[str], list[int]]) -> None:
    characters = [chr(code) for code in range(0x3100) if not chr(code).isalpha()] + ["\ufeff", "\U0001f44d", "𝟙"]
    before = "".join(
        f"{character} a{character}\n{character}b{character}.{character}{character}\r" for character in characters
    )
    assert tokenizer.encode_data(before).ids.tolist() == whole(before)


def test_pieces_in_batches_equal_the_whole(tokenizer: Tokenizer, whole: Callable[[str], list[int]]) -> None:
    text = "".join(Path(name).read_text(encoding="utf-8") for name in (__file__, module.__file__)) * 12
    text += '{"minified":[1,22,4444],"json":true},' * 2000 + "日本語の文章。\n" * 4000 + "x = 1\r\n" * 3000
    calls: list[int] = []
    encoded = tokenizer.encode_data(text, prefix="<a>\n", suffix="\n</a>", progress=calls.append)
    assert encoded.ids.tolist() == whole(f"<a>\n{text}\n</a>")
    assert encoded.forced_cuts == () and encoded.ids.itemsize == 4
    assert len(calls) > 1 and calls == sorted(calls) and calls[-1] == len(text)


@pytest.mark.parametrize("text", ["", "x", "\n", "\r\n", " ", "日", "👍🏽", "a\rb\r\nc", "\ufeff", "\0"])
def test_short_texts(tokenizer: Tokenizer, whole: Callable[[str], list[int]], text: str) -> None:
    assert tokenizer.encode_data(text).ids.tolist() == whole(text)
    assert tokenizer.encode_data(text, prefix="p", suffix="s").ids.tolist() == whole(f"p{text}s")
    assert tokenizer.decode(tokenizer.encode_data(text).ids) == text


def test_ids_are_appended(tokenizer: Tokenizer) -> None:
    into = array("i", [7])
    assert tokenizer.encode_data("one two", into=into).ids is into
    assert into.tolist() == [7, *tokenizer.encode_data("one two").ids]


def test_a_line_without_a_safe_cut_is_cut_by_force(tokenizer: Tokenizer) -> None:
    text = "x" * 1_000_000
    encoded = tokenizer.encode_data(text)
    assert encoded.forced_cuts == tuple(range(LONGEST_PIECE, len(text), LONGEST_PIECE))
    assert tokenizer.decode(encoded.ids) == text


def test_a_forced_cut_keeps_line_ends_whole(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces_module, "PIECE_CHARACTERS", 4)
    monkeypatch.setattr(pieces_module, "LONGEST_PIECE", 7)
    assert tokenizer.encode_data("\r\n" * 10).forced_cuts == (6, 12, 18)
    assert tokenizer.encode_data("日" * 10).forced_cuts == (7,)


def test_data_never_becomes_control(tokenizer: Tokenizer, whole: Callable[[str], list[int]]) -> None:
    added = set(tokenizer._added)
    ids = tokenizer.encode_data(HOSTILE).ids
    assert added.isdisjoint(ids) and ids.tolist() == whole(HOSTILE)
    assert tokenizer.decode(ids) == HOSTILE
    assert tokenizer.encode_control("<|eot|><|python_start|>") == [
        tokenizer.special_id("<|eot|>"),
        tokenizer.special_id("<|python_start|>"),
    ]


def test_a_vocabulary_that_spells_a_control_token_is_refused(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["pre_tokenizer"] = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        content["model"]["ignore_merges"] = True
        content["model"]["vocab"]["<|eot|>"] = next(
            token["id"] for token in content["added_tokens"] if token["content"] == "<|eot|>"
        )

    with pytest.raises(TokenizerError, match=r"encoded as the control token '<\|eot\|>'"):
        toy(tmp_path, change).encode_data("<|eot|>")


def test_truncation_and_padding_in_the_file_do_nothing(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        content["padding"] = {
            "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
        }  # fmt: skip

    plain, changed = toy(tmp_path / "plain"), toy(tmp_path / "changed", change)
    text = "The access code for the amber falcon is 48213.\n"
    assert len(changed.encode_data(text).ids) > 4
    assert changed.encode_data(text) == plain.encode_data(text)
    assert changed.encode_control("<|eot|>" + text) == plain.encode_control("<|eot|>" + text)


def test_a_post_processor_adds_nothing(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        bos = {"SpecialToken": {"id": "<|eot|>", "type_id": 0}}
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|eot|>": {"id": "<|eot|>", "ids": [404], "tokens": ["<|eot|>"]}},
        }

    plain, changed = toy(tmp_path / "plain"), toy(tmp_path / "changed", change)
    assert changed.encode_data("text") == plain.encode_data("text")
    assert changed.encode_control("text") == plain.encode_control("text")


@pytest.mark.usefixtures("small_pieces")
def test_another_pre_tokenizer_encodes_the_whole(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["pre_tokenizer"] = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        }

    folder = toy_tokenizer_folder(tmp_path, change=change)
    oracle = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "word\n  word\nno   cuts\n" * 50
    assert Tokenizer.from_folder(folder).encode_data(text, prefix="\n").ids.tolist() == oracle.encode("\n" + text).ids


def test_a_panic_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """What the library raises; not an Exception."""

    class Panicking:
        def encode_batch_fast(self, *_: object, **__: object) -> None:
            raise PanicException("index out\nof range")

    broken = toy(tmp_path)
    monkeypatch.setattr(broken, "_data", Panicking())
    with pytest.raises(TokenizerError, match="a text cannot be encoded: index out of range"):
        broken.encode_data("text")


def test_interrupts_are_not_swallowed() -> None:
    with pytest.raises(KeyboardInterrupt), module._as_tokenizer_error("encoding"):
        raise KeyboardInterrupt


def test_lone_surrogates_are_replaced(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode_data("a\udcffb\ud83d").ids) == "a\ufffdb\ufffd"
    assert tokenizer.decode(tokenizer.encode_control("a\udcff")) == "a\ufffd"


def test_a_missing_byte_is_an_error_not_lost_text(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        model = content["model"]
        model["merges"] = [merge for merge in model["merges"] if "Ã" not in "".join(merge)]
        model["vocab"] = {token: number for token, number in model["vocab"].items() if "Ã" not in token}

    with pytest.raises(TokenizerError, match=r"no token for 1 bytes \(the first: 0xc3\)"):
        toy(tmp_path, change)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), ("{", "cannot be loaded"), ("{}", "cannot be loaded")]
)
def test_a_missing_or_broken_file_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=re.escape(str(tmp_path / "tokenizer.json")) + f": {message}") as raised:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(raised.value)


def test_ids_and_sizes(tmp_path: Path) -> None:
    loaded = toy(tmp_path)
    oracle = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert loaded.vocab_size == oracle.get_vocab_size()
    assert loaded.bos_id == loaded.special_id("<|begin_of_text|>") == oracle.token_to_id("<|begin_of_text|>")
    assert loaded.special_id("the") is None
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false, "bos_token": "<|begin_of_text|>"}')
    assert Tokenizer.from_folder(tmp_path).bos_id is None
    (tmp_path / "tokenizer_config.json").write_text("[1")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: cannot be read as JSON"):
        Tokenizer.from_folder(tmp_path)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(token_id) for token_id in ids), decoder.finish()]


def test_a_stream_never_shows_half_a_character(tokenizer: Tokenizer) -> None:
    text = "naïve 日本語 👍🏽👨‍👩‍👧 𓀀 é\r\nend"
    pieces = streamed(tokenizer, tokenizer.encode_data(text).ids.tolist())
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_stream_of_any_ids_is_the_decoding_of_all(tokenizer: Tokenizer) -> None:
    draw = random.Random(3)
    for _ in range(200):
        ids = [draw.randrange(min(tokenizer.vocab_size, 500)) for _ in range(12)]
        ids += [draw.randrange(tokenizer.vocab_size) for _ in range(12)] + [tokenizer.vocab_size + 5]
        draw.shuffle(ids)
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_control_tokens_are_not_shown(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_control("<|header_start|>assistant<|header_end|>\n\nyes<|eot|>")
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == "assistant\n\nyes"


def test_a_stream_with_another_decoder(tmp_path: Path) -> None:
    model = tokenizers.models.BPE(
        vocab={"<unk>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4, **{f"<0x{n:02X}>": 5 + n for n in range(256)}},
        merges=[("▁", "a")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    decoders = tokenizers.decoders
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.from_folder(tmp_path)
    ids = loaded.encode_data("ab a é👍 bb").ids.tolist()
    pieces = streamed(loaded, ids)
    assert "".join(pieces) == loaded.decode(ids) == "ab a é👍 bb"
    assert not any("\ufffd" in piece for piece in pieces)


def test_no_warning_after_a_fork(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom l4ctx.checkpoint.tokenizer import Tokenizer\n"
        f"tokenizer = Tokenizer.from_folder({str(toy_tokenizer_folder(tmp_path))!r})\n"
        "tokenizer.encode_data('some words ' * 50000)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n    os._exit(0)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    root = ROOT
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stderr == ""
