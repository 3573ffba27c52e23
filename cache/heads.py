"""Files that hold keys and values of all KV heads, of which each of several ranks reads its own.

A file is the same whatever the number of ranks, so what some wrote others read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cache.disk import UnitFile
from cache.layout import StoreLayout
from cache.packing import shapes


@dataclass(frozen=True)
class Heads:
    """The KV heads that one rank holds, of `total`."""

    here: range
    total: int

    def whole(self, layout: StoreLayout) -> StoreLayout:
        """The layout of all heads; `layout` is the rank's."""
        return layout.of_rank(replace(layout.config, num_key_value_heads=self.total))

    def parts(self, sizes: Iterable[int]) -> list[range]:
        """This rank's bytes of head-major tensors (1, H_kv, ...) that lie one behind the other; sizes in bytes."""
        found, start = [], 0
        for size in sizes:
            found.append(
                range(start + size * self.here.start // self.total, start + size * self.here.stop // self.total)
            )
            start += size
        return found


class HeadsFile(UnitFile):
    """A file of sealed blocks, one row of them, that reads as if it held this rank's heads alone."""

    def __init__(self, source: Path, *, header_sha256: str | None, layout: StoreLayout, heads: Heads) -> None:
        """`layout` is the rank's. Blocks have one row (B = 1)."""
        super().__init__(source, header_sha256=header_sha256)
        assert layout.batch_size == 1 and layout.config.num_key_value_heads == len(heads.here), (layout, heads)
        whole = heads.whole(layout)
        self._nbytes = whole.sealed_segment_bytes
        self._parts = heads.parts(tensor_bytes(whole))

    def read(self, name: str, into: memoryview) -> None:
        """Fills `into`, which is as long as the rank's part of the unit. Raises DiskError."""
        self.read_parts(name, self._nbytes, self._parts, into)


def tensor_bytes(layout: StoreLayout) -> Sequence[int]:
    """Bytes of a sealed segment's tensors, in file order."""
    found = []
    for _, dtype, shape in shapes(layout):
        size = dtype.itemsize
        for dimension in shape:
            size *= dimension
        found.append(size)
    return found
