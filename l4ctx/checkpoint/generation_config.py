"""`generation_config.json`: stop tokens and default sampling parameters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l4ctx.errors import UnusableCheckpointError
from model.bounds import BOUNDS, shown
from model.checkpoint_files import GENERATION_CONFIG, checkpoint_files
from model.folder import CONFIG

MOST_TEMPERATURE = 1e6
"""At which all tokens of a model are as likely as one another."""


class GenerationConfigError(UnusableCheckpointError):
    """A generation_config.json that cannot be used; the message names the file and the field."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters: greedy at temperature 0. `top_k` 0 and `top_p` 1 disable these filters."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None


@dataclass(frozen=True)
class GenerationConfig:
    """The stop tokens and sampling parameters that a checkpoint recommends."""

    stop_tokens: frozenset[int] = frozenset()
    sampling: Sampling = Sampling()

    @classmethod
    def from_folder(cls, path: Path) -> GenerationConfig:
        """Reads it, with stop tokens from config.json as the fallback. Raises GenerationConfigError."""
        files = checkpoint_files(path)
        file = files.place(GENERATION_CONFIG)
        raw = files.object(GENERATION_CONFIG, GenerationConfigError)
        config = files.object(CONFIG, GenerationConfigError)
        text_config = config.get("text_config")
        places = (raw, config, text_config if isinstance(text_config, dict) else {})
        stop: Any = next((place["eos_token_id"] for place in places if place.get("eos_token_id") is not None), [])
        ids = stop if isinstance(stop, list) else [stop]
        most = BOUNDS["vocab_size"].most
        if any(isinstance(i, bool) or not isinstance(i, int) or not -1 <= i <= most for i in ids):  # -1: none
            raise GenerationConfigError(f"{path}: eos_token_id {shown(stop)} is not a token id or a list of them")
        if not raw.get("do_sample", raw.get("temperature") is not None):
            return cls(frozenset(ids))
        return cls(
            frozenset(ids),
            Sampling(
                temperature=_number(file, raw, "temperature", 1.0, MOST_TEMPERATURE),
                top_p=_number(file, raw, "top_p", 1.0, 1.0),
                top_k=int(_number(file, raw, "top_k", 0, 2.0**31)),
            ),
        )

    def check(self, embeddings: int) -> None:
        """Raises GenerationConfigError if no answer could end, since all stop tokens are beyond the embeddings."""
        if self.stop_tokens and min(self.stop_tokens) >= embeddings:
            raise GenerationConfigError(
                f"eos_token_id: no answer can end with token {min(self.stop_tokens):,}, as the "
                f"model has {embeddings:,} embeddings"
            )


def _number(file: Path, raw: dict[str, Any], name: str, default: float, largest: float) -> float:
    value = raw.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= largest:
        raise GenerationConfigError(f"{file}: {name} {shown(value)} is not a number from 0 to {largest:g}")
    return value
