"""Inspects a checkpoint, a folder or GGUF files: its contents and its damage."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from l4ctx.confinement.sandbox import MEANS
from l4ctx.inspection.report import Report, add_damage, attempt
from model.checkpoint_files import TOKENIZER, GgufFiles, checkpoint_files
from model.config import TextConfig
from model.costs import parameter_count
from model.folder import CONFIG, INDEX
from model.gguf.config import config_of
from model.gguf.header import is_gguf
from model.gguf.names import GGUF_VISION_PREFIXES, ROPE_FACTORS
from model.vision.config import VisionConfig

if TYPE_CHECKING:
    from l4ctx.checkpoint.tokenizer import Tokenizer
    from model.weights.sources import StoredTensor, WeightSource


PIECE_BYTES = 16 * 2**20
BF16_BYTES = 2


def inspect_model(folder: Path, report: Report, verify: bool) -> None:
    from l4ctx.checkpoint.chat_template import ChatTemplate, check_template
    from l4ctx.checkpoint.generation_config import GenerationConfig
    from l4ctx.checkpoint.tokenizer import Tokenizer, read_settings
    from model.weights.loading import checked_sources
    from model.weights.shards import unused_weights

    files = attempt(report, folder, checkpoint_files, folder)
    if files is None:
        return
    raw = attempt(report, files.place(CONFIG), read_settings, files, CONFIG)
    config = None if raw is None else attempt(report, folder / CONFIG, TextConfig.from_folder, folder)
    names = (raw or {}).get("architectures")
    report["architecture"] = ", ".join(map(str, names)) if isinstance(names, list) else None
    if isinstance(files, GgufFiles):
        report["architecture"] = f"{files.model.metadata.get('general.architecture')} (GGUF)"
        report["assumed"] = list(config_of(files.model).assumed) if config else []
    report["config"] = config and _config_fields(config)

    before = len(report["damage"])
    shards = attempt(report, folder / INDEX, _shards, folder)
    weights = report["weights"] = None if shards is None else _weights(report, shards, verify)
    is_sound = bool(shards) and len(report["damage"]) == before
    sources = attempt(report, folder, checked_sources, folder, config) if is_sound and config else None
    if weights is not None:
        weights["not_read"] = attempt(report, folder, unused_weights, folder)

    tokenizer = None
    if shards != [] or files.place(TOKENIZER).exists():  # a lone config.json is not a damaged checkpoint
        tokenizer = attempt(
            report,
            folder / "tokenizer.json",
            Tokenizer.from_folder,
            folder,
            None if config is None else config.vocab_size,
        )
    report["tokenizer_vocabulary"] = tokenizer and tokenizer.vocab_size
    vision = None if raw is None else attempt(report, folder / CONFIG, VisionConfig.from_folder, folder)
    is_readable = weights is not None and 0 < weights["shards"] == weights["readable_shards"]
    report["vision"] = vision and asdict(vision) | {
        "tokens_per_tile": vision.tokens_per_tile,
        "has_tensors": weights["vision_tensors"] > 0 if weights and is_readable else None,
    }
    vision_sources = None
    if vision and report["vision"]["has_tensors"] is not False:
        vision_sources = _check_vision(folder, report, vision, config, tokenizer)
    if weights is not None:
        weights |= _stored_forms(folder, sources, vision_sources)
    before = len(report["damage"])
    template = attempt(report, folder, ChatTemplate.from_folder, folder)
    report["chat_template"] = template is not None or (None if len(report["damage"]) > before else False)
    report["confinement"] = _confinement()
    if template is not None:
        attempt(report, folder, template.split, system=False)
    if tokenizer and len(report["damage"]) == before:
        attempt(report, folder / "tokenizer.json", check_template, tokenizer, template)
    generation = None  # also reads config.json
    if raw is not None:
        generation = attempt(report, folder / "generation_config.json", GenerationConfig.from_folder, folder)
    report["stop_tokens"] = generation and sorted(generation.stop_tokens)
    if generation and config:
        attempt(report, folder / "generation_config.json", generation.check, config.vocab_size)


def _confinement() -> dict[str, bool] | None:
    """What confines templates and tokenizers of strangers here; None where no such process can be started."""
    from l4ctx.checkpoint.chat_template import CHILD
    from l4ctx.confinement.process import NoChildError, RefusedError

    try:
        held = CHILD.held()
    except (NoChildError, RefusedError):
        return None
    return {"limits": True} | {name: name in held for name in MEANS}


def _check_vision(
    folder: Path, report: Report, vision: VisionConfig, text: TextConfig | None, tokenizer: Tokenizer | None
) -> dict[str, WeightSource] | None:
    """The checks that `l4ctx ask` makes before it reads images, where the rest of the checkpoint is readable.

    Returns how the vision tower's weights are stored, None if that is not known.
    """
    from l4ctx.checkpoint.image_processor import ImageProcessing
    from l4ctx.vision.tokens import ImageTokens
    from model.weights.loading import checked_vision_sources

    sources = None
    if text and report["vision"]["has_tensors"]:
        sources = attempt(report, folder, checked_vision_sources, folder, vision, text.hidden_size)
    if text and vision.image_token_index >= text.vocab_size:
        add_damage(
            report,
            folder / CONFIG,
            f"image_token_index is {vision.image_token_index:,}, but there are only "
            f"{text.vocab_size:,} tokens (vocab_size)",
        )
    attempt(report, folder, ImageProcessing.from_folder, folder, vision.image_size)
    if tokenizer:
        attempt(
            report,
            folder / "tokenizer.json",
            ImageTokens.from_tokenizer,
            tokenizer,
            vision.tokens_per_tile,
            vision.image_token_index,
        )
    return sources


def _stored_forms(folder: Path, text: dict[str, WeightSource] | None, vision: dict[str, WeightSource] | None) -> Report:
    """How weights are stored, as a sentence and by owner; nothing where that could not be made out."""
    from model.weights.census import census, description
    from model.weights.settings import quantization_settings

    if text is None:
        return {"stored_as": None, "by_owner": []}
    sources = text | (vision or {})
    return {
        "stored_as": description(sources, quantization_settings(folder)),
        "by_owner": [
            {
                "owner": share.owner,
                "stored": share.stored,
                "parameters": share.parameters,
                "bytes": share.num_bytes,
            }
            for share in census(sources)
        ],
        "parameters": sum(source.parameters for source in text.values()),
    }


def _config_fields(config: TextConfig) -> Report:
    from cache.layout import bytes_per_token, layer_bytes_per_token

    window = config.attention_chunk_size * layer_bytes_per_token(config, BF16_BYTES)
    fields = asdict(config)
    del fields["torch_dtype"]  # neither checked nor used: the stored tensors decide
    return fields | {
        "parameters": parameter_count(config),
        "num_rope_layers": config.num_rope_layers,
        "num_nope_layers": config.num_nope_layers,
        "kv_bytes_per_token_bf16": bytes_per_token(config, BF16_BYTES),
        "window_bytes_bf16": config.num_rope_layers * window,
    }


def _shards(folder: Path) -> list[Path]:
    """Raises CheckpointError."""
    from model.weights.shards import shard_files

    return shard_files(folder)


def _weights(report: Report, shards: list[Path], verify: bool) -> Report:
    from model.quantization.gguf_types import BY_NAME
    from model.weights.mapping import DTYPES
    from model.weights.plain import DTYPE_NAMES

    dtypes: Counter[str] = Counter()  # tensors of the text model
    sums: Counter[str] = Counter()
    for shard in shards:
        tensors = attempt(report, shard, _header, shard)
        sums["readable_shards"] += tensors is not None
        for tensor in tensors or ():
            owner = _owner(tensor)
            sums[f"{owner}tensors"] += 1
            sums[f"{owner}bytes"] += tensor.num_bytes
            if not owner:
                dtypes[tensor.dtype] += 1
                if tensor.dtype in DTYPE_NAMES:
                    sums["parameters"] += tensor.num_bytes // DTYPES[tensor.dtype].itemsize
                elif tensor.dtype in BY_NAME:
                    sums["parameters"] += math.prod(tensor.shape)
        if verify and tensors:
            attempt(report, shard, _check_numbers, report, shard, tensors)
    names = (
        "readable_shards",
        "parameters",
        "tensors",
        "bytes",
        "vision_tensors",
        "vision_bytes",
        "ignored_tensors",
        "ignored_bytes",
    )
    return {"shards": len(shards), "dtypes": dict(dtypes)} | {name: sums[name] for name in names}


def _owner(tensor: StoredTensor) -> str:
    """Prefix of the report's keys: the vision part's tensors, ignored ones, or none for the text model's."""
    from model.weights.companions import skipped
    from model.weights.shards import IGNORED_PREFIXES

    if tensor.name.removeprefix("language_model.").startswith((*IGNORED_PREFIXES, *GGUF_VISION_PREFIXES)):
        return "vision_"
    is_left_out = tensor.name.endswith("rotary_emb.inv_freq") or tensor.name == ROPE_FACTORS or skipped(tensor.name)
    return "ignored_" if is_left_out else ""


