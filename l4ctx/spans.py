"""Where documents and images lie in a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Span:
    """Where one document, its wrapping included, lies in the prompt: token positions `start` to before `stop`."""

    source: str
    start: int
    stop: int
    sha256: str = ""  # of the document's bytes, in hex


class ImageSpan(NamedTuple):
    """Positions `start` to before `stop` of a prompt are an image's tokens.

    `sha256` is the digest, in hex, of all that its features follow from: pixels, preprocessing and the vision tower.
    """

    start: int
    stop: int
    sha256: str


def same_until(mine: Sequence[ImageSpan], saved: Sequence[ImageSpan]) -> int | None:
    """The position of the first image that one of two prompts has and the other has not; None where there is none."""
    return min((span.start for span in {*mine} ^ {*saved}), default=None)
