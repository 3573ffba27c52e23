"""What a benchmark is asked to measure, checked against the model's configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from l4ctx.inspection.model_folder import check_model_folder
from model.checkpoint_files import checkpoint_files
from model.config import TextConfig
from model.folder import CONFIG, read_json


@dataclass(frozen=True)
class BenchRequest:
    """What to measure. Either `model` or `config` is given."""

    lengths: tuple[int, ...]  # tokens, ascending
    lengths_are_given: bool = True  # by the user; default lengths are shortened to the model's positions
    model: Path | None = None
    config: Path | None = None  # a config.json, or its folder: random weights
    decode_tokens: int = 32
    rounds: int = 3
    dtype: str = "auto"
    device: str = "auto"
    attention: str | None = None
    prefill_chunk_size: int | None = None
    compares_transformers: bool = False
    llama_bench: str | None = None  # path of the program
    gguf_files: tuple[Path, ...] = ()
    ceilings: bool = True


def read_config(request: BenchRequest) -> tuple[dict[str, Any], TextConfig]:
    """The content of config.json, and the configuration that it describes. Raises ConfigError."""
    where = request.model or request.config
    assert where is not None
    if request.model is not None:
        check_model_folder(where)
    file = where / "config.json" if request.model is not None or where.is_dir() else where
    config = (
        TextConfig.from_folder(where)
        if file != where
        else TextConfig.from_file(file, f"{file}: no such file; a config.json is expected")
    )
    return (read_json(file) if request.model is None else checkpoint_files(where).json(CONFIG)), config


def fitted_to_positions(request: BenchRequest, config: TextConfig, note: Callable[[str], None]) -> BenchRequest:
    """The request with default lengths shortened to what the model has positions for.

    Raises PromptLengthError for a length that the user gave.
    """
    positions, lengths = config.max_position_embeddings, request.lengths
    longest, room = lengths[-1] + request.decode_tokens + 1, positions - request.decode_tokens - 1
    if longest <= positions:
        return request
    if request.lengths_are_given or room <= 1:
        from l4ctx.prompt.builder import PromptLengthError

        raise PromptLengthError(
            f"--tokens {lengths[-1]}: with the decoded tokens that is {longest:,}, "
            f"and the model has {positions:,} positions"
        )
    shortened = [f"{tokens:,}" for tokens in lengths if tokens > room]
    note(f"{room:,} tokens are read instead of {' and '.join(shortened)}: the model has {positions:,} positions")
    return replace(request, lengths=tuple(sorted({min(tokens, room) for tokens in lengths})))
