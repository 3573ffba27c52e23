"""Readers of GGUF files: headers, metadata, tensor infos, and what they say of configuration and tokenizer."""

from __future__ import annotations

import functools
import random
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fuzz.checkpoint_readers import CODES, tokenizers, weights
from fuzz.inputs import Files, Reader, one_of
from fuzz.mutation import INTEGERS, mutate_bytes
from support.gguf_headers import ARRAY, BOOL, F32, I32, STRING, U32, File, key, tensor, value

MODEL, VISION = "model.gguf", "mmproj-model.gguf"


@functools.cache
def small() -> Mapping[str, Files]:
    """Headers written byte by byte: all types of metadata, a tokenizer, tensors, a vision tower."""
    keys = [
        key("general.architecture", STRING, "llama4"), key("general.alignment", U32, 32),
        *(key(f"llama4.{name}", U32, size) for name, size in {
            "block_count": 1, "context_length": 256, "embedding_length": 8, "feed_forward_length": 12,
            "expert_feed_forward_length": 10, "attention.head_count": 2, "attention.head_count_kv": 1,
            "attention.key_length": 4, "attention.value_length": 4, "rope.dimension_count": 4, "expert_count": 2,
            "expert_used_count": 1, "interleave_moe_layer_step": 1, "vocab_size": 6}.items()),
        key("llama4.attention.layer_norm_rms_epsilon", F32, 1e-5), key("llama4.rope.freq_base", F32, 500000.0),
        key("tokenizer.ggml.model", STRING, "gpt2"), key("tokenizer.ggml.pre", STRING, "llama4"),
        key("tokenizer.ggml.tokens", ARRAY, (STRING, ["a", "b", "ab", "<s>", "</s>", "c"])),
        key("tokenizer.ggml.token_type", ARRAY, (I32, [1, 1, 1, 3, 3, 1])),
        key("tokenizer.ggml.merges", ARRAY, (STRING, ["a b"])),
        key("tokenizer.ggml.bos_token_id", U32, 3), key("tokenizer.ggml.eos_token_id", U32, 4),
        key("tokenizer.ggml.add_bos_token", BOOL, True), key("tokenizer.chat_template", STRING, "{{ bos_token }}"),
    ]  # fmt: skip
    entries = [
        tensor("token_embd.weight", (6, 8), 0),
        tensor("output_norm.weight", (8,), 192),
        tensor("rope_freqs.weight", (2,), 224),
        tensor("blk.0.attn_q.weight", (8, 8), 256),
    ]
    content = File(keys, entries, bytes(224) + struct.pack("<2f", 1.0, 2.0) + bytes(280)).content()
    vision = [
        key("general.architecture", STRING, "clip"), key("clip.vision.projector_type", STRING, "llama4"),
        *(key(f"clip.vision.{name}", U32, size) for name, size in {
            "image_size": 28, "patch_size": 14, "embedding_length": 16, "feed_forward_length": 64, "block_count": 1,
            "attention.head_count": 2, "projector.scale_factor": 2}.items()),
    ]  # fmt: skip
    tower = File(vision, [tensor("v.class_embd", (16,), 0), tensor("mm.model.fc.weight", (8, 12), 64)], bytes(512))
    return {"small": {MODEL: content}, "with a vision tower": {MODEL: content, VISION: tower.content()}}


@functools.cache
def models() -> Mapping[str, Files]:
    """Whole models, written by the format's own library."""
    from support.gguf_files import all_in, write_gguf

    found: dict[str, Files] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, content in {**tokenizers()["llama"], **weights()["single"]}.items():
            (folder / name).write_bytes(content)
        for form in ("F32", "F16", "Q8_0"):
            write_gguf(folder / MODEL, folder, all_in(form) if form != "Q8_0" else _by_rows, with_tokenizer=True)
            found[form] = {MODEL: (folder / MODEL).read_bytes()}
    return found


def _by_rows(name: str, shape: tuple[int, ...]) -> str:
    return "Q8_0" if len(shape) > 1 and shape[-1] % 32 == 0 and "gate_inp" not in name else "F32"


class _Parts(NamedTuple):
    """A header in parts: what may be changed without making nonsense of all that follows."""

    keys: list[bytes]  # name and value
    tensors: list[bytes]
    data: bytes


