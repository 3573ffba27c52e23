"""Where tokens are cut into prefill chunks: at absolute positions, so that every run cuts at the same ones."""

from __future__ import annotations

from collections.abc import Iterator


def prefill_grid(
    start: int, stop: int, prefill_chunk_size: int, attention_chunk_size: int, block_tokens: int | None = None
) -> Iterator[range]:
    """Positions start .. stop - 1 cut on an absolute grid, so that any run over the same tokens takes the same steps.

    A prefill chunk at least as long as an attention chunk is a whole number of those; shorter ones start over at each
    attention chunk, and none crosses its end. Every multiple of `grid_period` is a cut.
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
    """Tokens after which the grid repeats. With blocks (of whole attention chunks) every block boundary is a cut, and a
    prefill chunk longer than a block is a whole number of blocks; so a run can resume where its blocks end."""
    if prefill_chunk_size < attention_chunk_size:
        return attention_chunk_size
    if block_tokens is None or prefill_chunk_size >= block_tokens:
        unit = block_tokens or attention_chunk_size
        return prefill_chunk_size // unit * unit
    return block_tokens
