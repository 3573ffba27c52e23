"""The ways to compute the logits of a whole sequence through `HybridKVCache`, in the shape of paths.py's PATHS.

All use the smallest possible blocks, so that even toy runs seal some and leave one open. CACHED_PATHS keep everything
in memory; STORED_PATHS do not, and take the same steps as a path that does.
"""

from __future__ import annotations

import os
import pathlib
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from cache import layout as store_layout
from cache.disk import Scratch, UnitFile, Units, write_units
from cache.grid import prefill_grid
from cache.hybrid import HybridKVCache
from cache.layout import StoreLayout
from cache.residency import Residency
from model.config import TextConfig
from model.transformer import Transformer

Path = Callable[[Transformer, Tensor], Tensor]


def small_layout(
    config: TextConfig,
    *,
    length: int,
    dtype: str = "float32",
    kv_dtype: str = "auto",
    batch_size: int = 1,
    block_chunks: int = 1,
    segment_chunks: int | None = None,
) -> StoreLayout:
    """NoPE blocks and segments of the given numbers of attention chunks (default: one segment per block)."""
    chunk = config.attention_chunk_size
    chunk_bytes = chunk * store_layout.layer_bytes_per_token(config, store_layout.KV_DTYPES[dtype], batch_size)
    with mock.patch.multiple(
        store_layout,
        MIN_BLOCK_BYTES=block_chunks * chunk_bytes,
        MIN_SEGMENT_BYTES=1,
        MIN_SEGMENT_TOKENS=(segment_chunks or block_chunks) * chunk,
    ):
        return StoreLayout.of(config, length=length, dtype=dtype, kv_dtype=kv_dtype, batch_size=batch_size)


def new_cache(
    model: Transformer, ids: Tensor, *, block_chunks: int = 1, segment_chunks: int | None = None, **where: Any
) -> HybridKVCache:
    """A cache with capacity for all of `ids` (B, T); `where` says which tiers hold its blocks."""
    dtype = str(model.dtype).removeprefix("torch.")
    layout = small_layout(
        model.config,
        length=ids.shape[1],
        dtype=dtype,
        batch_size=ids.shape[0],
        block_chunks=block_chunks,
        segment_chunks=segment_chunks,
    )
    return HybridKVCache(
        model.config, length=ids.shape[1], batch_size=ids.shape[0], dtype=model.dtype, layout=layout, **where
    )


def feed(model: Transformer, cache: HybridKVCache, ids: Tensor, cuts: Iterable[int]) -> Tensor:
    """Logits (B, T, V) of the tokens of `ids` after the cache's offset, fed in forwards that end at `cuts`."""
    pieces = []
    for cut in cuts:
        logits = model(ids[:, cache.offset : cut], cache, logits="all")
        assert logits is not None
        pieces.append(logits)
    assert cache.offset == ids.shape[1]
    return torch.cat(pieces, dim=1)


def grid_cuts(
    start: int, stop: int, prefill_chunk_size: int, attention_chunk_size: int, block_tokens: int | None = None
) -> list[int]:
    return [step.stop for step in prefill_grid(start, stop, prefill_chunk_size, attention_chunk_size, block_tokens)]


def random_cuts(start: int, stop: int, seed: int, largest: int) -> list[int]:
    source, cuts = random.Random(seed), []
    while start < stop:
        start = min(stop, start + source.randint(1, largest))
        cuts.append(start)
    return cuts


def on_the_grid(size_for: Callable[[int], int]) -> Path:
    """Prefill chunks of `size_for(attention_chunk_size)` tokens."""

    def path(model: Transformer, ids: Tensor) -> Tensor:
        chunk = model.config.attention_chunk_size
        return feed(model, new_cache(model, ids), ids, grid_cuts(0, ids.shape[1], size_for(chunk), chunk))

    return path


def token_by_token(model: Transformer, ids: Tensor) -> Tensor:
    return feed(model, new_cache(model, ids, block_chunks=2), ids, range(1, ids.shape[1] + 1))


def irregular(model: Transformer, ids: Tensor, **where: Any) -> Tensor:
    """Pieces of up to three attention chunks off the grid, and blocks of two segments."""
    cache = new_cache(model, ids, block_chunks=2, segment_chunks=1, **where)
    return feed(model, cache, ids, irregular_cuts(model, ids))


def irregular_cuts(model: Transformer, ids: Tensor) -> list[int]:
    return random_cuts(0, ids.shape[1], 5, 3 * model.config.attention_chunk_size)


def one_piece(model: Transformer, ids: Tensor) -> Tensor:
    return feed(model, new_cache(model, ids), ids, [ids.shape[1]])


def forked(model: Transformer, ids: Tensor, **where: Any) -> Tensor:
    """Forks of forks, at a boundary, inside a chunk and inside a block; a sibling first reads other tokens."""
    chunk, stop = model.config.attention_chunk_size, ids.shape[1]
    pieces, cache = [], new_cache(model, ids, block_chunks=2, segment_chunks=1, **where)
    for cut in (*(c for c in (chunk, chunk + 3, 2 * chunk, 3 * chunk - 2) if c < stop), stop):
        sibling = cache.fork()
        pieces.append(model(ids[:, cache.offset : cut], cache, logits="all"))
        model(ids[:, sibling.offset :].flip(1), sibling, logits="none")  # writes other tokens, up to the end
        cache = cache.fork()
    return torch.cat(pieces, dim=1)


