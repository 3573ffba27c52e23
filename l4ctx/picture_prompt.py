"""Pictures in the prompt: as which tokens, where, and what their features will follow from.

Pixels and features are left to `l4ctx.picture_features`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from l4ctx.image_tiles import ImageProcessing, TileLayout, tile_layout
from l4ctx.pictures import Picture

if TYPE_CHECKING:
    from l4ctx.image_tokens import ImageTokens


class PictureSpan(NamedTuple):
    """Positions `start` to before `stop` of a prompt are a picture's tokens.

    `sha256` is the digest, in hex, of all that its features follow from: pixels, preprocessing and the vision tower.
    """

    start: int
    stop: int
    sha256: str


@dataclass(frozen=True)
class PlacedPicture:
    """A picture of the prompt."""

    picture: Picture
    layout: TileLayout
    span: PictureSpan


@dataclass(frozen=True)
class PictureEncoder:
    """Puts pictures into prompts; `made_with` is the digest of preprocessing and vision tower, in hex."""

    processing: ImageProcessing
    tokens: ImageTokens
    made_with: str

    def encode(self, picture: Picture, into: array[int]) -> PlacedPicture:
        """Appends the tokens that stand for `picture`."""
        layout = tile_layout(picture.width, picture.height, self.processing)
        start = len(into)
        into.extend(self.tokens.ids(layout))
        digest = hashlib.sha256(f"{self.made_with} {picture.sha256}".encode("ascii")).hexdigest()
        return PlacedPicture(picture, layout, PictureSpan(start, len(into), digest))


def same_until(mine: Sequence[PictureSpan], saved: Sequence[PictureSpan]) -> int | None:
    """The position of the first picture that one of two prompts has and the other has not; None where there is none."""
    return min((span.start for span in {*mine} ^ {*saved}), default=None)


def picture_tokens(pictures: Sequence[PlacedPicture], start: int, stop: int) -> int:
    """How many of the positions start .. stop - 1 are pictures'."""
    return sum(max(0, min(stop, placed.span.stop) - max(start, placed.span.start)) for placed in pictures)
