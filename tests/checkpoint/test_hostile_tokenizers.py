"""A stranger's tokenizer costs one line: it is tried apart, what it makes of a text is bounded, Ctrl-C works."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers

from l4ctx.checkpoint import tokenizer_trial
from l4ctx.checkpoint.aside import Aside, quiet
from l4ctx.checkpoint.growth import MOST_ADDED_TOKENS, decoded_growth, normalized_growth, split_growth
from l4ctx.checkpoint.known import TOKENIZERS, is_known_tokenizer
from l4ctx.checkpoint.tokenizer import Tokenizer, TokenizerError
from support.places import ROOT, TINY
from support.tokenizer_fixtures import LLAMA4_TOKENIZER, toy_tokenizer_folder


def replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def sequence(kind: str, *parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", kind: list(parts)}


THOUSAND = replace("a", "a" * 1000)
BACKTRACKING = {"pre_tokenizer": split("(a+)+$")}
SLOW = {"pre_tokenizer": split(r"a*(?=\d)")}  # in the square of a text's length
GROWS = "^tokenizer.json: has a {} that can make a text "
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "four times a thousand": (
        {"normalizer": sequence("normalizers", *[THOUSAND] * 4)},
        "^tokenizer.json: needs more than 512 MiB of memory",  # as it normalizes an added token
    ),
    "four times a thousand, not met yet": (
        {"normalizer": sequence("normalizers", *[THOUSAND] * 4), "added_tokens": []},
        GROWS.format("normalizer") + "longer without a bound$",
    ),
    "a thousand": ({"normalizer": THOUSAND}, GROWS.format("normalizer") + "4,000 times as long; at most 1,024 times"),
    "an expression": ({"normalizer": replace("x*", "y" * 999, "Regex")}, GROWS.format("normalizer")),
    "the empty string": ({"normalizer": replace("", "y" * 999)}, GROWS.format("normalizer")),
    "what precedes": ({"normalizer": {"type": "Prepend", "prepend": "y" * 9999}}, GROWS.format("normalizer")),
    "spaces": (
        {"pre_tokenizer": sequence("pretokenizers", *[{**json.loads(pre_tokenizers.Metaspace().__getstate__())}] * 4)},
        GROWS.format("pre-tokenizer") + "1,296 times as long; at most 24 times is read$",
    ),
    "decoding": ({"decoder": THOUSAND}, GROWS.format("decoder")),
    "a broken table": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAAAA"}},
        "^tokenizer.json: cannot be loaded: index out of bounds",
    ),
    "a broken expression": ({"pre_tokenizer": split("(")}, "^tokenizer.json: cannot be loaded: .*Oniguruma error"),
    "added tokens": (
        {
            "added_tokens": [
                {"id": 400 + n, "content": f"<{n}>", "special": True}
                | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
                for n in range(MOST_ADDED_TOKENS + 1)
            ]
        },
        "^tokenizer.json: has 16,385 added tokens of [0-9,]+ characters; at most 16,384 of 1,048,576 are read$",
    ),
}


def folder_with(path: Path, parts: dict[str, Any]) -> Path:
    return toy_tokenizer_folder(path, change=lambda content: content.update(parts))


def loaded(path: Path, parts: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_folder(folder_with(path, parts))


@pytest.mark.parametrize("name", HOSTILE)
def test_one_that_makes_too_much_of_a_text_is_refused(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    parts, message = HOSTILE[name]
    with pytest.raises(TokenizerError, match=message.replace("^", f"^{tmp_path}/")) as error:
        loaded(tmp_path, parts)
    assert "\n" not in str(error.value) and capfd.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform != "linux", reason="the address space is limited on Linux")
def test_loading_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = toy_tokenizer_folder(tmp_path)
    with (folder / "tokenizer.json").open("a") as file:
        file.write(" " * (16 << 20))
    assert Tokenizer.from_folder(folder).encode_data("words")
    monkeypatch.setattr(tokenizer_trial, "_MEMORY", 1 << 20)
    monkeypatch.setattr(tokenizer_trial, "_MEMORY_A_BYTE", 0)
    with pytest.raises(
        TokenizerError, match=r"tokenizer\.json: needs more than 1\.0 MiB of memory to be loaded and tr"
    ):
        Tokenizer.from_folder(folder)


def test_known_tokenizers_start_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_trial.CHILD, "command", ("/no such command",))
    tokenizer_trial.CHILD.end()
    known = Tokenizer.from_folder(TINY)
    ids = known._control.get_vocab(with_added_tokens=True).values()
    assert max(ids) == known.vocab_size - 1  # which is taken for granted
    if LLAMA4_TOKENIZER.is_dir():
        assert is_known_tokenizer((LLAMA4_TOKENIZER / "tokenizer.json").read_bytes())
    assert len(TOKENIZERS) == 2
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: the process that tries it cannot be started: No such"):
        loaded(tmp_path, {})


def test_a_text_that_grows_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = loaded(tmp_path, {"normalizer": replace("a", "a" * 50)})
    assert tokenizer.encode_data("abc") == tokenizer.encode_data("abc")
    assert tokenizer.decode(tokenizer.encode_data("abc").ids) == "a" * 50 + "bc"
    for encode in (lambda text: tokenizer.encode_data(text, user="it"), tokenizer.encode_control):
        with pytest.raises(TokenizerError, match="would be more than 16 times as long after the tokenizer's normal"):
            encode("a" * 100_000)
    assert len(tokenizer.encode_data("bc" * 50_000).ids) > 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("token_id", "embeddings"), [(2**32 - 1, None), (2**32 - 1, 600), (2**31, 600), (100_000, 600)]
)
def test_ids_beyond_the_embeddings_are_refused(tmp_path: Path, token_id: int, embeddings: int | None) -> None:
    """However few tokens there are."""

    def change(content: dict[str, Any]) -> None:
        content["model"]["vocab"]["Z"] = token_id

    tokenizer = Tokenizer.from_folder(toy_tokenizer_folder(tmp_path, change=change), embeddings)
    assert tokenizer.encode_data("words") and tokenizer.encode_control("words")
    for encode in (tokenizer.encode_data, tokenizer.encode_control):
        with pytest.raises(TokenizerError, match=rf"the token 'Z' \(id {token_id}\), but the model has"):
            encode("Z")


def test_a_panic_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = loaded(tmp_path, BACKTRACKING)
    for encode in (tokenizer.encode_data, tokenizer.encode_control):
        with pytest.raises(TokenizerError, match=r"cannot be encoded: Onig: Regex search error: retry-limit"):
            encode("a" * 40 + "b")
        assert encode("words")
    assert capfd.readouterr() == ("", "")


def test_ordinary_parts_are_read(tmp_path: Path) -> None:
    metaspace = json.loads(pre_tokenizers.Metaspace().__getstate__())
    prepend, spaces = {"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")
    for number, parts in enumerate(
        (
            {"normalizer": sequence("normalizers", prepend, spaces), "pre_tokenizer": None},
            {"normalizer": {"type": "NFKC"}},
            {"normalizer": sequence("normalizers", {"type": "NFC"}, replace(" {2,}", "▁", "Regex"))},
            {"pre_tokenizer": metaspace, "decoder": json.loads(decoders.Metaspace().__getstate__())},
            {"pre_tokenizer": sequence("pretokenizers", split(r"\d"), {"type": "Digits", "individual_digits": True})},
        )
    ):
        folder = folder_with(tmp_path / str(number), parts)
        oracle = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        text = "Some words,  and 48213 more ﬁ."
        assert Tokenizer.from_folder(folder).encode_data(text).ids.tolist() == oracle.encode(text).ids


def state(part: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(part.__getstate__())
    return found


def texts() -> list[str]:
    draw = random.Random(7)
    points = [*range(0x20, 0x3000, 5), *(draw.randrange(0x3000, 0x110000) for _ in range(999)), 0xFDFA, 0x3300, 0x130]
    characters = [chr(point) for point in points if not 0xD800 <= point < 0xE000]
    return [*characters, *("".join(draw.choices(characters, k=50)) for _ in range(200))]


def test_no_part_makes_more_of_a_text_than_its_bound() -> None:
    """Every one of the library's that takes no text of the file's own, and those that do with some."""
    found = [
        *(getattr(normalizers, name)() for name in ("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "ByteLevel")),
        normalizers.BertNormalizer(strip_accents=True),
        normalizers.Strip(),
        normalizers.StripAccents(),
        normalizers.Prepend("xyz"),
        normalizers.Replace("a", "xyzé"),
        normalizers.Replace(tokenizers.Regex("b*"), "12"),
        normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "▁"), normalizers.Prepend("▁")]),
    ]
    for text in texts():
        for normalizer in found:
            made = len(normalizer.normalize_str(text).encode())
            assert made <= normalized_growth(state(normalizer)) * len(text.encode()), (normalizer, text)
    splits = [pre_tokenizers.ByteLevel(), pre_tokenizers.Metaspace(), pre_tokenizers.BertPreTokenizer()]
    splits += [pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.Metaspace()])]
    for text in texts()[-1200:]:
        for pre_tokenizer in splits:
            made = sum(len(word.encode()) for word, _ in pre_tokenizer.pre_tokenize_str(text))
            assert made <= split_growth(state(pre_tokenizer)) * len(text.encode()), (pre_tokenizer, text)
    for decoder in (decoders.ByteLevel(), decoders.WordPiece(), decoders.Metaspace(), decoders.CTC(), decoders.Fuse()):
        made = len(decoder.decode(["a", "é", "Ġ", "▁x"] * 50).encode())
        assert made <= decoded_growth(state(decoder)) * len("aéĠ▁x".encode()) * 50, decoder


def test_every_part_of_the_library_has_a_bound() -> None:
    """A later release that adds one fails here."""
    needing: dict[str, Any] = {
        "Prepend": normalizers.Prepend("x"),
        "Replace": normalizers.Replace("x", "y"),
        "Precompiled": None,
        "Sequence": None,
        "PyNormalizer": None,
        "CharDelimiterSplit": pre_tokenizers.CharDelimiterSplit("x"),
        "Split": pre_tokenizers.Split("x", "isolated"),
    }
    for module, base, growth in (
        (normalizers, "Normalizer", normalized_growth),
        (pre_tokenizers, "PreTokenizer", split_growth),
        (decoders, "Decoder", decoded_growth),
    ):
        for name, kind in vars(module).items():
            if (
                isinstance(kind, type)
                and issubclass(kind, getattr(module, base))
                and name not in (base, "DecodeStream")
            ):
                if module is decoders and name == "Replace":
                    part = decoders.Replace("x", "y")
                else:
                    part = needing[name] if name in needing else kind()
                assert part is None or growth(state(part)) < 20, name
    assert normalized_growth({"type": "Unheard"}) == split_growth({"type": "Unheard"}) == float("inf")
    assert normalized_growth({"type": "Precompiled", "precompiled_charsmap": "AAAAAGFiYwBk"}) == 3
    assert normalized_growth({"type": "Precompiled", "precompiled_charsmap": "?"}) == float("inf")


def test_calls_aside_return_and_raise() -> None:
    aside = Aside()
    assert [aside(lambda n=n: n + 1) for n in range(3)] == [1, 2, 3]
    with pytest.raises(ZeroDivisionError):
        aside(lambda: 1 // 0)
    assert aside(lambda: "still there") == "still there"


def test_quiet_gives_standard_error_back(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet():
        os.write(2, b"lost")
    os.write(2, b"kept")
    assert capfd.readouterr().err == "kept"


def test_an_interruption_comes_through(tmp_path: Path) -> None:
    """While the library is busy for minutes."""
    folder = folder_with(tmp_path, SLOW)
    code = (
        "from l4ctx.cli.exits import errors_as_exit_codes\nfrom l4ctx.checkpoint.tokenizer import Tokenizer\n"
        f"with errors_as_exit_codes():\n    tokenizer = Tokenizer.from_folder({str(folder)!r})\n"
        "    print('loaded', flush=True)\n    tokenizer.encode_data('a' * 400_000)\n    print('encoded')"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"loaded\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - began < 20 and stdout == b"", (stdout, stderr)
    assert stderr.decode().startswith("l4ctx: interrupted") and stderr.count(b"\n") == 1
