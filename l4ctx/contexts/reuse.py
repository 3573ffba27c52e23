"""How many of the tokens to be read a saved context holds already."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from cache.errors import DiskError
from cache.grid import grid_period
from cache.layout import StoreLayout
from l4ctx.contexts.difference import first_difference
from l4ctx.contexts.reader import Context
from l4ctx.contexts.states import State
from l4ctx.spans import ImageSpan, Span, same_until


@dataclass(frozen=True)
class Reuse:
    """The first `tokens` of those to be read are in `state`. `is_same`: its documents are exactly these."""

    state: State | None = None
    tokens: int = 0
    is_same: bool = False


def common_prefix(a: array[int] | memoryview, b: array[int] | memoryview) -> int:
    """The length of the common prefix of two sequences of 32-bit token ids."""
    left, right = (memoryview(x).cast("B") if memoryview(x).format != "B" else memoryview(x) for x in (a, b))
    size, step = min(len(left), len(right)), 1 << 20
    for start in range(0, size, step):
        here = slice(start, min(size, start + step))
        if left[here] != right[here]:
            low, high = 0, here.stop - start  # bytes known to be equal; bytes within which they differ
            while high - low > 4:
                middle = (low + high) // 8 * 4
                if left[start + low : start + middle] == right[start + low : start + middle]:
                    low = middle
                else:
                    high = middle
            return (start + low) // 4
    return size // 4


def reusable(
    context: Context, ids: memoryview, layout: StoreLayout, states: Sequence[State], images: Sequence[ImageSpan]
) -> Reuse:
    """The longest prefix of `ids`, with `images` among them, that one of the states holds and that reading can continue
    from. Raises DiskError.

    Unless all of a complete state is used, the prefix is cut at an attention chunk, where windows are empty. Where
    blocks are stored in another dtype it is not cut within a sealed one: the tokens behind the cut would attend to its
    packed values, where an uninterrupted run attends to those of the block while it was open.
    """
    best = Reuse()
    for state in states:
        kept = state.kept(layout.block_tokens)
        if min(kept, len(ids)) <= best.tokens:
            continue
        prefix = common_prefix(context.ids(state), ids)
        another = same_until(images, context.images(state))
        prefix = prefix if another is None else min(prefix, another)
        tokens = min(prefix, kept)
        if not (state.is_complete and tokens == state.tokens):
            chunk = layout.config.attention_chunk_size
            step = max(layout.block_tokens, grid_period(context.recipe.prefill_chunk_size, chunk, layout.block_tokens))
            is_sealed = len(state.blocks) * layout.block_tokens > tokens - tokens % step
            tokens -= tokens % (step if layout.is_packed and is_sealed else chunk)
        is_same = prefix == state.tokens == len(ids)
        if tokens > best.tokens or is_same:
            best = Reuse(state, tokens, is_same)
        if is_same:
            break
    return best


def why_unusable(context: Context, state: State, ids: memoryview, documents: Sequence[Span], chunk: int) -> str:
    """Why not even the state's first attention chunk can be used for these documents, in words."""
    try:
        saved, same = context.documents(state), common_prefix(context.ids(state), ids)
    except DiskError:
        return "its list of tokens is missing or damaged"
    if state.kept(context.recipe.block_tokens) < chunk <= same:
        return "the documents are the same, but their first block is missing or damaged"
    how = (
        "these documents start differently"
        if not saved or same < saved[0].stop
        else (f"the first {same:,} tokens are the same, too few to continue from")
    )
    return f"{how} ({first_difference(saved, documents, same)})"
