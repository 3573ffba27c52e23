"""Refuses text that is surely longer than the model's positions by its size, before it is read whole and tokenized.

No token stands for more bytes than the vocabulary's longest one: so many bytes of text are at least so many tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from l4ctx.documents.document import DocumentLengthError
from l4ctx.formatting import human_bytes

_CHUNK_BYTES = 1 << 18
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
        most = self.positions * longest
        if least_bytes(chunks(), most + 1 - self.taken, keep_payload=keep_payload) + self.taken > most:
            before = " with the documents before it" if self.taken else ""
            raise DocumentLengthError(
                f"{human_bytes(size)} of text{before} are more than {self.positions:,} tokens, which is all that the "
                f"model has positions for (max_position_embeddings), as no token has over {longest} bytes; split it, "
                "or leave it out"
            )


def chunks_of(path: str) -> Iterator[bytes]:
    """The content of a file, in pieces. Raises OSError."""
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def least_bytes(chunks: Iterable[bytes], enough: int, *, keep_payload: bool) -> int:
    """The least that a text of these bytes has in UTF-8, as soon as that is `enough`; 0 where it may be next to
    nothing.

    So it is with what `l4ctx.documents.payload` leaves out, and in encodings of escape sequences. No other one that is
    read takes more than two bytes for each of UTF-8, but for UTF-32.
    """
    least, end, may_be_notebook = 0, b"", False
    for chunk in chunks:
        if not end:
            if b"\0" in chunk[:8192]:  # UTF-16 or UTF-32
                return 0
            may_be_notebook = not keep_payload and chunk.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"")
        seam = end + chunk[:16]
        if b"\x1b" in chunk or (not keep_payload and (_has_payload(chunk) or _has_payload(seam))):
            return 0
        if may_be_notebook and (b'"nbformat"' in chunk or b'"nbformat"' in seam):
            return 0
        least += len(chunk) if chunk.isascii() else len(chunk) // 2
        if least >= enough and not may_be_notebook:  # that says so at its end
            break
        end = chunk[-16:]
    return least


def _has_payload(chunk: bytes) -> bool:
    return b"64," in chunk and b";base64," in chunk.lower()
