"""The block types of GGUF files: how many bytes store how many weights. What the bytes mean is in other modules.

Numbers and sizes are those of `enum ggml_type` and the block structs in ggml. Imports no torch.
"""

from __future__ import annotations

from typing import NamedTuple


class BlockType(NamedTuple):
    """A type of tensor in a GGUF file. Rows are whole numbers of blocks."""

    name: str
    number: int  # in a file's list of tensors
    block_bytes: int
    block_weights: int

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of so many weights, which must be a multiple of `block_weights`."""
        assert width % self.block_weights == 0, (self.name, width)
        return width // self.block_weights * self.block_bytes


PLAIN = (BlockType("F32", 0, 4, 1), BlockType("F16", 1, 2, 1), BlockType("BF16", 30, 2, 1))
"""One number a weight, in a dtype of torch."""

NATIVE = (
    BlockType("Q4_0", 2, 18, 32),
    BlockType("Q4_1", 3, 20, 32),
    BlockType("Q5_0", 6, 22, 32),
    BlockType("Q5_1", 7, 24, 32),
    BlockType("Q8_0", 8, 34, 32),
    BlockType("Q2_K", 10, 84, 256),
    BlockType("Q3_K", 11, 110, 256),
    BlockType("Q4_K", 12, 144, 256),
    BlockType("Q5_K", 13, 176, 256),
    BlockType("Q6_K", 14, 210, 256),
    BlockType("IQ4_NL", 20, 18, 32),
    BlockType("IQ4_XS", 23, 136, 256),
    BlockType("MXFP4", 39, 17, 32),
)
"""Blocks that are expanded here."""

BY_LIBRARY = (
    BlockType("IQ2_XXS", 16, 66, 256),
    BlockType("IQ2_XS", 17, 74, 256),
    BlockType("IQ3_XXS", 18, 98, 256),
    BlockType("IQ1_S", 19, 50, 256),
    BlockType("IQ3_S", 21, 110, 256),
    BlockType("IQ2_S", 22, 82, 256),
    BlockType("IQ1_M", 29, 56, 256),
    BlockType("TQ1_0", 34, 54, 256),
    BlockType("TQ2_0", 35, 66, 256),
)
"""Blocks that the package gguf expands, slowly: their values come from tables of up to 2,048 vectors."""

BY_NAME = {kind.name: kind for kind in (*PLAIN, *NATIVE, *BY_LIBRARY)}
BY_NUMBER = {kind.number: kind for kind in BY_NAME.values()}