def continued_by_the_fork(model: Transformer, ids: Tensor, **where: Any) -> Tensor:
    """The fork of a fork continues while its parents read something else."""
    chunk, stop = model.config.attention_chunk_size, ids.shape[1]
    first, second = sorted({min(chunk + 2, stop - 1), min(2 * chunk + 1, stop - 1), stop - 1})[:2]
    cache = new_cache(model, ids, **where)
    pieces = [model(ids[:, :first], cache, logits="all")]
    fork = cache.fork()
    pieces.append(model(ids[:, first:second], fork, logits="all"))
    fork_of_fork = fork.fork()
    for other in (cache, fork):
        model(ids[:, other.offset :].flip(1), other, logits="none")
    cuts = random_cuts(second, stop, 7, chunk + 2)
    return torch.cat([*pieces, feed(model, fork_of_fork, ids, cuts)], dim=1)


@contextmanager
def failing(model: Transformer, layer: int, error: type[BaseException] = RuntimeError) -> Iterator[None]:
    """A context in which forwards fail in the feed-forward of `layer`, after its attention and cache update."""

    def fail(*_: object) -> None:
        raise error("made to fail")

    handle = model.model.layers[layer].feed_forward.register_forward_pre_hook(fail)
    try:
        with pytest.raises(error, match="made to fail"):
            yield
    finally:
        handle.remove()


def repeated_after_failures(model: Transformer, ids: Tensor, **where: Any) -> Tensor:
    """Before each step, two forwards of other tokens fail, one of them longer; the layer changes with the step."""
    pieces, cache = [], new_cache(model, ids, **where)
    layers, chunk = model.config.num_hidden_layers, model.config.attention_chunk_size
    for number, cut in enumerate(random_cuts(0, ids.shape[1], 11, 2 * chunk)):
        for stop in (ids.shape[1], cut):
            with failing(model, (3 * number + 2) % layers):
                model(ids[:, cache.offset : stop].flip(1), cache)
        pieces.append(model(ids[:, cache.offset : cut], cache, logits="all"))
    return torch.cat(pieces, dim=1)


def rewound(model: Transformer, ids: Tensor, **where: Any) -> Tensor:
    """Other tokens follow those of each step, as many as the cache can take back, and are taken back."""
    pieces, cache, source = [], new_cache(model, ids, block_chunks=2, segment_chunks=1, **where), random.Random(13)
    for cut in random_cuts(0, ids.shape[1], 13, 3):
        count = cut - cache.offset
        others = max(0, min(source.randint(0, 4), cache.room - count))
        tokens = torch.cat([ids[:, cache.offset : cut], ids.flip(1)[:, :others]], 1)
        pieces.append(model(tokens, cache, logits="all")[:, :count])
        cache.rewind(cut)
    return torch.cat(pieces, dim=1)


def beside_others(model: Transformer, ids: Tensor, **where: Any) -> Tensor:
    """Three forks of a common beginning read the rest in one forward after the other, each at its own pace."""
    return torch.stack([_three_readers(model, row, **where) for row in ids])


def _three_readers(model: Transformer, ids: Tensor, **where: Any) -> Tensor:
    """Logits (T, V) of ids (T,), of which each reader computed every third."""
    chunk, stop, source = model.config.attention_chunk_size, len(ids), random.Random(17)
    cache = new_cache(model, ids[None], block_chunks=2, segment_chunks=1, **where)
    start = min(2 * chunk + 3, stop - 1)
    begun = [model(ids[None, :start], cache, logits="all")[0]] if start else []
    readers = [cache.fork() for _ in range(3)]
    found = [list(begun) for _ in readers]
    while running := [n for n, reader in enumerate(readers) if reader.offset < stop]:
        pieces = [
            ids[readers[n].offset : readers[n].offset + source.randint(1, (2, chunk + 2, 4)[n])].tolist()
            for n in running
        ]
        logits = model.forward_ragged(pieces, [readers[n] for n in running], logits="all")
        for n, some in zip(running, logits, strict=True):
            found[n].append(some)
    of_readers = [torch.cat(pieces) for pieces in found]
    return torch.stack([of_readers[position % 3][position] for position in range(stop)])


def chunk_by_chunk(model: Transformer, ids: Tensor) -> Tensor:
    """One attention chunk per step, and blocks of four chunks in two segments: most chunks end inside a block."""
    return feed(model, blocks_of_four(model, ids), ids, chunk_cuts(model, ids))


def blocks_of_four(model: Transformer, ids: Tensor, **where: Any) -> HybridKVCache:
    return new_cache(model, ids, block_chunks=4, segment_chunks=2, **where)


def chunk_cuts(model: Transformer, ids: Tensor) -> list[int]:
    chunk = model.config.attention_chunk_size
    return grid_cuts(0, ids.shape[1], chunk, chunk)


