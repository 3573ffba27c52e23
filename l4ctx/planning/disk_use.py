"""Bytes that a run writes to disk, in closed form. Imports no torch."""

from __future__ import annotations

from cache.layout import StoreLayout
from cache.residency import KVBytes
from l4ctx.drafts.index import ORDER_BYTES
from l4ctx.planning.workload import TOKEN_ID_BYTES, Workload

FILE_BYTES, FILE_BYTES_A_TENSOR = 4096, 192
"""Disk space of a block beside its keys and values: the file's header, and the unused end of its last page."""


def total(workload: Workload, layout: StoreLayout, end: KVBytes) -> int:
    """Still to be written: sealed blocks with their files' headers, and the rest of a saved context. `end`: keys and
    values at the end of the run."""
    rows = end.nope_disk // layout.row_bytes if end.nope_disk else 0
    tensors = workload.config.num_nope_layers * layout.segments_per_block * (4 if layout.scale_bytes else 2)
    found = end.nope_disk + rows * (FILE_BYTES + FILE_BYTES_A_TENSOR * tensors)
    if workload.is_saved:
        found += _of_tokens(workload) + _tail(layout)
    return max(0, found - workload.on_disk_already)


def largest_file(workload: Workload, layout: StoreLayout, end: KVBytes) -> int:
    """Of the largest file: a saved context has one for each block, a disk tier one for all."""
    needed = total(workload, layout, end)
    if not workload.is_saved:
        return needed
    blocks = layout.row_bytes if end.nope_disk else 0
    return min(needed, max(blocks, _of_tokens(workload), _tail(layout)))


def _of_tokens(workload: Workload) -> int:
    return (TOKEN_ID_BYTES + ORDER_BYTES) * workload.read_tokens


def _tail(layout: StoreLayout) -> int:
    return layout.window_bytes + layout.open_bytes(layout.block_tokens)
