"""What one run does with images: whether it reads them at all, and what it loads and needs for that.

Documents are read, prompts built and features computed elsewhere. Imports torch only once there are images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4ctx.errors import RequestError
from l4ctx.planning.workload import ImageWorkload
from l4ctx.vision.prompter import ImagePrompter, PlacedImage, count_image_tokens
from l4ctx.vision.tiles import tiling_bytes
from model.config import TextConfig
from model.costs import Operations
from model.errors import ConfigError
from model.gguf.files import find_gguf
from model.vision.config import VisionConfig, vision_operations, vision_parameter_count

if TYPE_CHECKING:
    import torch

    from l4ctx.checkpoint.tokenizer import Tokenizer
    from l4ctx.vision.features import ImageFeatures
    from model.weights.sources import WeightSource


class ImageUse:
    """`why_not` is None where images are read, else the reason that a user is told.

    A fault of the checkpoint's vision part is an error once there are images, and not before: text can be read.
    """

    def __init__(self, model: Path, config: TextConfig, *, no_images: bool | str, pdf: str) -> None:
        """Raises RequestError where pages of PDF files are asked for as images, and images are not read."""
        self._model, self._config = model, config
        self.why_not = no_images if isinstance(no_images, str) else "left out by --no-images" if no_images else None
        self._vision: VisionConfig | ConfigError | None = None
        if not no_images:
            try:
                self._vision = VisionConfig.from_folder(model)
            except ConfigError as error:
                self._vision = error
            if self._vision is None:
                is_gguf = find_gguf(model) is not None
                self.why_not = f"the checkpoint reads text alone{' (its mmproj file is not beside it)' * is_gguf}"
        if pdf != "text" and self.why_not is not None:
            raise RequestError(
                f"--pdf {pdf}: pages cannot be read as images: {self.why_not}; --pdf text reads their text"
            )

    def sources(self) -> dict[str, WeightSource]:
        """Of the vision tower's weights, all checked by the shards' headers. Raises CheckpointError and ConfigError."""
        from model.weights.loading import checked_vision_sources

        return checked_vision_sources(self._model, self._usable_vision(), self._config.hidden_size)

    def prepare(
        self, tokenizer: Tokenizer, stored: Mapping[str, WeightSource] | None, *, with_digests: bool = False
    ) -> ImageReading:
        """What it takes to read images. `stored`: as `sources` gives it, or None where there are no shards.

        `with_digests`: what images' features follow from is to be known, for a saved context. Raises ConfigError,
        ImageProcessingError, TokenizerError and CheckpointError.
        """
        from l4ctx.checkpoint.fingerprint import vision_fingerprint
        from l4ctx.checkpoint.image_processor import ImageProcessing
        from l4ctx.vision.tokens import ImageTokens
        from model.weights.loading import stored_tensors

        vision = self._usable_vision()
        processing = ImageProcessing.from_folder(self._model, vision.image_size)
        tokens = ImageTokens.from_tokenizer(tokenizer, vision.tokens_per_tile, vision.image_token_index)
        tensors = stored_tensors(stored) if with_digests and stored else {}
        provenance = vision_fingerprint(vision, processing, tensors) if tensors else ""
        return ImageReading(self._model, self._config, vision, ImagePrompter(processing, tokens, provenance), stored)

    def _usable_vision(self) -> VisionConfig:
        if isinstance(self._vision, ConfigError):
            raise ConfigError(f"{self._vision}; --no-images reads the text alone")
        assert self._vision is not None, self.why_not
        return self._vision


@dataclass(frozen=True)
class ImageReading:
    """A run that reads images."""

    model: Path
    config: TextConfig
    vision: VisionConfig
    prompter: ImagePrompter
    stored: Mapping[str, WeightSource] | None

    def workload(self, images: Sequence[PlacedImage]) -> ImageWorkload | None:
        """For a memory plan; None where there are no images."""
        if not images:
            return None
        largest = max(images, key=self._pixel_bytes)
        stored = self.stored
        if stored is None:
            parameters, dtype = vision_parameter_count(self.vision, self.config.hidden_size), None
        else:
            parameters = sum(source.parameters for source in stored.values())
            dtypes = {source.scheme.label for source in stored.values()}
            dtype = dtypes.pop() if len(dtypes) == 1 else None
        return ImageWorkload(
            self.vision,
            parameters,
            dtype,
            sum(placed.span.stop - placed.span.start for placed in images),
            self._pixel_bytes(largest),
            largest.image.source,
        )

    def with_images(self, operations: Operations, images: Sequence[PlacedImage], start: int, stop: int) -> Operations:
        """Those of the text model for positions start .. stop - 1, and those of the tower for the images there."""
        a_tile = vision_operations(self.vision, self.config.hidden_size, 1)
        tower = a_tile * count_image_tokens(images, start, stop) // self.vision.tokens_per_tile
        return replace(operations, linear=operations.linear + tower)

    def load(
        self, images: Sequence[PlacedImage], *, dtype: torch.dtype, device: torch.device, is_mapped: bool
    ) -> ImageFeatures:
        """The features of the prompt's images. Raises CheckpointError."""
        from l4ctx.vision.features import ImageFeatures
        from model.weights.loading import load_vision

        options: dict[str, Any] = {"dtype": dtype, "device": device, "is_mapped": is_mapped}
        return ImageFeatures(
            load_vision(self.model, self.vision, self.config.hidden_size, **options), self.prompter, images
        )

    def _pixel_bytes(self, placed: PlacedImage) -> int:
        return placed.image.memory + tiling_bytes(placed.layout, self.prompter.processing)
