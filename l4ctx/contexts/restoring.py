"""Filling a cache with the first tokens of a saved context, by one process or by each of several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cache.blocks import Block
from cache.disk import UnitFile
from cache.errors import DiskError
from cache.heads import Heads, HeadsFile
from cache.layout import StoreLayout
from l4ctx.contexts.folder import BLOCKS, JOURNAL
from l4ctx.contexts.states import Stored
from model.bounds import shown
from model.weights.read_ahead import as_bytes

if TYPE_CHECKING:
    from cache.context import ContextKVCache
    from cache.hybrid import HybridKVCache


@dataclass(frozen=True)
class Held:
    """The files with a context's first `tokens` tokens: sealed blocks, and those that fill no whole block."""

    folder: Path
    dtype: str  # that the tail is stored in
    tokens: int
    blocks: Sequence[Stored]
    rest: Stored | None  # a block or a tail; None where there are none

    def as_dict(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "dtype": self.dtype,
            "tokens": self.tokens,
            "blocks": [block.as_dict() for block in self.blocks],
            "rest": None if self.rest is None else self.rest.as_dict(),
        }

    @classmethod
    def from_dict(cls, said: dict[str, Any]) -> Held:
        """What `as_dict` returned, in another process."""
        stored = [Stored(entry["file"], entry["sha256"]) for entry in (*said["blocks"], said["rest"]) if entry]
        rest = stored.pop() if said["rest"] else None
        return cls(Path(said["folder"]), said["dtype"], said["tokens"], stored, rest)

    def restore(self, cache: HybridKVCache | ContextKVCache, heads: Heads | None = None) -> None:
        """Fills an empty cache, of context ranks each with its tokens; `heads`: with those alone, of a file that holds
        all. Raises DiskError."""
        files = [self._file(stored, cache.layout, heads) for stored in self.blocks]
        rest = self.rest
        is_within_chunk = self.tokens % cache.layout.config.attention_chunk_size != 0
        if is_within_chunk and (rest is None or rest.name.startswith(BLOCKS)):
            raise DiskError(
                f"{self.folder / JOURNAL}: {self.tokens:,} tokens end within an attention chunk, without its tail"
            )
        if rest is None:
            cache.restore(self.tokens, files)
        elif rest.name.startswith(BLOCKS):
            cache.restore(self.tokens, files, partial=self._file(rest, cache.layout, heads))
        else:
            cache.restore(self.tokens, files, tail=self._tail(rest, cache.layout, heads))

    def _file(self, stored: Stored, layout: StoreLayout, heads: Heads | None) -> UnitFile:
        path = self.folder / stored.name
        if heads is None:
            return UnitFile(path, header_sha256=stored.header_sha256)
        return HeadsFile(path, header_sha256=stored.header_sha256, layout=layout, heads=heads)

    def _tail(self, stored: Stored, layout: StoreLayout, heads: Heads | None) -> dict[int, Block]:
        """What a tail file holds of each layer. Raises DiskError."""
        file, config = UnitFile(self.folder / stored.name, header_sha256=stored.header_sha256), layout.config
        dtype = getattr(torch, self.dtype)
        total = config.num_key_value_heads if heads is None else heads.total
        per_token = total * config.head_dim * dtype.itemsize
        most = max(layout.block_tokens, config.attention_chunk_size)
        layers = {str(layer): layer for layer in range(config.num_hidden_layers)}
        tail = {}
        for name in file.units:
            tokens, remainder = divmod(file.num_bytes(name, 2 * per_token * most), 2 * per_token)
            if remainder or name not in layers:
                raise DiskError(f"{file.source}: {shown(name)} is not a layer of this model")
            buffer = torch.empty((2, 1, config.num_key_value_heads, tokens, config.head_dim), dtype=dtype)
            if heads is None:
                file.read(name, as_bytes(buffer))
            else:
                size = per_token * tokens
                file.read_parts(name, 2 * size, heads.parts((size, size)), as_bytes(buffer))
            tail[layers[name]] = Block(buffer[0], buffer[1])
        for layer in layers.values():
            needed = self.tokens % (config.attention_chunk_size if config.uses_rope(layer) else layout.block_tokens)
            if needed and (layer not in tail or tail[layer].keys.shape[2] < needed):
                raise DiskError(f"{file.source}: it does not hold the last {needed:,} tokens of layer {layer}")
        return tail
