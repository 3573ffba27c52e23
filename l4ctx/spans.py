"""Positions of documents and images in a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Span:
    """Positions `start` .. `stop` - 1 of the prompt are one document, including the tags around it."""

    source: str
    start: int
    stop: int
    sha256: str = ""  # of the document's bytes, in hex
    reading: str = ""  # how these were read, if not as usual
    first_line: int = 1  # of its file, where the document is only some lines of that


class ImageSpan(NamedTuple):
    """Positions `start` .. `stop` - 1 of a prompt are an image's tokens.

    `sha256` is a digest, in hex, of everything that determines its features: pixels, preprocessing and vision tower.
    """

    start: int
    stop: int
    sha256: str


def same_until(mine: Sequence[ImageSpan], saved: Sequence[ImageSpan]) -> int | None:
    """Position of the first image that is in only one of two prompts; None if they have the same images."""
    return min((span.start for span in {*mine} ^ {*saved}), default=None)
