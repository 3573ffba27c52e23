"""The token sequence for an image: start and end, tile separators, and a placeholder for every feature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from l4ctx.vision.tiles import TileLayout

if TYPE_CHECKING:
    from l4ctx.checkpoint.tokenizer import Tokenizer


@dataclass(frozen=True)
class ImageTokens:
    """Token ids by name (`<|image_start|>`, …), and how many `<|patch|>` stand for a tile (Llama 4: 144).

    The sequence is that of Meta's reference (meta-llama/llama-models, models/llama4/chat_format.py) and of
    transformers' `Llama4Processor`.
    """

    image_start: int
    image_end: int
    tile_x_separator: int
    tile_y_separator: int
    image: int
    patch: int
    tokens_per_tile: int

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, tokens_per_tile: int, patch_id: int) -> ImageTokens:
        """Looks the ids up in the tokenizer; `patch_id` is the configuration's `image_token_index`.

        Raises TokenizerError if a token is missing, if `<|patch|>` is not the token that the model replaces, or if the
        model has no embedding for a token.
        """
        from l4ctx.checkpoint.tokenizer import TokenizerError

        names = ("image_start", "image_end", "tile_x_separator", "tile_y_separator", "image", "patch")
        ids: dict[str, int] = {}
        for name in names:
            token_id = tokenizer.special_id(f"<|{name}|>")
            if token_id is None:
                raise TokenizerError(f"the tokenizer has no token <|{name}|>: images cannot be put into the prompt")
            ids[name] = token_id
        if ids["patch"] != patch_id:
            raise TokenizerError(
                f"<|patch|> is token {ids['patch']} of the tokenizer, but image_token_index of "
                f"config.json is {patch_id}"
            )
        tokenizer.check_ids(ids.values(), "every image")
        return cls(**ids, tokens_per_tile=tokens_per_tile)

    def ids(self, layout: TileLayout) -> list[int]:
        """All tokens of one image: its tiles in row-major order, then the whole image as the last tile."""
        patches = [self.patch] * self.tokens_per_tile
        found = [self.image_start]
        if layout.tiles > 1:
            row = [*([*patches, self.tile_x_separator] * layout.columns)[:-1], self.tile_y_separator]
            found += row * layout.rows
        return [*found, self.image, *patches, self.image_end]

    def count(self, layout: TileLayout) -> int:
        """The length of `ids(layout)`: every tile of the canvas is followed by one separator."""
        canvas = layout.rows * layout.columns if layout.tiles > 1 else 0
        return canvas * (self.tokens_per_tile + 1) + self.tokens_per_tile + 3

    def tile_starts(self, layout: TileLayout) -> list[int]:
        """Index in `ids(layout)` of each tile's first `<|patch|>`, in the order of `image_tiles`."""
        return [1 + tile * (self.tokens_per_tile + 1) for tile in range(layout.tiles - 1)] + [
            self.count(layout) - 1 - self.tokens_per_tile
        ]
