"""Text that is surely too long for the model is refused by its size; what may shrink when it is read is not."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from l4ctx.checkpoint.tokenizer import Tokenizer
from l4ctx.documents import content, reader
from l4ctx.documents.document import DocumentLengthError, DocumentMemoryError
from l4ctx.documents.length import TextLimit, least_bytes
from l4ctx.documents.reader import read_documents
from l4ctx.errors import TOO_LONG, exit_code_of
from l4ctx.prompt import builder
from l4ctx.prompt.builder import PromptLengthError, build_prompt
from support.cli_runner import TINY


def limit(positions: int = 1000, longest: int | None = 20) -> TextLimit:
    return TextLimit(positions, lambda: longest)


def test_a_line_of_two_gigabytes_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "line.txt"
    file.write_bytes(b"word " * 20_000)
    os.truncate(file, 1 << 31)  # sparse; zero bytes so late are text

    def chunks(path: str) -> Iterator[bytes]:
        """As long, and quick to make."""
        yield b"word" * (1 << 20)
        yield from [b"\0" * (1 << 22)] * 511

    monkeypatch.setattr(content, "chunks_of", chunks)
    with pytest.raises(DocumentLengthError) as raised:
        read_documents([file], stdin=None, limit=limit(10_485_760, 128))
    assert str(raised.value) == (
        f"{file}: 2.0 GiB of text are more than 10,485,760 tokens, which is all that the model has positions for "
        "(max_position_embeddings), as no token has over 128 bytes; split it, or leave it out"
    )
    assert exit_code_of(raised.value) == TOO_LONG


def test_what_fits_together_with_what_is_before_it_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    for name in "abc":
        (folder / name).write_bytes(name.encode() * 9_000)
    with pytest.raises(
        DocumentLengthError, match=r"^d/c: 8\.8 KiB of text with the documents before it are more than 1,000 tokens"
    ):
        read_documents([folder], stdin=None, limit=limit())
    (folder / "c").write_bytes(b"c" * 2_000)
    assert len(read_documents([folder], stdin=None, limit=limit()).documents) == 3
    assert len(read_documents([folder], stdin=None, limit=limit(longest=None)).documents) == 3


@pytest.mark.parametrize(
    "raw",
    [
        b"see data:image/png;base64," + b"iVBORw0K" * 9_000,
        b'{"cells": [], "x": "' + b"x" * 60_000 + b'", "nbformat": 4}',
        "\ufeffwords ".encode("utf-16") * 2_000,
        b"\x1b$B" * 20_000 + b"\x1b(B words",
    ],
    ids=["a data: URI", "a notebook", "UTF-16", "ISO-2022"],
)
def test_what_may_shrink_is_not_judged_by_its_size(raw: bytes) -> None:
    assert least_bytes([raw], 1 << 30, keep_payload=False) == 0
    assert least_bytes([raw[:30], raw[30:]], 1 << 30, keep_payload=False) == 0


@pytest.mark.parametrize("text", ["plain, 64, and so on ", "naïve ", "日本語の文章 ", "{ not a notebook }"])
@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
def test_the_least_is_no_more_than_what_is_decoded(text: str, encoding: str) -> None:
    raw = (text * 500).encode(encoding)
    least = least_bytes([raw[:100], raw[100:]], 1 << 30, keep_payload=False)
    assert len(raw) // 2 <= least <= len((text * 500).encode())


class Endless(io.RawIOBase):
    """A pipe into which `yes` writes; counts what was taken out of it."""

    taken = 0

    def read(self, size: int = -1) -> bytes:
        assert size > 0, "all of an endless pipe was asked for"
        self.taken += size
        return b"y\n" * (size // 2)


def test_a_pipe_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Endless()
    with pytest.raises(DocumentLengthError, match=r"^stdin: \d+\.\d MiB of text are more than 1,048,576 tokens"):
        read_documents(["-"], stdin=pipe, limit=limit(1 << 20))  # type: ignore[arg-type]
    assert pipe.taken < 1 << 26
    monkeypatch.setattr(content, "available_memory", lambda: 1 << 24)
    with pytest.raises(DocumentMemoryError, match=r"^stdin: \d+\.\d MiB so far, but 16\.0 MiB of memory is free"):
        read_documents(["-"], stdin=Endless())  # type: ignore[arg-type]
    assert reader  # the module whose pipe it is


def test_the_longest_token_bounds_every_text() -> None:
    tokenizer = Tokenizer.from_folder(TINY)
    longest = tokenizer.longest_token
    assert longest is not None and longest > 3
    for text in ("the amber falcon " * 50, " " * 700, "日本語" * 40, "====" * 99):
        assert len(tokenizer.encode_data(text).ids) * longest >= len(text.encode())


def test_tokenizing_ends_at_twice_the_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "QUICKLY_COUNTED", 0)
    tokenizer = Tokenizer.from_folder(TINY)
    told: list[int] = []
    documents = read_documents(["-"], stdin=io.BytesIO(b"some words of a text " * 100_000)).documents
    with pytest.raises(
        PromptLengthError, match=r"^the first [\d,]+ characters of stdin have [\d,]+ tokens, over twice"
    ) as raised:
        build_prompt(tokenizer, None, documents, "q", positions=5_000, progress=lambda _, tokens: told.append(tokens))
    assert "5,000 positions" in str(raised.value) and "leave out some of the largest documents: stdin (" in str(
        raised.value
    )
    assert max(told, default=0) <= 10_000
