"""Compares a model with `transformers`, both loaded from the same folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from model.config import BACKEND_NAMES
from model.transformer import Transformer
from model.weights.loading import load_checkpoint
from support.error_budget import difference
from support.paths import PATHS
from support.toy_checkpoints import LENGTHS, Toy

CPU_BACKENDS = tuple(name for name in BACKEND_NAMES if name != "cudnn")  # which is sdpa on a CPU
CASES = [*((1, length) for length in LENGTHS), (2, 33)]  # (batch, length)
ModelFactory = Callable[[Path, str], Transformer]  # (checkpoint folder, attention backend)


def load(folder: Path, attention: str) -> Transformer:
    return load_checkpoint(folder, dtype=torch.float32, attention=attention)


def differences(
    make_model: ModelFactory,
    toy: Toy,
    cases: Iterable[tuple[int, int]] = CASES,
    backends: Iterable[str] = CPU_BACKENDS,
) -> dict[str, float]:
    """The largest difference from the oracle, in multiples of the limit, by backend, path, batch and length."""
    found = {}
    for backend in backends:
        model = make_model(toy.folder, backend)
        for batch, length in cases:
            ids, expected = toy.case(batch, length)
            for name, path in PATHS.items():
                logits = path(model, ids)
                found[f"{backend} {name} {batch}x{length}"] = difference(logits, expected) / toy.limit(batch, length)
    return found
