"""What a checkpoint folder or a saved context holds, and what is damaged in it: one report, for people and as JSON.

Changes nothing. All that is read is untrusted: a part that cannot be read becomes a line of damage, and the rest is
still shown. Prints nothing and exits nowhere.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from l4ctx.contexts.folder import FILE as MANIFEST
from l4ctx.contexts.folder import FORMAT, VERSION
from l4ctx.contexts.manifest import read_manifest, saved_checkpoint
from l4ctx.errors import CHECKPOINT, CONTEXT, UsageError, name_of_known
from l4ctx.model_folder import what_it_is
from model.config import ConfigError, TextConfig
from model.costs import parameter_count
from model.vision.config import VisionConfig

if TYPE_CHECKING:
    from l4ctx.checkpoint.tokenizer import Tokenizer
    from l4ctx.contexts.reader import Context
    from l4ctx.contexts.states import State
    from l4ctx.spans import ImageSpan, Span
    from model.weights.shards import StoredTensor

CONFIG, INDEX, SHARD = "config.json", "model.safetensors.index.json", "model.safetensors"
READ_WHOLE = (
    CONFIG,
    INDEX,
    SHARD,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    MANIFEST,
    "head.json",
)
"""Names under which a pipe or a device would be read without end."""

PIECE_BYTES = 16 * 2**20
BF16_BYTES = 2

T = TypeVar("T")
P = ParamSpec("P")
Report = dict[str, Any]


def inspect_folder(path: str, *, verify: bool) -> Report:
    """What is in a checkpoint or a context, as the object that --json prints; `verify` reads every byte.

    Raises UsageError for a path that is neither.
    """
    folder = Path(path)
    if not path:
        raise UsageError("the path is empty")
    if not any(os.path.lexists(folder / name) for name in (CONFIG, MANIFEST)):
        neither = f"neither a checkpoint, which has {CONFIG}, nor a saved context, which has {MANIFEST}; it is "
        raise UsageError(f"{path}: {neither if os.path.isdir(path) else ''}{what_it_is(folder)}")
    try:
        names = os.listdir(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    is_model = CONFIG in names
    report: Report = {"kind": "model" if is_model else "context", "path": path, "verified": verify, "damage": []}
    for name in READ_WHOLE:
        if (folder / name).exists() and not (folder / name).is_file():
            _add_damage(report, folder / name, "not a regular file")
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch's, which we use without
    if not report["damage"]:
        (_inspect_model if is_model else _inspect_context)(folder, report, verify)
    report["damage"] = list({entry["what"]: entry for entry in report["damage"]}.values())
    return report


def exit_code(report: Report) -> int:
    if not report["damage"]:
        return 0
    return CHECKPOINT if report["kind"] == "model" else CONTEXT


def _add_damage(report: Report, file: Path, what: str) -> None:
    report["damage"].append({"file": str(file), "what": f"{file}: {what}"})


def _attempt(report: Report, file: Path, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """What `work` returns, or None and a line of damage: untrusted files can be broken in any way."""
    try:
        return work(*args, **kwargs)
    except Exception as error:  # the readers' own errors, and whatever else a broken file makes them raise
        if name_of_known(error) and str(error):
            report["damage"].append({"file": str(file), "what": str(error)})
        else:
            _add_damage(report, file, f"cannot be used ({type(error).__name__}: {error})")
        return None


# Checkpoints


def _inspect_model(folder: Path, report: Report, verify: bool) -> None:
    from l4ctx.checkpoint.chat_template import ChatTemplate, check_template
    from l4ctx.checkpoint.generation_config import GenerationConfig
    from l4ctx.checkpoint.tokenizer import Tokenizer, read_json
    from model.weights.loading import can_be_mapped, checked_tensors
    from model.weights.shards import unused_weights

    raw = _attempt(report, folder / CONFIG, read_json, folder / CONFIG)
    config = None if raw is None else _attempt(report, folder / CONFIG, TextConfig.from_folder, folder)
    shown = config or _without_quantization(raw or {})
    names = (raw or {}).get("architectures")
    report["architecture"] = ", ".join(map(str, names)) if isinstance(names, list) else None
    report["config"] = shown and _config_fields(shown)

    before = len(report["damage"])
    shards = _attempt(report, folder / INDEX, _shards, folder)
    weights = report["weights"] = None if shards is None else _weights(report, shards, verify)
    is_sound = bool(shards) and len(report["damage"]) == before
    tensors = _attempt(report, folder, checked_tensors, folder, config) if is_sound and config else None
    if weights is not None:
        weights["not_read"] = _attempt(report, folder, unused_weights, folder)
        weights["can_be_mapped"] = None if tensors is None else can_be_mapped(tensors)

    tokenizer = None
    if shards != [] or (folder / "tokenizer.json").exists():  # a lone config.json is not a damaged checkpoint
        tokenizer = _attempt(
            report,
            folder / "tokenizer.json",
            Tokenizer.from_folder,
            folder,
            None if shown is None else shown.vocab_size,
        )
    report["tokenizer_vocabulary"] = tokenizer and tokenizer.vocab_size
    vision = None if raw is None else _attempt(report, folder / CONFIG, VisionConfig.from_folder, folder)
    is_readable = weights is not None and 0 < weights["shards"] == weights["readable_shards"]
    report["vision"] = vision and asdict(vision) | {
        "tokens_per_tile": vision.tokens_per_tile,
        "has_tensors": weights["vision_tensors"] > 0 if weights and is_readable else None,
    }
    if vision and report["vision"]["has_tensors"] is not False:
        _check_vision(folder, report, vision, shown, tokenizer)
    before = len(report["damage"])
    template = _attempt(report, folder, ChatTemplate.from_folder, folder)
    report["chat_template"] = template is not None or (None if len(report["damage"]) > before else False)
    if template is not None:
        _attempt(report, folder, template.split, system=False)
    if tokenizer and len(report["damage"]) == before:
        _attempt(report, folder / "tokenizer.json", check_template, tokenizer, template)
    generation = None  # it looks into config.json, too
    if raw is not None:
        generation = _attempt(report, folder / "generation_config.json", GenerationConfig.from_folder, folder)
    report["stop_tokens"] = generation and sorted(generation.stop_tokens)
    if generation and shown:
        _attempt(report, folder / "generation_config.json", generation.check, shown.vocab_size)


def _check_vision(
    folder: Path, report: Report, vision: VisionConfig, text: TextConfig | None, tokenizer: Tokenizer | None
) -> None:
    """All that `l4ctx ask` checks before it reads images, as far as the rest of the checkpoint can be read."""
    from l4ctx.checkpoint.image_processor import ImageProcessing
    from l4ctx.vision.tokens import ImageTokens
    from model.weights.loading import checked_vision_tensors

    if text and report["vision"]["has_tensors"]:
        _attempt(report, folder, checked_vision_tensors, folder, vision, text.hidden_size)
    if text and vision.image_token_index >= text.vocab_size:
        _add_damage(
            report,
            folder / CONFIG,
            f"image_token_index is {vision.image_token_index:,}, but there are only "
            f"{text.vocab_size:,} tokens (vocab_size)",
        )
    _attempt(report, folder, ImageProcessing.from_folder, folder, vision.image_size)
    if tokenizer:
        _attempt(
            report,
            folder / "tokenizer.json",
            ImageTokens.from_tokenizer,
            tokenizer,
            vision.tokens_per_tile,
            vision.image_token_index,
        )


def _without_quantization(raw: dict[str, Any]) -> TextConfig | None:
    """The rest of a configuration that is refused for its quantization."""
    plain = {name: value for name, value in raw.items() if name != "quantization_config"}
    text = raw.get("text_config")
    if isinstance(text, dict):
        plain["text_config"] = {name: value for name, value in text.items() if name != "quantization_config"}
    try:
        return TextConfig.from_dict(plain) if plain != raw else None
    except ConfigError:
        return None


def _config_fields(config: TextConfig) -> Report:
    from cache.layout import bytes_per_token, layer_bytes_per_token

    window = config.attention_chunk_size * layer_bytes_per_token(config, BF16_BYTES)
    fields = asdict(config)
    del fields["torch_dtype"]  # not checked, not used: what is stored counts
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
    from model.weights.shards import DTYPES

    dtypes: Counter[str] = Counter()  # tensors of the text model
    sums: Counter[str] = Counter()
    for shard in shards:
        tensors = _attempt(report, shard, _header, shard)
        sums["readable_shards"] += tensors is not None
        for tensor in tensors or ():
            owner = _owner(tensor)
            sums[f"{owner}tensors"] += 1
            sums[f"{owner}bytes"] += tensor.num_bytes
            if not owner:
                dtypes[tensor.dtype] += 1
                if tensor.dtype in DTYPES:
                    sums["parameters"] += tensor.num_bytes // DTYPES[tensor.dtype].itemsize
        if verify and tensors:
            _attempt(report, shard, _check_numbers, report, shard, tensors)
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
    """Of a tensor that is not the text model's: the vision part, or nobody."""
    from model.weights.shards import IGNORED_PREFIXES

    if tensor.name.removeprefix("language_model.").startswith(IGNORED_PREFIXES):
        return "vision_"
    return "ignored_" if tensor.name.endswith("rotary_emb.inv_freq") else ""


