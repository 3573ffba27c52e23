"""A weight matrix that stays as it is stored and is expanded, part by part, into the dtype that products run in.

A product expands a tile of the matrix into a buffer, multiplies, and goes on with the next tile, so that nothing is
ever held twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from model.gpu.available import has_triton
from model.gpu.forms import Form
from model.simd import products
from model.simd.products import Operand

TILE_ELEMENTS = 2**21
"""Elements of a tile for few rows: 8 MiB in float32. The buffer is filled and read, so it should stay in a cache."""

MANY_ROWS, LARGE_TILE_ELEMENTS = 256, 2**23
"""From so many rows on, tiles are larger: the product library rearranges all rows anew for every tile, which costs more
than fetching the tile from memory. With 2**21, reading a prompt took 1.14 times as long."""

TURNED_ROWS = 32
"""Up to so many rows, the product library is up to 1.4 times as fast with the tile as its first operand, in float32."""

_buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}


class StoredMatrix(nn.Module):
    """A weight matrix (C_out, C_in) in its stored form. Its tensors are buffers, so that they count and move.

    Subclasses implement `expand`, and `operand` where vector code can read them.
    """

    is_transposed = False
    """Whether it is stored as (C_in, C_out), as published fused experts are."""

    replaced: ClassVar[int] = 0
    """How often buffers of any of them have been replaced."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self.in_features = in_features
        self._operand: Operand | None = None
        self._has_operand = False

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    def expand(self, rows: slice | Tensor, out: Tensor) -> None:
        """Writes the rows, a slice or their indices (n,), to `out` (n, C_in), which may be a transposed view.

        `out` is float32 or 16-bit; each value is the exact one rounded once to that dtype.
        """
        raise NotImplementedError

    def operand(self) -> Operand | None:
        """The matrix as vector code reads it; None: there is no such code for it."""
        return None

    def form(self) -> Form | None:
        """The matrix as kernels for GPUs read it; None: they cannot."""
        return None

    def product(self, x: Tensor) -> Tensor:
        """x (..., C_in) -> (..., C_out) in x's dtype."""
        rows = x.reshape(-1, self.in_features)
        if len(rows) <= products.FEW_ROWS and (few := self._product_of_few(rows)) is not None:
            return few.view(*x.shape[:-1], self.out_features)
        elements = LARGE_TILE_ELEMENTS if len(rows) >= MANY_ROWS else TILE_ELEMENTS
        step = max(32, elements // self.in_features // 32 * 32)
        is_turned = len(rows) <= TURNED_ROWS and x.dtype == torch.float32
        shape = (len(rows), self.out_features)
        out = x.new_empty(shape[::-1]).t() if is_turned else x.new_empty(shape)
        for start in range(0, self.out_features, step):
            here = slice(start, min(start + step, self.out_features))
            tile = self.tile(here, x.dtype)
            if is_turned:
                torch.mm(tile, rows.t(), out=out.t()[here])
            else:
                torch.mm(rows, tile.t(), out=out[:, here])
        return out.contiguous().view(*x.shape[:-1], self.out_features)  # attention reads other strides wrongly

    def rows(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows by index (...) -> (..., C_in), a new tensor, as an embedding looks them up."""
        out = torch.empty(indices.numel(), self.in_features, dtype=dtype, device=indices.device)
        self.expand(indices.reshape(-1), out)
        return out.view(*indices.shape, self.in_features)

    def write(self, rows: slice, out: Tensor) -> None:
        """Writes the rows to `out` (n, C_in), contiguous."""
        if self.is_transposed:
            work = out.new_empty(out.shape[::-1]).t()
            self._fill(rows, work)
            out.copy_(work)
        else:
            self._fill(rows, out)

    def expanded(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole matrix (C_out, C_in), a new tensor."""
        device = next(self.buffers()).device
        out = torch.empty(self.shape, dtype=dtype, device=device)
        self._fill(slice(0, self.out_features), out)
        return out

    def tile(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """The rows (n, C_in) in a buffer that the next tile overwrites."""
        device, count = next(self.buffers()).device, rows.stop - rows.start
        size = count * self.in_features
        buffer = _buffers.get((device, dtype))
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):  # what is made in that mode cannot be written to outside of it
                buffer = torch.empty(max(size, TILE_ELEMENTS), dtype=dtype, device=device)
            _buffers[device, dtype] = buffer
        shape = (self.in_features, count) if self.is_transposed else (count, self.in_features)
        out = buffer[:size].view(shape)
        out = out.t() if self.is_transposed else out
        self._fill(rows, out)
        return out

    def _fill(self, rows: slice, out: Tensor) -> None:
        if out.is_cuda and has_triton(out.device) and out.element_size() == 2 and out.is_contiguous():
            form = self.form()
            if form is not None:
                from model.gpu.expanding import expand  # here: Triton comes with builds of torch for GPUs only

                expand([form], rows, out[None])
                return
        operand = self._readable()
        if operand is None or not products.expand(operand, rows, out):
            self.expand(rows, out)

    def _product_of_few(self, rows: Tensor) -> Tensor | None:
        operand = self._readable() if rows.device.type == "cpu" else None
        if operand is None or operand.shape[0] != self.out_features:  # a copy with fewer rows shares the operand
            return None
        return products.product(operand, rows)

    def _readable(self) -> Operand | None:
        """The operand, looked up once, as tensors stay where they are unless the module is moved."""
        if not self._has_operand:
            operand = self.operand()
            self._operand = operand if operand is not None and products.is_readable(operand) else None
            self._has_operand = True
        return self._operand

    def forget_operand(self) -> None:
        """To be called when a buffer has been replaced."""
        StoredMatrix.replaced += 1
        self._has_operand = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.forget_operand()
        return super()._apply(fn, recurse)


Weight: TypeAlias = Tensor | StoredMatrix
