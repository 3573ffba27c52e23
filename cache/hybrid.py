"""The cache of a whole model: a bounded window for each RoPE layer, a growing store for each NoPE layer.

It is the `KVCache` of model/attention.py. Rows of sealed blocks that must be on disk are written to the `RowStore` that
it is given: a scratch file, or a saved context.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from cache.blocks import Block, empty_block, joined
from cache.chunked import ChunkedKVCache
from cache.disk import UnitFile, Units
from cache.layout import StoreLayout
from cache.offloaded import OffloadedKVCache
from cache.residency import KVBytes, Residency, pinned_slots
from cache.sealed import SealedBlock
from cache.tiers import RowStore, Tiers, unit_name
from model.config import TextConfig
from model.gpu.support import Pages
from model.kernels.attend import KVSegment
from model.weights.transport import CudaTransport, Transport


class HybridKVCache:
    """Keys and values of a run of at most `length` tokens (default: max_position_embeddings) in `batch_size` rows.

    `dtype` and `device` are those the model computes in; sealed NoPE blocks are stored in `kv_dtype` (one of
    cache.layout.KV_DTYPES) and lie where `residency` says. Rows that memory does not hold are written to `rows`.
    `transport` leads to an accelerator; a GPU's is made here unless it is given. Where layers are on several devices,
    `devices` says of each layer on which, and `transports` may lead to them. Each keeps equally many rows, of its own
    layers.
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        length: int | None = None,
        batch_size: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kv_dtype: str = "auto",
        residency: Residency | None = None,
        rows: RowStore | None = None,
        layout: StoreLayout | None = None,
        transport: Transport | None = None,
        devices: Sequence[torch.device] | None = None,
        transports: Mapping[torch.device, Transport] | None = None,
    ) -> None:
        self.config = config
        self.offset = 0
        self.length = config.max_position_embeddings if length is None else length
        self.batch_size, self.dtype = batch_size, dtype
        self.devices = [torch.device(device)] * config.num_hidden_layers if devices is None else list(devices)
        self.layout = layout or StoreLayout.of(
            config,
            length=self.length,
            dtype=str(dtype).removeprefix("torch."),
            kv_dtype=kv_dtype,
            batch_size=batch_size,
        )
        self.rows = rows
        given = {self.devices[0]: transport} if transport is not None else transports or {}
        self._tiers = {device: _tiers(self.layout, device, given.get(device)) for device in dict.fromkeys(self.devices)}
        self.residency = residency or Residency(on_accelerator=self.tiers.is_accelerated)
        self._is_saved = False  # every sealed block has a file
        self._placed = 0  # sealed rows that lie where they should
        self._pages: tuple[object, Pages | None] = None, None  # the state that they are of, and they
        self.layers: list[ChunkedKVCache | OffloadedKVCache] = [
            self._new_layer(layer) for layer in range(config.num_hidden_layers)
        ]

    @property
    def tiers(self) -> Tiers:
        """The first device's, which all layers share unless they are on several."""
        return self._tiers[self.devices[0]]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Stores keys and values (B, H_kv, T, D) of new tokens at `offset`; `segments` yields them at once."""
        tokens = keys.shape[2]
        expected = (self.batch_size, self.config.num_key_value_heads, tokens, self.config.head_dim)
        assert keys.shape == values.shape == expected, (keys.shape, values.shape, expected)
        assert self.offset + tokens <= self.length, f"{self.offset} + {tokens} tokens in a cache made for {self.length}"
        before = self.layers[layer - 1]
        if isinstance(before, ChunkedKVCache):
            before.finish()  # layers run in order, so that at most one holds a whole forward's tokens
        self.layers[layer].append(self.offset, keys, values)

    def reserve(self, tokens: int) -> Pages | None:
        """Makes room for the next `tokens` tokens, and says by layer where keys and values lie and these will.

        Of RoPE layers that is the window, which begins at a multiple of the chunk. The object is the same one as
        long as nothing has moved. None if a sealed block lies elsewhere than on the model's device, or in another
        dtype, or if the tokens lie in two attention chunks.
        """
        stop, size = self.offset + tokens, self.config.attention_chunk_size
        assert stop <= self.length, f"{stop} tokens in a cache made for {self.length}"
        if self.batch_size > 1 or self.offset % size + tokens > size:
            return None
        for cache in self.layers:
            cache.reserve(self.offset, stop)
        state = SealedBlock.moved, *((len(store.sealed), len(store.open)) for store in self.stores)
        if state != self._pages[0]:
            pages = [cache.pages() for cache in self.layers]
            known = [here for here in pages if here is not None]
            self._pages = state, Pages(known) if len(known) == len(pages) else None
        return self._pages[1]

    def segments(self, layer: int, queries: range, within: range | None = None) -> Iterator[KVSegment]:
        """Keys and values that queries at these positions may see, oldest first; each is valid until the next one.

        Of a NoPE layer those `within` these positions, which begin and end at blocks, or at the last token.
        """
        cache = self.layers[layer]
        if isinstance(cache, ChunkedKVCache):
            return cache.segments()
        return cache.segments(len(queries) * self.batch_size, self.residency, within)

    def shared_tokens(self, others: Sequence[HybridKVCache]) -> int:
        """Tokens in the sealed blocks at the beginning that all of these forks share."""
        stores = self.stores[:1]  # blocks of all layers are sealed together
        shared = len(stores[0].sealed) if stores else 0
        for other in others:
            both = zip(stores[0].sealed[:shared], other.stores[0].sealed, strict=False) if stores else ()
            shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] is pair[1], both))
        return shared * self.layout.block_tokens

    @property
    def room(self) -> int:
        """How many tokens can be appended and taken back: less than what the attention chunk has left."""
        size = self.config.attention_chunk_size
        return min(size - self.offset % size - 1, self.length - self.offset)

    def rewind(self, offset: int) -> None:
        """Takes back the tokens from `offset` on, all of which were appended within `room`."""
        size = self.config.attention_chunk_size
        assert offset <= self.offset and offset // size == self.offset // size, (offset, self.offset)
        self.offset = offset

    def advance(self, num_tokens: int) -> None:
        """Commits the new tokens of all layers by changing the offset alone, so that an interrupt finds all or none.

        Sealed rows then move to their tiers. Raises what `rows` raises when a row cannot be written: the tokens are
        committed, and the next call writes it again.
        """
        self.offset += num_tokens
        for cache in self.layers:
            cache.settle(self.offset)
        self._place()

    def fork(self) -> HybridKVCache:
        """An independent continuation: sealed blocks are shared, windows and open blocks copied.

        It writes nothing into a saved context; what it seals stays in memory unless there is a scratch file.
        """
        forked = copy.copy(self)
        forked._pages = None, None
        forked.layers = [cache.fork(self.offset) for cache in self.layers]
        if self.rows is not None and self.rows.is_durable:
            forked.rows = None
        return forked

    def pin(self, tokens: int, *, all_on_disk: bool = False) -> int:
        """Takes the pinned host memory that so many tokens need, with what has been taken, so that no step has to.

        `all_on_disk`: every sealed block is, or will be, in a saved context. Returns the bytes that the system refused
        to pin: they are there, but copies take longer. Does nothing where no accelerator is in use.
        """
        for tiers, layers in Counter(store.tiers for store in self.stores).items():
            tiers.pin(pinned_slots(self.layout, tokens, self.residency, layers, all_on_disk=all_on_disk))
        return sum(tiers.pinned[1] for tiers in self._tiers.values())

    def held(self, on: torch.device | None = None) -> KVBytes:
        """Bytes that are allocated now, or of them those of the layers `on` a device, with what is in files and host
        memory for them. On a CPU everything in memory is in the host tier."""
        layers = [cache for cache, device in zip(self.layers, self.devices, strict=True) if on in (None, device)]
        stores = [cache for cache in layers if isinstance(cache, OffloadedKVCache)]
        all_tiers = [tiers for device, tiers in self._tiers.items() if on in (None, device)]
        on_disk = sum(1 for store in stores for block in store.sealed if block.file is not None)
        return KVBytes(
            sum(cache.nbytes for cache in layers if isinstance(cache, ChunkedKVCache)),
            nope_device=sum(store.nbytes(on_host=False) for store in stores)
            + sum(tiers.buffer_bytes(on_host=False) for tiers in all_tiers),
            nope_host=sum(cache.nbytes(on_host=True) for cache in stores),
            nope_disk=on_disk * self.layout.segments_per_block * self.layout.sealed_segment_bytes,
            buffers=sum(tiers.buffer_bytes(on_host=True) for tiers in all_tiers),
            pinned=sum(tiers.pinned[0] for tiers in all_tiers),
        )

    @property
    def stores(self) -> list[OffloadedKVCache]:
        return [cache for cache in self.layers if isinstance(cache, OffloadedKVCache)]

    def restore(
        self,
        offset: int,
        files: Sequence[UnitFile],
        *,
        tail: Mapping[int, Block] | None = None,
        partial: UnitFile | None = None,
    ) -> None:
        """Starts with `offset` tokens whose first blocks are in `files`, one row per file.

        The tokens behind them come from `tail`, by layer: of a NoPE layer those behind the files, of a RoPE layer
        those of the current chunk, (B, H_kv, at least as many, D). At a multiple of the attention chunk they may come
        from `partial` instead, from the first tokens of the block in that file. Raises DiskError.
        """
        assert self.offset == 0 and len(files) <= offset // self.layout.block_tokens, (self.offset, len(files), offset)
        assert partial is None or len(files) == offset // self.layout.block_tokens, (len(files), offset)
        size, start = self.layout.segment_tokens, len(files) * self.layout.block_tokens
        assert partial is None or offset % self.config.attention_chunk_size == 0, offset
        for layer, cache in enumerate(self.layers):
            if isinstance(cache, ChunkedKVCache):
                if used := offset % self.config.attention_chunk_size:
                    assert tail is not None, "no windows"
                    cache.restore(tail[layer].first(used))
                continue
            empty = [None] * self.layout.segments_per_block
            cache.restore(offset, [SealedBlock(layer, empty, file) for file in files])
            from_file = SealedBlock(layer, empty, partial)
            for position in range(start, offset, size):
                used, number = min(size, offset - position), position // size
                if partial is not None:
                    source = cache.tiers.load(from_file, number % self.layout.segments_per_block).first(used)
                else:
                    assert tail is not None, "no open block"
                    here = slice(position - start, position - start + used)
                    source = Block(*(x[:, :, here] for x in tail[layer]))
                cache.segment(number).first(used).copy_from(source)
            cache.settle(offset)
        self.offset = offset
        self._is_saved |= bool(files)
        self._place()

    def tail(self) -> dict[int, Block]:
        """What `restore` needs beside the sealed blocks: each layer's tokens behind them, contiguous, on the host."""
        chunk_size, tails = self.config.attention_chunk_size, {}
        for layer, cache in enumerate(self.layers):
            cache.settle(self.offset)
            is_window = isinstance(cache, ChunkedKVCache)
            start = self.offset - self.offset % (chunk_size if is_window else self.layout.block_tokens)
            if is_window or start < self.offset:
                tails[layer] = self.copied(layer, range(start, self.offset))
        return tails

    def row_units(self, row: int) -> Units:
        """A sealed row as a `RowStore` writes it, wherever it lies; what is in a file is read. Raises DiskError."""
        return {
            unit_name(store.layer, number): (packed or store.tiers.read(store.sealed[row], number)).tensors
            for store in self.stores
            for number, packed in enumerate(store.tiers.copies_on_host(store.sealed[row]))
        }

    def copied(self, layer: int, positions: range) -> Block:
        """Keys and values at these positions in the compute dtype, contiguous, on the host; of a RoPE layer within the
        current attention chunk. A NoPE layer's may be those of a forward that is not committed yet."""
        cache = self.layers[layer]
        if isinstance(cache, ChunkedKVCache):
            first = self.offset - self.offset % cache.chunk_size
            parts = [cache.window.within(slice(positions.start - first, positions.stop - first))]
        else:
            parts = list(cache.parts(positions))
        return Block(*(x.cpu() for x in joined(parts or [empty_block(self.layout, 0, self.devices[layer])])))

    def _place(self) -> None:
        """Moves every sealed row to its tier; can be interrupted anywhere and repeated."""
        stores = self.stores
        sealed = min((len(store.sealed) for store in stores), default=0)
        if sealed == self._placed:
            return
        if self.rows is not None and self.rows.is_durable:
            self._is_saved = True
            for row in range(sealed):
                self._write(row)
        device, _, disk = self.residency.split(sealed)
        for row in range(sealed - device):
            for store in stores:
                if row >= disk:
                    store.tiers.to_host(store.sealed[row])
            if row < disk and any(store.sealed[row].is_in_memory for store in stores):
                self._write(row)
                for store in stores:
                    if store.sealed[row].file is not None:
                        store.sealed[row].drop_from_memory()
        for tiers in {id(store.tiers): store.tiers for store in stores}.values():
            tiers.prepare(reads=disk > 0 or self._is_saved, streams=device < sealed, has_sealed=sealed > 0)
        self._placed = sealed

    def _write(self, row: int) -> None:
        """Writes a row to disk unless it is there, or there is no row store."""
        blocks = [store.sealed[row] for store in self.stores]
        if self.rows is None or all(block.file is not None for block in blocks):
            return
        file = self.rows.write(row, self.row_units(row))
        for block in blocks:
            block.file = file

    def _new_layer(self, layer: int) -> ChunkedKVCache | OffloadedKVCache:
        if not self.config.uses_rope(layer):
            return OffloadedKVCache(layer, self._tiers[self.devices[layer]], self.length)
        chunk_size = self.config.attention_chunk_size
        window = empty_block(self.layout, min(chunk_size, self.length), self.devices[layer])
        return ChunkedKVCache(window, chunk_size)


def _tiers(layout: StoreLayout, device: torch.device, transport: Transport | None) -> Tiers:
    if transport is None and device.type == "cuda":
        transport = CudaTransport(device)
    return Tiers(layout, device, transport)
