"""What one run does with images: whether it reads them at all, and what it loads and needs for that.

Documents are read, prompts built and features computed elsewhere. Imports torch only once there are images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4ctx.image_prompt import count_image_tokens
from l4ctx.images import decoding_bytes
from l4ctx.request import RequestError
from model.config import ConfigError, TextConfig
from model.vision_config import VisionConfig, vision_activation_bytes, vision_operations

if TYPE_CHECKING:
    import torch

    from l4ctx.image_features import ImageFeatures
    from l4ctx.image_prompt import ImagePrompter, PlacedImage
    from l4ctx.tokenizer import Tokenizer


class ImageUse:
    """`why_not` is None where images are read, else the reason that a user is told."""

    def __init__(self, model: Path, config: TextConfig, *, no_images: bool, pdf: str) -> None:
        """Raises RequestError where pages of PDF files are asked for as images, and cannot be read."""
        self._model, self._config = model, config
        self._encoder: ImagePrompter | None = None
        self.vision: VisionConfig | None = None
        self.why_not: str | None = None
        self.parameters = 0  # of the vision tower, once it is needed
        if no_images:
            self.why_not = "left out by --no-images"
        else:
            try:
                self.vision = VisionConfig.from_folder(model)
            except ConfigError as error:
                self.why_not = f"the checkpoint's vision part cannot be used ({error})"
            else:
                self.why_not = "the checkpoint reads text alone" if self.vision is None else None
        if pdf != "text" and self.why_not is not None:
            raise RequestError(f"--pdf {pdf}: pages cannot be read as images: {self.why_not}; --pdf text reads "
                               "their text")

    def encoder(self, tokenizer: Tokenizer) -> ImagePrompter:
        """To be called where documents have images: checks all that reading them takes.

        Raises CheckpointError, ImageProcessingError and TokenizerError.
        """
        from l4ctx.fingerprint import vision_fingerprint
        from l4ctx.image_prompt import ImagePrompter
        from l4ctx.image_tiles import ImageProcessing
        from l4ctx.image_tokens import ImageTokens
        from model.checkpoint import checked_vision_tensors

        assert self.vision is not None
        stored = checked_vision_tensors(self._model, self.vision, self._config.hidden_size)
        self.parameters = sum(math.prod(tensor.shape) for tensor in stored.values())
        processing = ImageProcessing.from_folder(self._model, self.vision.image_size)
        tokens = ImageTokens.from_tokenizer(tokenizer, self.vision.tokens_per_tile, self.vision.image_token_index)
        self._encoder = ImagePrompter(processing, tokens, vision_fingerprint(self.vision, processing, stored))
        return self._encoder

    def tower_bytes(self, itemsize: int) -> int:
        """What the vision tower holds besides its weights; 0 where there are no images."""
        if self._encoder is None or self.vision is None:
            return 0
        from l4ctx.image_features import TILES_AT_A_TIME

        return vision_activation_bytes(self.vision, TILES_AT_A_TIME, itemsize)

    def pixel_bytes(self, images: Sequence[PlacedImage]) -> int:
        """What decoding the largest image, and cutting it into tiles, holds in host memory."""
        if self._encoder is None or not images:
            return 0
        tile = 3 * self._encoder.processing.size**2
        return max(decoding_bytes(placed.image.width, placed.image.height) + 2 * tile * placed.layout.tiles
                   for placed in images)

    def operations(self, images: Sequence[PlacedImage], start: int, stop: int) -> int:
        """Of the vision tower, for what of the images lies at positions start .. stop - 1."""
        if self.vision is None:
            return 0
        a_tile = vision_operations(self.vision, self._config.hidden_size, 1)
        return a_tile * count_image_tokens(images, start, stop) // self.vision.tokens_per_tile

    def load(self, images: Sequence[PlacedImage], *, dtype: torch.dtype, device: torch.device,
             is_mapped: bool) -> ImageFeatures | None:
        """The features of the prompt's images; None where it has none. Raises CheckpointError."""
        if self._encoder is None or self.vision is None or not images:
            return None
        from l4ctx.image_features import ImageFeatures
        from model.checkpoint import load_vision

        options: dict[str, Any] = {"dtype": dtype, "device": device, "is_mapped": is_mapped}
        tower = load_vision(self._model, self.vision, self._config.hidden_size, **options)
        return ImageFeatures(tower, self._encoder, images)
