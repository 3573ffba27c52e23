"""Images in the prompt: their tokens, their positions, and a digest of everything that determines their features."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from l4ctx.checkpoint.image_processor import ImageProcessing
from l4ctx.documents.images import DocumentImage
from l4ctx.spans import ImageSpan
from l4ctx.vision.tiles import TileLayout, tile_layout

if TYPE_CHECKING:
    from l4ctx.vision.tokens import ImageTokens


@dataclass(frozen=True)
class PlacedImage:
    """An image of the prompt."""

    image: DocumentImage
    layout: TileLayout
    span: ImageSpan

    def moved(self, by: int) -> PlacedImage:
        """The same image, shifted by `by` positions."""
        return replace(self, span=self.span._replace(start=self.span.start + by, stop=self.span.stop + by))


@dataclass(frozen=True)
class ImagePrompter:
    """Puts images into prompts; `provenance` is a digest of preprocessing and vision tower, in hex."""

    processing: ImageProcessing
    tokens: ImageTokens
    provenance: str

    def encode(self, image: DocumentImage, into: array[int]) -> PlacedImage:
        """Appends the tokens that stand for `image`."""
        layout = tile_layout(image.width, image.height, self.processing)
        start = len(into)
        into.extend(self.tokens.ids(layout))
        digest = hashlib.sha256(f"{self.provenance} {image.sha256}".encode("ascii")).hexdigest()
        return PlacedImage(image, layout, ImageSpan(start, len(into), digest))


def count_image_tokens(images: Sequence[PlacedImage], start: int, stop: int) -> int:
    """How many of the positions start .. stop - 1 belong to images."""
    return sum(max(0, min(stop, placed.span.stop) - max(start, placed.span.start)) for placed in images)
