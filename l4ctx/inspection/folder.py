"""Inspects a checkpoint or a saved context, and returns one report for the terminal and for JSON.

Changes nothing. All input is untrusted: a part that cannot be read becomes a line of damage, and the rest is still
reported.
"""

from __future__ import annotations

import os
from pathlib import Path

from l4ctx.contexts.folder import FILE as MANIFEST
from l4ctx.errors import CHECKPOINT, CONTEXT, UsageError
from l4ctx.inspection.checkpoint import inspect_model
from l4ctx.inspection.context import inspect_context
from l4ctx.inspection.model_folder import what_it_is
from l4ctx.inspection.report import Report, add_damage
from l4ctx.machine.device import prepare_torch
from model.folder import CONFIG, INDEX, SINGLE
from model.gguf.files import find_gguf

READ_WHOLE = (
    CONFIG,
    INDEX,
    SINGLE,
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
"""Files that are read whole: a pipe or a device under such a name would be read forever."""


def inspect_folder(path: str, *, verify: bool) -> Report:
    """The report on a checkpoint or a context, as the object that --json prints; `verify` reads every byte.

    Raises UsageError for a path that is neither.
    """
    folder = Path(path)
    if not path:
        raise UsageError("the path is empty")
    gguf = find_gguf(folder)
    if gguf is None and not any(os.path.lexists(folder / name) for name in (CONFIG, MANIFEST)):
        neither = (
            f"neither a checkpoint, which has {CONFIG} or is a GGUF file, nor a saved context, which has {MANIFEST}; "
            "it is "
        )
        is_known = os.path.isdir(path) and os.access(path, os.R_OK | os.X_OK)
        raise UsageError(f"{path}: {neither if is_known else ''}{what_it_is(folder)}")
    inside = folder if gguf is None else gguf.parent
    try:
        names = os.listdir(inside)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    is_model = gguf is not None or CONFIG in names
    report: Report = {"kind": "model" if is_model else "context", "path": path, "verified": verify, "damage": []}
    for name in READ_WHOLE:
        if (inside / name).exists() and not (inside / name).is_file():
            add_damage(report, inside / name, "not a regular file")
    prepare_torch()
    if not report["damage"]:
        (inspect_model if is_model else inspect_context)(folder, report, verify)
    report["damage"] = list({entry["what"]: entry for entry in report["damage"]}.values())
    return report


def exit_code(report: Report) -> int:
    if not report["damage"]:
        return 0
    return CHECKPOINT if report["kind"] == "model" else CONTEXT
