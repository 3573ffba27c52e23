"""A checkpoint's fingerprint: digests of configuration, weights, tokenizer and chat template.

Saved contexts record it. Checkpoints with equal digests compute the same keys and values from a text, as far as a quick
check can tell: weights are sampled, not read in full. Precision, device and a template's date are not part of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4ctx.checkpoint.chat_template import ChatTemplate
from l4ctx.checkpoint.tokenizer import read_settings, special_tokens, tokenizer_content
from model.checkpoint_files import TOKENIZER_CONFIG, checkpoint_files

if TYPE_CHECKING:
    from l4ctx.checkpoint.image_processor import ImageProcessing
    from model.config import TextConfig
    from model.vision.config import VisionConfig
    from model.weights.sources import StoredTensor

FIELDS = ("config", "weights", "tokenizer", "template")
SAMPLE_BYTES = 4096


def fingerprint(path: Path, config: TextConfig, stored: dict[str, StoredTensor]) -> dict[str, str]:
    """The SHA-256, in hex, of each of FIELDS, for a checkpoint whose text model is `config` and `stored`.

    config: every field except `torch_dtype`, as JSON with sorted keys; 8 and 8.0 are equal. Rope factors count only
    where there are some, as they came later than the first contexts.

    weights: for every tensor of the text model, sorted by name: name, stored dtype, shape, and three samples of
    SAMPLE_BYTES from the start, the middle and the end; all bytes of a tensor that is no larger than three samples.
    The division into shards does not matter. A change that misses every sample goes undetected, such as of a few
    weights elsewhere in a large tensor, say of one expert; but training, merging or converting changes all parts of a
    tensor.

    tokenizer: the bytes of `tokenizer.json`, or of what a GGUF file's tokenizer is as one, and the token that begins a
    prompt without a template (or none).

    template: the chat template's source and its special tokens, or that there is no template.

    Raises CheckpointError, TokenizerError and PromptError.
    """
    return {
        "config": _of_config(config),
        "weights": weights_digest(stored),
        "tokenizer": _of_tokenizer(path),
        "template": _of_template(path),
    }


def vision_fingerprint(config: VisionConfig, processing: ImageProcessing, stored: Mapping[str, StoredTensor]) -> str:
    """The SHA-256, in hex, of everything besides its pixels that determines an image's features.

    It is part of each image's digest in a saved context, so that contexts without images do not depend on it.
    """
    fields = [_with_plain_numbers(dataclasses.asdict(part)) for part in (config, processing)]
    return _digest(_json(fields), weights_digest(stored).encode("ascii"))


def _of_config(config: TextConfig) -> str:
    fields = dataclasses.asdict(config)
    del fields["torch_dtype"]
    if config.rope_parameters.factors is None:
        del fields["rope_parameters"]["factors"]
    return _digest(_json(_with_plain_numbers(fields)))


def _with_plain_numbers(value: Any) -> Any:
    """Converts integral floats to int, since equal configurations may have 8 or 8.0."""
    if isinstance(value, dict):
        return {name: _with_plain_numbers(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_with_plain_numbers(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def weights_digest(stored: Mapping[str, StoredTensor]) -> str:
    """See `fingerprint`."""
    by_file: dict[Path, list[str]] = {}
    for name, tensor in stored.items():
        by_file.setdefault(tensor.file, []).append(name)
    digests: dict[str, str] = {}
    for file, names in by_file.items():
        in_order = sorted(names, key=lambda name: stored[name].offset)
        digests.update(zip(in_order, _of_tensors(file, {name: stored[name] for name in in_order}), strict=True))
    return _digest(*(digests[name].encode("ascii") for name in sorted(digests)))


def _of_tensors(file: Path, tensors: dict[str, StoredTensor]) -> list[str]:
    """The digest of each of these tensors, which are in one shard. Raises CheckpointError."""
    from model.errors import CheckpointError

    digests = []
    try:
        with file.open("rb", buffering=0) as shard:
            for name, tensor in tensors.items():
                parts = [_json([name, tensor.dtype, tensor.shape]), b"\n"]
                for start, stop in _samples(tensor.num_bytes):
                    shard.seek(tensor.offset + start)
                    parts.append(shard.read(stop - start))
                    if len(parts[-1]) != stop - start:
                        raise CheckpointError(
                            f"{file}: truncated: it ends inside tensor {tensor.name}; download it again"
                        )
                digests.append(_digest(*parts))
    except (OSError, ValueError, OverflowError) as error:  # the latter two for impossible offsets
        raise CheckpointError(f"{file}: its tensors cannot be read ({error})") from None
    return digests


def _samples(num_bytes: int) -> list[tuple[int, int]]:
    """Start and stop of each sample, in bytes from the start of the tensor."""
    if num_bytes <= 3 * SAMPLE_BYTES:
        return [(0, num_bytes)]
    middle, last = (num_bytes - SAMPLE_BYTES) // 2, num_bytes - SAMPLE_BYTES
    return [(start, start + SAMPLE_BYTES) for start in (0, middle, last)]


def _of_tokenizer(path: Path) -> str:
    """Covers the files that Tokenizer.from_folder reads. Raises TokenizerError."""
    files = checkpoint_files(path)
    content = tokenizer_content(files)
    has_bos = read_settings(files, TOKENIZER_CONFIG).get("add_bos_token") is not False
    bos_token = special_tokens(files).get("bos_token", "<|begin_of_text|>") if has_bos else None
    return _digest(_json(bos_token), b"\n", content)


def _of_template(path: Path) -> str:
    """Raises PromptError."""
    template = ChatTemplate.from_folder(path)
    if template is None:
        return _digest(b"none")
    return _digest(_json({"source": template.source, "special_tokens": template.special_tokens}))


def _json(value: Any) -> bytes:
    """Canonical JSON on one line; ASCII, so that lone surrogates can be encoded."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()
