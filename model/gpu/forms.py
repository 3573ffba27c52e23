"""How the kernels read a matrix: in 16 bits, or codes with scales as they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

PLAIN, INT4_WORDS, CODES = 0, 4, 8
"""Those of model.gpu.kernels."""

WHOLE = 2**30
"""The group of a scale that all of a row shares."""

LEAST_GROUP = 32


class Form(NamedTuple):
    """A matrix (N, K): its elements or codes, and where the next one lies along N and K; the same of its scales."""

    kind: int
    group: int  # elements along K that share a scale
    shape: tuple[int, int]
    codes: Tensor
    scale: Tensor
    strides: tuple[int, int]
    scale_strides: tuple[int, int]

    @property
    def like(self) -> tuple[Any, ...]:
        """What matrices that one kernel call reads have in common."""
        return self.kind, self.group, self.codes.dtype, self.scale.dtype, self.strides, self.scale_strides

    @property
    def addresses(self) -> tuple[int, int]:
        return self.codes.data_ptr(), self.scale.data_ptr()

    def rows(self, first: int, stop: int) -> Form:
        """Rows of the matrix."""
        here = slice(first, stop)
        scale = self.scale if self.scale_strides[0] == 0 else self.scale[here]
        codes = self.codes[here] if self.codes.shape[0] == self.shape[0] else self.codes[:, here]
        return self._replace(shape=(stop - first, self.shape[1]), codes=codes, scale=scale)


def plain_form(weight: Tensor) -> Form:
    """Of a matrix (N, K) in 16 bits, in any strides."""
    n, k = weight.shape
    return Form(PLAIN, WHOLE, (n, k), weight, weight, (weight.stride(0), weight.stride(1)), (0, 0))


def are_alike(forms: Sequence[Form]) -> bool:
    return len({form.like for form in forms}) == 1
