"""Files that other engines need for the same work: checkpoints of random weights, corrected configs, GGUF files.

They are written by workers, after a check of the disk space, to a temporary folder that is removed when the benchmark
ends.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from l4ctx.bench.jobs import WorkerJob
from l4ctx.bench.peers.gguf import DTYPES, check_supported, gguf_bytes
from l4ctx.bench.process import run_worker
from l4ctx.formatting import human_bytes
from l4ctx.machine.memory import available_disk
from l4ctx.planning.memory_plan import MemoryPlanError
from model.config import TextConfig
from model.folder import CONFIG, read_json

MARGIN_BYTES = 2**30
"""Kept free on the disk, for headers and for the file of 256 MiB that measures the disk."""


def check_disk(needed: int, scratch: Path, why: str) -> None:
    """Raises MemoryPlanError if the temporary folder has no space for this many bytes."""
    free = available_disk(scratch)
    if free is not None and needed + MARGIN_BYTES > free:
        raise MemoryPlanError(
            f"{why} needs {human_bytes(needed + MARGIN_BYTES)} in {scratch}, but "
            f"only {human_bytes(free)} is free; set TMPDIR to a folder on a larger disk, or "
            "leave the comparison out"
        )


def write_checkpoint(raw: dict[str, Any], dtype: str, scratch: Path) -> Path:
    """A checkpoint of random weights, written by a worker. Raises WorkerError."""
    folder = scratch / "checkpoint"
    folder.mkdir()
    run_worker(WorkerJob("checkpoint", config=raw, dtype=dtype, output=str(folder)))
    return folder


def write_gguf(folder: Path, config: TextConfig, kind: str, scratch: Path) -> Path:
    """A GGUF file of the checkpoint, written by a worker. Raises WorkerError, GGUFError and MemoryPlanError."""
    check_supported(config)
    check_disk(gguf_bytes(config, kind), scratch, f"a GGUF file in {kind}")
    file = scratch / f"{kind}.gguf"
    run_worker(WorkerJob("gguf", folder=str(folder), dtype=kind, output=str(file)))
    return file


def kinds_of(dtype: str) -> list[str]:
    """The GGUF types to try for a `--dtype`."""
    return [kind for kind, name in DTYPES.items() if dtype in ("auto", name)]


def folder_for_transformers(folder: Path, scratch: Path) -> Path:
    """The checkpoint as transformers 5 accepts it: published configs say `attn_temperature_tuning: 4` for true.

    Where that must be corrected, a folder in `scratch` with a config.json of its own and links to all other files.
    """
    raw = read_json(folder / CONFIG)
    parts = [part for part in (raw, raw.get("text_config")) if isinstance(part, dict)]
    wrong = [part for part in parts if not isinstance(part.get("attn_temperature_tuning", True), bool)]
    if not wrong:
        return folder
    for part in wrong:
        part["attn_temperature_tuning"] = bool(part["attn_temperature_tuning"])
    linked = scratch / "transformers"
    linked.mkdir()
    for file in folder.iterdir():
        if file.name != CONFIG:
            os.symlink(file.resolve(), linked / file.name)
    (linked / CONFIG).write_text(json.dumps(raw), encoding="utf-8")
    return linked
