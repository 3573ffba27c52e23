"""Codes of four bits that name entries of a table, with a scale for each block of the flattened matrix: NF4 and FP4.

This is the form of bitsandbytes (https://arxiv.org/abs/2305.14314): the high four bits of a byte come first, and the
scales themselves may be stored as codes of eight bits ("double quantization").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.quantization.form import StoredMatrix, Weight
from model.quantization.pieces import through_float32
from model.quantization.tables import look_up, pairs_by_byte


@dataclass(frozen=True)
class DoubleQuantization:
    """How the scales of blocks are stored: table[code] * scale + offset, in float32."""

    block_size: int  # scales that share a scale
    offset: float


class BlockScales(torch.nn.Module):
    """Scales in float32 by the number of their block; or, with double quantization, codes uint8 of such scales."""

    stored: Tensor
    table: Tensor | None
    outer: Tensor | None

    def __init__(
        self, stored: Tensor, nested: DoubleQuantization | None, table: Tensor | None, outer: Tensor | None
    ) -> None:
        super().__init__()
        self.nested = nested
        for name, tensor in (("stored", stored), ("table", table), ("outer", outer)):
            self.register_buffer(name, tensor, persistent=False)

    def of(self, blocks: Tensor) -> Tensor:
        """Block numbers (...) -> scales (...), float32."""
        scales = self.stored[blocks]
        if self.nested is None or self.table is None or self.outer is None:
            return scales
        return self.table[scales.int()].mul_(self.outer[blocks // self.nested.block_size]).add_(self.nested.offset)


class Table4Matrix(StoredMatrix):
    """Bytes (C_out * C_in / 2, rounded up), a table (16,) float32, and the scales of blocks of `block_size` weights."""

    codes: Tensor
    pairs: Tensor

    def __init__(
        self, shape: tuple[int, int], codes: Tensor, table: Tensor, scales: BlockScales, block_size: int
    ) -> None:
        super().__init__(*shape)
        self.block_size = block_size
        self.scales = scales
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("pairs", pairs_by_byte(table, is_high_first=True), persistent=False)

    def expand(self, rows: slice | Tensor, out: Tensor) -> None:
        numbers = torch.arange(rows.start, rows.stop, device=self.codes.device) if isinstance(rows, slice) else rows
        per_row, rest = divmod(self.in_features, self.block_size)
        if rest:  # rows share blocks, or even bytes
            through_float32(out, lambda here, into: self._fill_singly(numbers[here], into))
            return
        codes = self.codes.view(self.out_features, -1)[rows]
        blocks = numbers[:, None] * per_row + torch.arange(per_row, device=numbers.device)

        def fill(here: slice, into: Tensor) -> None:
            look_up(codes[here], self.pairs, into)
            into.unflatten(1, (per_row, -1)).mul_(self.scales.of(blocks[here]).unsqueeze(-1))

        through_float32(out, fill)

    def _fill_singly(self, rows: Tensor, out: Tensor) -> None:
        """Rows by number (n,) to `out` (n, C_in), for any width."""
        places = rows[:, None] * self.in_features + torch.arange(self.in_features, device=rows.device)
        pair = self.codes[places // 2].int()
        values = self.pairs.view(torch.float32).view(256, 2)[pair, places % 2]
        torch.mul(values, self.scales.of(places // self.block_size), out=out)


@dataclass(frozen=True)
class Table4:
    """Tensors by role, which may have a first axis of 1: weight, absmax, quant_map and perhaps nested ones; uint8 JSON.

    weight: bytes; absmax: a scale for each block, float32, or uint8 with double quantization; quant_map (16,);
    nested_absmax and nested_quant_map (256,), float32; quant_state is what this was read from.
    """

    kind: str  # nf4 or fp4
    block_size: int
    double: DoubleQuantization | None = None

    @property
    def label(self) -> str:
        doubly = ", double quantization" if self.double else ""
        return f"{self.kind.upper()} (blocks of {self.block_size}{doubly})"

    def build(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Weight:
        flat = {role: tensor.reshape(-1) for role, tensor in tensors.items()}
        scales = BlockScales(flat["absmax"], self.double, flat.get("nested_quant_map"), flat.get("nested_absmax"))
        c_out, c_in = shape
        return Table4Matrix((c_out, c_in), flat["weight"], flat["quant_map"], scales, self.block_size)