def _header(shard: Path) -> list[StoredTensor]:
    """A shard's tensors, in the order in which they lie in it. Raises CheckpointError and SafetensorError."""
    from safetensors import safe_open

    from model.weights.shards import CheckpointError, read_header

    if not shard.is_file():
        raise CheckpointError(f"{shard}: missing shard; download it again")
    tensors = read_header(shard)
    with safe_open(shard, framework="pt"):  # it refuses overlaps, gaps, and places outside the file
        return sorted(tensors.values(), key=lambda tensor: tensor.offset)


def _check_numbers(report: Report, shard: Path, tensors: list[StoredTensor]) -> None:
    """Reads the tensors, a piece at a time, and names those that hold NaN or infinities. Raises OSError."""
    import torch

    from model.weights.shards import DTYPES

    buffer = bytearray(PIECE_BYTES)
    with shard.open("rb") as stream:
        for tensor in tensors:
            dtype = DTYPES.get(tensor.dtype, torch.uint8)
            nans = infinities = 0
            stream.seek(tensor.offset)
            for start in range(0, tensor.num_bytes, PIECE_BYTES):
                size = min(PIECE_BYTES, tensor.num_bytes - start)
                if stream.readinto(memoryview(buffer)[:size]) != size:
                    _add_damage(report, shard, f"cut short inside tensor {tensor.name}; download it again")
                    return
                piece = torch.frombuffer(buffer, dtype=dtype, count=size // dtype.itemsize)
                if not piece.isfinite().all():
                    nans += int(piece.isnan().sum())
                    infinities += int(piece.isinf().sum())
            if nans or infinities:
                _add_damage(
                    report,
                    shard,
                    f"tensor {tensor.name} holds {nans:,} NaN and {infinities:,} infinities; download it again",
                )


# Saved contexts


def _inspect_context(folder: Path, report: Report, verify: bool) -> None:
    from l4ctx.contexts.locks import is_being_written
    from l4ctx.contexts.reader import Context

    with _reading(folder):
        report |= {"is_being_written": is_being_written(folder), "others_have_rights_on": _open_to_others(folder)}
        recipe = _attempt(report, folder / MANIFEST, read_manifest, folder)
        report |= {
            "format": FORMAT,
            "version": VERSION if recipe else None,
            "made_with": recipe and asdict(recipe),
            "checkpoint": recipe and _path_of_checkpoint(folder),
            "states": [],
            "bytes": None,
        }
        context = None if recipe is None else _attempt(report, folder, Context.read, folder)
        if context is None:
            return
        report["bytes"] = _bytes_on_disk(context)
        bad: set[str] = set()
        for stored in dict.fromkeys(stored for state in context.usable for stored in state.needs):
            file = context.file(stored)
            before = len(report["damage"])
            _attempt(report, folder / stored.name, file.verify if verify else file.check_size)
            if len(report["damage"]) > before:
                bad.add(stored.name)
        report["states"] = [_state(report, context, state, bad) for state in context.usable]


def _open_to_others(folder: Path) -> list[str]:
    """Names in the context, "." for the folder, that others than the owner may read, change or search."""
    from l4ctx.contexts.folder import BLOCKS
    from l4ctx.machine.private import is_open_to_others

    found = []
    for path in (folder, *(path for part in (folder, folder / BLOCKS) if part.is_dir() for path in part.iterdir())):
        with suppress(OSError):  # a writer may have removed it
            if is_open_to_others(path):
                found.append(path.relative_to(folder).as_posix())
    return sorted(found)


def _path_of_checkpoint(folder: Path) -> str | None:
    known = saved_checkpoint(folder)
    return None if known is None else str(known)


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Within it no file that the journal names is deleted, where the folder lets us say so."""
    from l4ctx.contexts.locks import readers_lock

    lock = readers_lock(folder)
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def _state(report: Report, context: Context, state: State, bad: set[str]) -> Report:
    """One set of documents; `bad` are the names of damaged files, to which those found here are added."""
    spans = images = None
    if state.ids.name not in bad:
        spans = _attempt(report, context.folder / state.ids.name, _documents, context, state)
        images = _attempt(report, context.folder / state.ids.name, _images, context, state)
        bad |= {state.ids.name} if spans is None or images is None else set()
    return {
        "is_newest": state is context.states[-1],
        "is_complete": state.is_complete,
        "tokens": state.tokens,
        "kept_tokens": state.kept(context.recipe.block_tokens),
        "sealed_blocks": len(state.blocks),
        "has_system_prompt": state.system,
        "documents": spans
        and [{"path": span.source, "tokens": span.stop - span.start, "sha256": span.sha256} for span in spans],
        "images": images
        and [{"start": span.start, "tokens": span.stop - span.start, "sha256": span.sha256} for span in images],
        "damaged": [stored.name for stored in state.needs if stored.name in bad],
        "can_keep_tokens": _can_keep(state, context.recipe.block_tokens, bad),
    }


def _documents(context: Context, state: State) -> list[Span]:
    """Raises DiskError, also where token ids and documents are not those of the state."""
    from cache.disk import DiskError

    file = context.file(state.ids)
    ids = file.units.get("ids")
    if ids is None or ids.nbytes != 4 * state.tokens:
        raise DiskError(f"{file.source}: damaged: it does not hold {state.tokens:,} token ids")
    spans = context.documents(state)
    if any(not 0 <= span.start <= span.stop <= state.tokens for span in spans):
        raise DiskError(f"{file.source}: damaged: a document lies outside the {state.tokens:,} tokens")
    return spans


def _images(context: Context, state: State) -> list[ImageSpan]:
    """Raises DiskError, also where an image is not among the tokens of the state."""
    from cache.disk import DiskError

    images = context.images(state)
    if any(not 0 <= image.start <= image.stop <= state.tokens for image in images):
        raise DiskError(f"{context.file(state.ids).source}: damaged: an image lies outside the {state.tokens:,} tokens")
    return images


def _can_keep(state: State, block_tokens: int, bad: set[str]) -> int:
    """Tokens that `l4ctx prefill --verify` need not read anew: those before the first damaged block."""
    if state.ids.name in bad:
        return 0
    if not any(stored.name in bad for stored in state.needs):
        return state.kept(block_tokens)
    return block_tokens * next((n for n, block in enumerate(state.blocks) if block.name in bad), len(state.blocks))


def _bytes_on_disk(context: Context) -> dict[str, int]:
    """By what the files hold; `unused` is what no state needs, a file that is being written among it."""
    from l4ctx.contexts.folder import BLOCKS
    from l4ctx.contexts.states import is_ours

    needed = {stored.name for state in context.usable for stored in state.needs}
    sizes = dict.fromkeys(("blocks", "token_ids", "tails", "unused", "other"), 0)
    for prefix in ("", f"{BLOCKS}/"):
        with suppress(OSError), os.scandir(context.folder / prefix) as entries:
            for entry in entries:
                name = prefix + entry.name
                kind = _kind(name) if name in needed else "unused" if is_ours(name) else "other"
                with suppress(FileNotFoundError):  # a writer may be at work
                    sizes[kind] += entry.stat(follow_symlinks=False).st_size * entry.is_file(follow_symlinks=False)
    return sizes


def _kind(name: str) -> str:
    return "token_ids" if name.startswith("tokens-") else "tails" if name.startswith("tail-") else "blocks"
