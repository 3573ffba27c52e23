"""Image features, computed lazily when the prefill reaches an image, and spliced into the prompt's embeddings.

Only one image's pixels and the features of a few tiles are in memory at a time, however many images there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from l4ctx.documents.images import ImageError
from l4ctx.vision.prompter import ImagePrompter, PlacedImage
from l4ctx.vision.tiles import image_tiles, normalized
from model.vision.config import TILES_AT_A_TIME
from model.vision.tower import VisionTower


class ImageFeatures:
    """The features of `images`, in the order of their positions."""

    def __init__(self, tower: VisionTower, prompter: ImagePrompter, images: Sequence[PlacedImage]) -> None:
        self.tower, self._prompter, self._images = tower, prompter, images
        self._tiles: tuple[PlacedImage, Tensor] | None = None  # pixels of the image used last
        self._group: tuple[PlacedImage, int, Tensor] | None = None  # image, first tile and features of the last group

    @property
    def weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.tower.parameters())

    def among(self, positions: range) -> list[PlacedImage]:
        """The images that have tokens at these absolute positions."""
        return [
            placed
            for placed in self._images
            if placed.span.start < positions.stop and placed.span.stop > positions.start
        ]

    @torch.inference_mode()
    def splice(self, embeddings: Tensor, ids: Tensor, positions: range) -> None:
        """Replaces, in place, the embeddings (1, T, C) of the patch tokens among `ids` (1, T), in host memory, at
        `positions`.

        Raises ImageError for an image that can no longer be decoded, or whose number of patch tokens is not its number
        of features.
        """
        for placed in self.among(positions):
            self._splice_one(placed, embeddings[0], ids[0], positions)
            if placed.span.stop <= positions.stop:
                self._tiles = self._group = None

    def _splice_one(self, placed: PlacedImage, embeddings: Tensor, ids: Tensor, positions: range) -> None:
        size, spliced = self._prompter.tokens.tokens_per_tile, 0
        for tile, offset in enumerate(self._prompter.tokens.tile_starts(placed.layout)):
            first = placed.span.start + offset
            start, stop = max(first, positions.start), min(first + size, positions.stop)
            if start < stop:
                features = self._features(placed, tile)[start - first : stop - first]
                embeddings[start - positions.start : stop - positions.start] = features
                spliced += stop - start
        here = ids[max(0, placed.span.start - positions.start) : placed.span.stop - positions.start]
        patches = int((here == self._prompter.tokens.patch).sum())
        if patches != spliced:
            raise ImageError(f"{placed.image.source}: {spliced} features for {patches} patch tokens")

    def _features(self, placed: PlacedImage, tile: int) -> Tensor:
        """The features of one tile, (tokens_per_tile, C)."""
        first = tile // TILES_AT_A_TIME * TILES_AT_A_TIME  # fixed groups, so that equal steps give equal bits
        if self._group is None or self._group[0] is not placed or self._group[1] != first:
            pixels = self._pixels(placed)[first : first + TILES_AT_A_TIME]
            self._group = (placed, first, self.tower(normalized(pixels, self._prompter.processing, self.tower.dtype)))
        return self._group[2][tile - first]

    def _pixels(self, placed: PlacedImage) -> Tensor:
        """All tiles of an image, (tiles, 3, size, size) uint8."""
        if self._tiles is None or self._tiles[0] is not placed:
            self._tiles = (placed, image_tiles(placed.image.decode(), self._prompter.processing))
            if len(self._tiles[1]) != placed.layout.tiles:
                raise ImageError(f"{placed.image.source}: {len(self._tiles[1])} tiles instead of {placed.layout.tiles}")
        return self._tiles[1]
