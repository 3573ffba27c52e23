"""Which tokens stand for an image: marks, separators between tiles, and a placeholder for every position.

What the tiles show is left to `l4ctx.vision.tiles`, where an image stands in the prompt to others.
"""

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
        """The tokenizer's ids; `patch_id` is the configuration's `image_token_index`.

        Raises TokenizerError where a token is missing, `<|patch|>` is not the one that the model replaces, or the
        model has no embedding for one.
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
        """All tokens of one image: its tiles row by row, then the one that is always there."""
        patches = [self.patch] * self.tokens_per_tile
        found = [self.image_start]
        if layout.tiles > 1:
            row = [*([*patches, self.tile_x_separator] * layout.columns)[:-1], self.tile_y_separator]
            found += row * layout.rows
        return [*found, self.image, *patches, self.image_end]

    def count(self, layout: TileLayout) -> int:
        """The length of `ids(layout)`: every tile of the canvas has one separator after it, of either kind."""
        canvas = layout.rows * layout.columns if layout.tiles > 1 else 0
        return canvas * (self.tokens_per_tile + 1) + self.tokens_per_tile + 3

    def tile_starts(self, layout: TileLayout) -> list[int]:
        """Where in `ids(layout)` the first `<|patch|>` of each tile is, in the order of `image_tiles`."""
        return [1 + tile * (self.tokens_per_tile + 1) for tile in range(layout.tiles - 1)] + [
            self.count(layout) - 1 - self.tokens_per_tile
        ]
