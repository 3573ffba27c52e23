"""Weights in GGUF's blocks: each holds 32 or 256 weights of a row, as small integers and their scales.

How a type is laid out is in `gguf_simple` (blocks of 32) and `gguf_k` (of 256); other types go through the package
gguf, by `gguf_library`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.quantization import gguf_k, gguf_library, gguf_simple
from model.quantization.form import StoredMatrix
from model.quantization.gguf_types import BY_NAME, NATIVE, BlockType
from model.quantization.pieces import through_float32
from model.simd.layouts import Blocks
from model.simd.products import Operand

Expand = Callable[[Tensor, Tensor], None]
"""Writes the weights of blocks (n, bytes), uint8, to float32 (n, weights)."""

EXPANDED_BY: Mapping[str, Expand] = {
    "Q4_0": gguf_simple.expand_q4_0,
    "Q4_1": gguf_simple.expand_q4_1,
    "Q5_0": gguf_simple.expand_q5_0,
    "Q5_1": gguf_simple.expand_q5_1,
    "Q8_0": gguf_simple.expand_q8_0,
    "IQ4_NL": gguf_simple.expand_iq4_nl,
    "MXFP4": gguf_simple.expand_mxfp4,
    "Q2_K": gguf_k.expand_q2_k,
    "Q3_K": gguf_k.expand_q3_k,
    "Q4_K": gguf_k.expand_q4_k,
    "Q5_K": gguf_k.expand_q5_k,
    "Q6_K": gguf_k.expand_q6_k,
    "IQ4_XS": gguf_k.expand_iq4_xs,
}
assert EXPANDED_BY.keys() == {kind.name for kind in NATIVE}


@dataclass(frozen=True)
class GgufScheme:
    """One of GGUF's block types, by name. Its tensor is `blocks`: uint8 (C_out, bytes of a row)."""

    type_name: str

    @property
    def label(self) -> str:
        return self.type_name

    def build(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> GgufMatrix:
        """Raises CheckpointError for a type that needs the package gguf, where that is not installed."""
        return GgufMatrix(tensors["blocks"], BY_NAME[self.type_name], shape)


class GgufMatrix(StoredMatrix):
    """A matrix (C_out, C_in) in blocks of one type: uint8 (C_out, bytes of a row)."""

    blocks: Tensor

    def __init__(self, blocks: Tensor, kind: BlockType, shape: tuple[int, ...]) -> None:
        out_features, in_features = shape
        assert blocks.dtype == torch.uint8
        assert blocks.shape == (out_features, kind.row_bytes(in_features)), (kind, blocks.shape, shape)
        super().__init__(out_features, in_features)
        self.register_buffer("blocks", blocks, persistent=False)
        self.kind = kind
        self.expand_blocks = EXPANDED_BY.get(kind.name) or gguf_library.expansion(kind.name)

    def operand(self) -> Operand | None:
        return Operand(Blocks(self.kind.name), (self.blocks,), self.shape) if self.kind in NATIVE else None

    def expand(self, rows: slice | Tensor, out: Tensor) -> None:
        stored = self.blocks[rows]

        def fill(here: slice, into: Tensor) -> None:
            blocks = aligned(stored[here].reshape(-1, self.kind.block_bytes))
            self.expand_blocks(blocks, into.view(-1, self.kind.block_weights))

        through_float32(out, fill)


def aligned(blocks: Tensor) -> Tensor:
    """The same bytes at an even offset, where float16 numbers in them can be viewed; nearly always they are there."""
    return blocks.clone() if blocks.storage_offset() % 2 else blocks
