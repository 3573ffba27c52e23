"""The positions at which a reading is cut into prefill chunks: absolute, so that every run cuts at the same ones."""

from __future__ import annotations

from collections.abc import Iterator


def prefill_grid(
    start: int, stop: int, prefill_chunk_size: int, attention_chunk_size: int, block_tokens: int | None = None
) -> Iterator[range]:
    """Positions start .. stop - 1 cut on an absolute grid, so that any run over the same tokens takes the same steps.

    Prefill chunks at least as long as an attention chunk are whole numbers of those; shorter ones are counted from each
    attention chunk's start and none crosses a boundary. At multiples of `grid_period` there is always a cut.
    """
    assert prefill_chunk_size > 0
    period = grid_period(prefill_chunk_size, attention_chunk_size, block_tokens)
    step = min(prefill_chunk_size, period)
    if step >= attention_chunk_size:
        step = step // attention_chunk_size * attention_chunk_size
    while start < stop:
        begin = start // period * period
        cut = min(begin + ((start - begin) // step + 1) * step, begin + period, stop)
        yield range(start, cut)
        start = cut


def grid_period(prefill_chunk_size: int, attention_chunk_size: int, block_tokens: int | None = None) -> int:
    """Tokens after which the grid repeats: with blocks (of whole attention chunks) their boundaries are cuts of it, but
    for prefill chunks that are longer, which are whole blocks; so a run can go on where its blocks end."""
    if prefill_chunk_size < attention_chunk_size:
        return attention_chunk_size
    if block_tokens is None or prefill_chunk_size >= block_tokens:
        unit = block_tokens or attention_chunk_size
        return prefill_chunk_size // unit * unit
    return block_tokens
