"""What is written: for each shard its tensors, whence they come and where they lie. Reads headers only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from l4ctx.checkpoint.fingerprint import weights_digest
from l4ctx.conversion.forms import GROUP_SIZES, ITEMSIZES, Entry, Form
from l4ctx.errors import RequestError
from model.config import TextConfig
from model.errors import CheckpointError
from model.gguf.files import find_gguf
from model.weights.expert_parts import ExpertPart
from model.weights.loading import checked_sources, stored_tensors
from model.weights.plain import DTYPE_NAMES
from model.weights.shards import read_header, shard_files, text_name
from model.weights.sources import StoredTensor


@dataclass(frozen=True)
class Piece:
    """A stored tensor that is copied, or one matrix that is quantized."""

    source: StoredTensor
    entries: tuple[Entry, ...]
    is_quantized: bool = False
    expert: int | None = None  # of a stack
    is_turned: bool = False  # stored as (C_in, C_out)
    half: int | None = None  # 0: the first half of the rows, gate; 1: the second, up


@dataclass(frozen=True)
class Shard:
    """A safetensors file to be written, with the name of the one that it is made from."""

    name: str
    pieces: tuple[Piece, ...]
    digest: str  # of the source and the form: files with equal headers hold the same

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Offset of each tensor from the start of the data; wide types first, so that all are aligned."""
        entries = [entry for piece in self.pieces for entry in piece.entries]
        found, offset = {}, 0
        for entry in sorted(entries, key=lambda entry: -ITEMSIZES[entry.dtype]):
            found[entry.name] = offset
            offset += entry.num_bytes
        return found

    @cached_property
    def header(self) -> bytes:
        """With its length in front; a multiple of 8 bytes."""
        content: dict[str, object] = {"__metadata__": {"format": "pt", "l4ctx": self.digest}}
        for entry in (entry for piece in self.pieces for entry in piece.entries):
            start = self.offsets[entry.name]
            content[entry.name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [start, start + entry.num_bytes],
            }
        text = json.dumps(content, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(entry.num_bytes for piece in self.pieces for entry in piece.entries)


@dataclass(frozen=True)
class Conversion:
    """A checkpoint folder and what becomes of it."""

    source: Path
    form: Form
    shards: tuple[Shard, ...]
    ignore: tuple[str, ...]  # linear modules that are not quantized

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    @classmethod
    def of(cls, folder: Path, form: Form) -> Conversion:
        """A w4a16 form without a group size gets the largest that divides the width of all matrices.

        Raises RequestError, and CheckpointError and ConfigError for checkpoints that cannot be read.
        """
        if find_gguf(folder) is not None:
            raise RequestError(f"{folder}: GGUF files are read as they are; only 16-bit safetensors are quantized")
        sources = checked_sources(folder, TextConfig.from_folder(folder))
        digest = weights_digest(stored_tensors(sources))
        files = [(file, sorted(read_header(file).values(), key=lambda t: t.offset)) for file in shard_files(folder)]
        tensors = [tensor for _, inside in files for tensor in inside]
        if (odd := next((tensor for tensor in tensors if tensor.dtype not in DTYPE_NAMES), None)) is not None:
            raise CheckpointError(
                f"{odd.file}: tensor {odd.name} has dtype {odd.dtype}: give a checkpoint that is not quantized yet"
            )
        form = _with_group_size(form, tensors)
        shards = tuple(
            Shard(file.name, tuple(piece for tensor in inside for piece in pieces(tensor, form)), f"{digest} {form}")
            for file, inside in files
        )
        if not any(piece.is_quantized for shard in shards for piece in shard.pieces):
            raise RequestError(f"{folder}: there is nothing to quantize")
        return cls(folder, form, shards, tuple(_ignored(piece for shard in shards for piece in shard.pieces)))


def pieces(tensor: StoredTensor, form: Form) -> Iterator[Piece]:
    """What becomes of a stored tensor."""
    name = text_name(tensor.name)
    if name is None or not form.quantization.covers(name):
        yield Piece(tensor, (Entry(tensor.name, tensor.dtype, tensor.shape),))
        return
    part = ExpertPart.of(name)
    if part is None:
        rows, columns = tensor.shape
        yield Piece(tensor, form.entries(tensor.name.removesuffix(".weight"), rows, columns), is_quantized=True)
        return
    rows, columns = tensor.shape[-2:][::-1] if part.is_fused else tensor.shape[-2:]
    halves = ((0, "gate"), (1, "up")) if part.kind == "gate_up" else ((None, part.kind),)
    prefix = tensor.name.removesuffix(name) + part.experts
    for number in range(tensor.shape[0]) if part.expert is None else (part.expert,):
        for half, kind in halves:
            entries = form.entries(f"{prefix}.{number}.{kind}_proj", rows // len(halves), columns)
            expert = number if part.expert is None else None
            yield Piece(tensor, entries, True, expert, part.is_fused, half)


def _with_group_size(form: Form, tensors: Iterable[StoredTensor]) -> Form:
    if form.name != "w4a16":
        return form
    widths: dict[int, StoredTensor] = {}
    for tensor in tensors:
        name = text_name(tensor.name)
        if name is not None and form.quantization.covers(name):
            part = ExpertPart.of(name)
            widths.setdefault(tensor.shape[-2 if part is not None and part.is_fused else -1], tensor)
    sizes = [form.group_size] if form.group_size else list(GROUP_SIZES)
    fitting = [size for size in sizes if all(width % size == 0 for width in widths)]
    if fitting:
        return replace(form, group_size=fitting[0])
    width = next(width for width in widths if width % sizes[-1])
    raise RequestError(
        f"w4a16: {widths[width].name} has {width} columns, no multiple of a group of {sizes[-1]}; "
        f"{'a smaller --group-size or ' if form.group_size > GROUP_SIZES[-1] else ''}--to w8a16 or fp8 would do"
    )


def _ignored(found: Iterable[Piece]) -> Iterator[str]:
    """Linear modules among what is copied; the head also where it is not stored, being tied to the embeddings."""
    has_head, prefix = False, ""
    for piece in found:
        name = piece.source.name
        if name.endswith("embed_tokens.weight"):
            prefix = name.removesuffix("model.embed_tokens.weight")
        elif not piece.is_quantized and name.endswith(".weight") and len(piece.source.shape) == 2:
            has_head |= name.endswith("lm_head.weight")
            yield name.removesuffix(".weight")
    if not has_head:
        yield f"{prefix}lm_head"