def _header(shard: Path) -> list[StoredTensor]:
    """A shard's tensors in file order. Raises CheckpointError."""
    from model.errors import CheckpointError
    from model.weights.gguf import stored_in
    from model.weights.shards import read_header

    if not shard.is_file():
        raise CheckpointError(f"{shard}: missing shard; download it again")
    tensors = stored_in(shard) if is_gguf(shard) else list(read_header(shard).values())
    return sorted(tensors, key=lambda tensor: tensor.offset)


def _check_numbers(report: Report, shard: Path, tensors: list[StoredTensor]) -> None:
    """Reads the tensors piece by piece and reports those that contain NaN or infinities. Raises OSError."""
    import torch

    from model.weights.mapping import DTYPES
    from model.weights.plain import DTYPE_NAMES

    buffer = bytearray(PIECE_BYTES)
    with shard.open("rb") as stream:
        for tensor in tensors:
            dtype = DTYPES[tensor.dtype] if tensor.dtype in DTYPE_NAMES else torch.uint8
            nans = infinities = 0
            stream.seek(tensor.offset)
            for start in range(0, tensor.num_bytes, PIECE_BYTES):
                size = min(PIECE_BYTES, tensor.num_bytes - start)
                if stream.readinto(memoryview(buffer)[:size]) != size:
                    add_damage(report, shard, f"cut short inside tensor {tensor.name}; download it again")
                    return
                piece = torch.frombuffer(buffer, dtype=dtype, count=size // dtype.itemsize)
                if not piece.isfinite().all():
                    nans += int(piece.isnan().sum())
                    infinities += int(piece.isinf().sum())
            if nans or infinities:
                add_damage(
                    report,
                    shard,
                    f"tensor {tensor.name} holds {nans:,} NaN and {infinities:,} infinities; download it again",
                )
