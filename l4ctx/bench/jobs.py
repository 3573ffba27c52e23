"""What the benchmark asks of its worker processes, and what they answer, as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

WARM_UP_TOKENS, WARM_UP_DECODE = 64, 3
"""Tokens that every engine reads and decodes before the clock starts."""


@dataclass(frozen=True)
class Candidate:
    """One way to run an engine: its dtype, and its batch size in tokens during prefill."""

    engine: str  # "l4ctx", "transformers" or "llama.cpp"
    dtype: str  # as the engine names it
    batch_size: int
    file: str | None = None  # a GGUF file, for llama.cpp
    attention: str | None = None  # the attention backend, for l4ctx
    is_mapped: bool = True  # whether the weights are mapped from their files, for l4ctx

    def __str__(self) -> str:
        kernels = f" ({self.attention})" if self.attention else ""
        return f"{self.engine} {self.dtype}{kernels}, {self.batch_size:,} at a time"


@dataclass(frozen=True)
class WorkerJob:
    """One task of a worker process. Weights come from a checkpoint folder, or are random ones of a configuration."""

    task: str  # "machine", "l4ctx", "transformers", "ceilings", "checkpoint" or "gguf"
    folder: str | None = None
    config: dict[str, Any] | None = None  # the content of a config.json, for random weights
    dtype: str = "float32"
    batch_size: int = 8192
    tokens: int = 0
    decode_tokens: int = 0
    warm_up_tokens: int = WARM_UP_TOKENS
    device: str = "cpu"
    attention: str = "sdpa"
    is_mapped: bool = True
    output: str | None = None  # a folder or file to write

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> WorkerJob:
        return cls(**json.loads(text))


class TimedRun(NamedTuple):
    """What a Python engine reports of a run: seconds to the first token and after it; bytes of its KV cache."""

    first_token_seconds: float
    decode_seconds: float
    first_token: int
    keys_values: int
    steps: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Measurement:
    """One run, in bytes, seconds and tokens. None: not reported by the engine, or not asked for."""

    tokens: int
    decode_tokens: int  # after the first one
    first_token_seconds: float
    decode_seconds: float | None = None
    load_seconds: float | None = None
    keys_values: int | None = None
    peak_anonymous: int | None = None
    peak_file_backed: int | None = None
    peak_above_weights: int | None = None  # anonymous memory above what was held after loading
    peak_accelerator: int | None = None
    threads: int | None = None
    first_token: int | None = None  # its id, chosen greedily
    version: str | None = None  # of the engine
    token_weight_bytes: int | None = None  # weights that decoding a token reads, in their stored forms
    steps: tuple[tuple[int, float], ...] = ()  # tokens and seconds of each step of the prefill

    @property
    def prefill_rate(self) -> float:
        """Tokens a second up to the first token of the answer."""
        return self.tokens / self.first_token_seconds

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second after the first one."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else None

    @property
    def peak(self) -> int | None:
        """Peak resident bytes; on an accelerator, of its own memory."""
        if self.peak_accelerator is not None:
            return self.peak_accelerator
        return None if self.peak_anonymous is None else self.peak_anonymous + (self.peak_file_backed or 0)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "steps": [list(step) for step in self.steps],
            "prefill_tokens_per_second": self.prefill_rate,
            "decode_tokens_per_second": self.decode_rate,
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Measurement:
        known = {name: value for name, value in fields.items() if name in cls.__dataclass_fields__}
        return cls(**known | {"steps": tuple((int(tokens), float(seconds)) for tokens, seconds in fields["steps"])})
