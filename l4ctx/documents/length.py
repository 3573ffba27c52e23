"""Refuses text that is surely longer than the model's positions by its size, before it is read whole and tokenized.

No token stands for more bytes than the vocabulary's longest one: so many bytes of text are at least so many tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from l4ctx.documents.document import DocumentLengthError
from l4ctx.formatting import human_bytes

_CHUNK_BYTES = 1 << 22
_SURELY_SHORTER = 16  # bytes of a longest token: less text than that for each position needs no look at the vocabulary


@dataclass
class TextLimit:
    """How much text the model has positions for, and how much of it is taken.

    `longest_token` tells the most bytes of UTF-8 that a token stands for; None: that has no bound.
    """

    positions: int
    longest_token: Callable[[], int | None]
    taken: int = 0  # characters, which are no more than bytes

    def check(self, size: int, chunks: Callable[[], Iterable[bytes]], *, keep_payload: bool) -> None:
        """Raises DocumentLengthError for a text of `size` bytes that cannot fit beside what was taken.

        `chunks` gives its bytes: they are looked through only where its size alone would be too much.
        """
        if size + self.taken <= self.positions * _SURELY_SHORTER:
            return
        longest = self.longest_token()
        if longest is None or size + self.taken <= self.positions * longest:
            return
        least = -(-(least_bytes(chunks(), keep_payload=keep_payload) + self.taken) // longest)
        if least > self.positions:
            before = " with the documents before it" if self.taken else ""
            raise DocumentLengthError(
                f"{human_bytes(size)} of text{before} are at least {least:,} tokens, none of which has over {longest} "
                f"bytes, but the model has {self.positions:,} positions (max_position_embeddings); split it, or leave "
                "it out"
            )


def chunks_of(path: str) -> Iterator[bytes]:
    """The content of a file, in pieces. Raises OSError."""
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def least_bytes(chunks: Iterable[bytes], *, keep_payload: bool) -> int:
    """The least that a text of these bytes has in UTF-8; 0 where it may be next to nothing.

    So it is with what `l4ctx.documents.payload` leaves out, and in encodings of escape sequences. No other one that is
    read takes more than two bytes for each of UTF-8, but for UTF-32.
    """
    size, end, divisor, may_be_notebook = 0, b"", 1, False
    for chunk in chunks:
        if size == 0:
            if b"\0" in chunk[:8192]:  # UTF-16 or UTF-32
                return 0
            may_be_notebook = chunk.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"")
        if b"\x1b" in chunk:
            return 0
        seen = end + chunk
        if not keep_payload and (
            (b"64," in seen and b";base64," in seen.lower()) or (may_be_notebook and b'"nbformat"' in seen)
        ):
            return 0
        size += len(chunk)
        divisor = divisor if chunk.isascii() else 2
        end = chunk[-16:]
    return size // divisor