class SavedRows:
    """A durable store like a saved context, with one file per row. `written` lists the rows in writing order."""

    is_durable = True

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.written: list[int] = []
        self.files: list[UnitFile] = []

    def write(self, row: int, units: Units) -> UnitFile:
        path = self.folder / f"{row:06d}"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            digest, _ = write_units(descriptor, units, {"block": str(row)})
        finally:
            os.close(descriptor)
        self.written.append(row)
        self.files.append(UnitFile(path, header_sha256=digest))
        return self.files[-1]

    def reopened(self, rows: int | None = None) -> list[UnitFile]:
        """The first `rows` as another process finds them: only their headers' digests are known."""
        return [UnitFile(file.source, header_sha256=file.header_sha256) for file in self.files[:rows]]


@contextmanager
def scratch() -> Iterator[Scratch]:
    rows = Scratch(pathlib.Path(tempfile.gettempdir()))
    try:
        yield rows
    finally:
        rows.close()


def on_disk(path: Callable[..., Tensor], host_rows: int) -> Path:
    """The path with all but the newest `host_rows` blocks of each NoPE layer in a scratch file."""

    def stored(model: Transformer, ids: Tensor) -> Tensor:
        with scratch() as rows:
            return path(model, ids, residency=Residency(host_rows=host_rows), rows=rows)

    return stored


def restored_after_every_piece(model: Transformer, ids: Tensor) -> Tensor:
    """`irregular`, with each piece fed to a new cache, restored from what the previous one saved."""
    pieces = []
    with tempfile.TemporaryDirectory() as folder:
        saved = SavedRows(pathlib.Path(folder))
        cache = new_cache(model, ids, block_chunks=2, segment_chunks=1, rows=saved)
        for number, cut in enumerate(irregular_cuts(model, ids)):
            pieces.append(model(ids[:, cache.offset : cut], cache, logits="all"))
            tail = cache.tail()
            if cut < ids.shape[1]:
                with failing(model, model.config.num_hidden_layers - 1):
                    model(ids[:, cut:].flip(1), cache)  # writes other tokens after those that are kept
            cache = new_cache(
                model,
                ids,
                block_chunks=2,
                segment_chunks=1,
                rows=saved,
                residency=Residency(host_rows=(None, 0, 1)[number % 3]),
            )
            cache.restore(cut, saved.reopened(), tail=tail)
    return torch.cat(pieces, dim=1)


def restored_inside_blocks(model: Transformer, ids: Tensor) -> Tensor:
    """`chunk_by_chunk`, with each chunk of a saved block fed to a new cache, restored up to there within the block."""
    pieces: list[Tensor] = []
    chunk = model.config.attention_chunk_size
    with tempfile.TemporaryDirectory() as folder:
        saved = SavedRows(pathlib.Path(folder))
        whole = blocks_of_four(model, ids, rows=saved)
        *_, end = chunk_cuts(model, ids)
        logits = feed(model, whole, ids, chunk_cuts(model, ids))
        sealed = len(saved.files) * whole.layout.block_tokens
        for cut in range(0, sealed, chunk):
            rows = cut // whole.layout.block_tokens
            cache = blocks_of_four(model, ids)
            cache.restore(cut, saved.reopened(rows), partial=saved.reopened()[rows])
            pieces.append(model(ids[:, cut : cut + chunk], cache, logits="all"))
    return torch.cat([*pieces, logits[:, sealed:end]], dim=1)


CACHED_PATHS: dict[str, Path] = {
    "prefill chunks smaller than an attention chunk": on_the_grid(lambda chunk: chunk - 2),
    "prefill chunks of one attention chunk": on_the_grid(lambda chunk: chunk),
    "prefill chunks that are no multiple": on_the_grid(lambda chunk: 2 * chunk + 3),
    "prefill chunks of three attention chunks": on_the_grid(lambda chunk: 3 * chunk),
    "token by token": token_by_token,
    "irregular pieces": irregular,
    "one piece": one_piece,
    "forked": forked,
    "continued by the fork of a fork": continued_by_the_fork,
    "repeated after failures": repeated_after_failures,
    "chunk by chunk in blocks of four": chunk_by_chunk,
    "rewound": rewound,
    "beside others": beside_others,
}

STORED_PATHS: dict[str, tuple[Path, Path]] = {  # each with the path that takes the same steps in memory
    "all blocks on disk": (on_disk(irregular, 0), irregular),
    "the newest block in memory": (on_disk(irregular, 1), irregular),
    "forked, on disk": (on_disk(forked, 0), forked),
    "continued by the fork of a fork, on disk": (on_disk(continued_by_the_fork, 0), continued_by_the_fork),
    "repeated after failures, on disk": (on_disk(repeated_after_failures, 0), repeated_after_failures),
    "rewound, on disk": (on_disk(rewound, 0), rewound),
    "beside others, on disk": (on_disk(beside_others, 0), beside_others),
    "restored after every piece": (restored_after_every_piece, irregular),
    "restored inside blocks": (restored_inside_blocks, chunk_by_chunk),
}