def _parts(content: bytes) -> _Parts:
    """Raises struct.error and IndexError for a header that is broken already."""
    tensors, keys = struct.unpack_from("<QQ", content, 8)
    at, found = 24, _Parts([], [], b"")

    def string(at: int) -> int:
        return at + 8 + struct.unpack_from("<Q", content, at)[0]

    def behind(kind: int, at: int) -> int:
        if kind == STRING:
            return string(at)
        if kind == ARRAY:
            of, count = struct.unpack_from("<IQ", content, at)
            at += 12
            for _ in range(min(count, len(content))):
                at = behind(of, at)
            return at
        return at + _SIZES[kind]

    for _ in range(min(keys, 1000)):
        name = string(at)
        end = behind(struct.unpack_from("<I", content, name)[0], name + 4)
        found.keys.append(content[at:end])
        at = end
    for _ in range(min(tensors, 1000)):
        name = string(at)
        end = name + 4 + 8 * struct.unpack_from("<I", content, name)[0] + 12
        found.tensors.append(content[at:end])
        at = end
    return found._replace(data=content[at + -at % 32 :])


_SIZES = (1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8)


def _hostile_value(draw: random.Random) -> bytes:
    """A value of any type, with its type."""
    kind = draw.choice((U32, U32, I32, F32, BOOL, STRING, ARRAY, 10, 11, 12, 0, 3))
    if kind == STRING:
        return value(STRING, draw.choice((b"", b"llama", b"\xff\xfe", b"x" * 70_000, b"\0", "\u202e".encode())))
    if kind == ARRAY:
        of = draw.choice((U32, F32, STRING, 0))
        one = "x" if of == STRING else draw.randrange(4)
        return value(ARRAY, (of, [one] * draw.choice((0, 1, 2, 6, 3000))))
    if kind in (F32, 12):
        return value(kind, draw.choice((0.0, -1.0, 1e-30, 1e38, float("nan"), float("inf"))))
    return value(kind, draw.choice((0, 1, 2, 3, 2 ** (8 * _SIZES[kind] - 1) - 1)) % 2 ** (8 * _SIZES[kind] - 1))


def mutate_gguf(draw: random.Random, content: bytes) -> bytes:
    """One key or tensor changed, gone, twice or moved, with the counts made right; or bytes of the header."""
    if draw.randrange(4) == 0:
        return mutate_bytes(draw, content, max(content.rfind(b".weight"), 24) + 64)
    try:
        parts = _parts(content)
        entries = draw.choice((parts.keys, parts.keys, parts.tensors))
        at = draw.randrange(len(entries))
    except (struct.error, IndexError, ValueError, OverflowError, RecursionError):
        return mutate_bytes(draw, content, 200)
    entry = entries[at]
    name = 8 + struct.unpack_from("<Q", entry)[0]
    match draw.randrange(6):
        case 0 | 1 if entries is parts.keys:
            entries[at] = entry[:name] + _hostile_value(draw)
        case 0 | 1:  # its shape, type or place
            place = draw.randrange(name, len(entry) - 3)
            entries[at] = (entry[:place] + struct.pack("<Q", draw.choice(INTEGERS)) + entry[place + 8 :])[: len(entry)]
        case 2:
            del entries[at]
        case 3:
            entries.insert(draw.randrange(len(entries)), entry)
        case 4:
            entries[at] = mutate_bytes(draw, entry)
        case _:
            other = draw.randrange(len(entries))
            entries[at], entries[other] = entries[other], entries[at]
    return File(parts.keys, parts.tensors, parts.data).content()


def read_headers(folder: Path) -> None:
    from model.checkpoint_files import GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, checkpoint_files
    from model.config import TextConfig
    from model.vision.config import VisionConfig

    config = TextConfig.from_folder(folder)
    files = checkpoint_files(folder)
    for name in (TOKENIZER_CONFIG, GENERATION_CONFIG):
        files.json(name)
    files.content(TOKENIZER)
    VisionConfig.from_folder(folder)
    from model.costs import parameter_count

    parameter_count(config)


def read_model(folder: Path) -> None:
    from l4ctx.checkpoint.chat_template import ChatTemplate
    from l4ctx.checkpoint.generation_config import GenerationConfig
    from l4ctx.checkpoint.tokenizer import Tokenizer
    from model.config import TextConfig
    from model.weights.loading import checked_sources, load_checkpoint

    config = TextConfig.from_folder(folder)
    checked_sources(folder, config)
    load_checkpoint(folder, dtype="float32")
    GenerationConfig.from_folder(folder).check(config.vocab_size)
    ChatTemplate.from_folder(folder)
    Tokenizer.from_folder(folder, config.vocab_size).encode_data("The access code\n")


CHANGES = ("gguf", mutate_gguf)
READERS = (
    Reader("gguf_header", small, one_of(CHANGES), read_headers, CODES, share=120),
    Reader("gguf_model", models, one_of(CHANGES), read_model, CODES, share=8),
)
