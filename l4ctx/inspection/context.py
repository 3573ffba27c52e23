"""Inspects a saved context: its contents and its damage."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from l4ctx.contexts.folder import FILE as MANIFEST
from l4ctx.contexts.folder import FORMAT, VERSION
from l4ctx.contexts.manifest import read_manifest, saved_checkpoint
from l4ctx.inspection.report import Report, attempt

if TYPE_CHECKING:
    from l4ctx.contexts.reader import Context
    from l4ctx.contexts.states import State
    from l4ctx.spans import ImageSpan, Span


def inspect_context(folder: Path, report: Report, verify: bool) -> None:
    from l4ctx.contexts.locks import is_being_written
    from l4ctx.contexts.reader import Context

    with _reading(folder):
        report |= {"is_being_written": is_being_written(folder), "others_have_rights_on": _open_to_others(folder)}
        recipe = attempt(report, folder / MANIFEST, read_manifest, folder)
        report |= {
            "format": FORMAT,
            "version": VERSION if recipe else None,
            "made_with": recipe and asdict(recipe),
            "checkpoint": recipe and _path_of_checkpoint(folder),
            "states": [],
            "bytes": None,
        }
        context = None if recipe is None else attempt(report, folder, Context.read, folder)
        if context is None:
            return
        report["bytes"] = _bytes_on_disk(context)
        bad: set[str] = set()
        for stored in dict.fromkeys(stored for state in context.usable for stored in state.needs):
            file = context.file(stored)
            before = len(report["damage"])
            attempt(report, folder / stored.name, file.verify if verify else file.check_size)
            if len(report["damage"]) > before:
                bad.add(stored.name)
        report["states"] = [_state(report, context, state, bad) for state in context.usable]


def _open_to_others(folder: Path) -> list[str]:
    """Names in the context, "." for the folder itself, on which anyone but the owner has permissions."""
    from l4ctx.contexts.folder import BLOCKS
    from l4ctx.machine.private import is_open_to_others

    names = [".", *_names(folder, ""), *_names(folder, f"{BLOCKS}/")]
    found = []
    for name in names:
        with suppress(OSError):  # a writer may have removed it
            if is_open_to_others(folder / name):
                found.append(name)
    return sorted(found)


def _names(folder: Path, prefix: str) -> list[str]:
    """What a part of the context holds; nothing where that cannot be told."""
    try:
        return [prefix + name for name in os.listdir(folder / prefix)]
    except OSError:
        return []


def _path_of_checkpoint(folder: Path) -> str | None:
    known = saved_checkpoint(folder)
    return None if known is None else str(known)


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Holds the readers' lock, if the folder allows it, so that no file in the journal is deleted meanwhile."""
    from l4ctx.contexts.locks import readers_lock

    lock = readers_lock(folder)
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def _state(report: Report, context: Context, state: State, bad: set[str]) -> Report:
    """The report on one set of documents; `bad` has the names of damaged files, and gets those found here."""
    spans = images = None
    if state.ids.name not in bad:
        spans = attempt(report, context.folder / state.ids.name, _documents, context, state)
        images = attempt(report, context.folder / state.ids.name, _images, context, state)
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
    """The state's documents. Raises DiskError, also if token ids or documents do not match the state."""
    from cache.errors import DiskError

    file = context.file(state.ids)
    ids = file.units.get("ids")
    if ids is None or ids.nbytes != 4 * state.tokens:
        raise DiskError(f"{file.source}: damaged: it does not hold {state.tokens:,} token ids")
    spans = context.documents(state)
    if any(not 0 <= span.start <= span.stop <= state.tokens for span in spans):
        raise DiskError(f"{file.source}: damaged: a document lies outside the {state.tokens:,} tokens")
    return spans


def _images(context: Context, state: State) -> list[ImageSpan]:
    """The state's images. Raises DiskError, also if an image is out of bounds of the state's tokens."""
    from cache.errors import DiskError

    images = context.images(state)
    if any(not 0 <= image.start <= image.stop <= state.tokens for image in images):
        raise DiskError(f"{context.file(state.ids).source}: damaged: an image lies outside the {state.tokens:,} tokens")
    return images


def _can_keep(state: State, block_tokens: int, bad: set[str]) -> int:
    """Tokens that `l4ctx prefill --verify` can keep: those before the first damaged block."""
    if state.ids.name in bad:
        return 0
    if not any(stored.name in bad for stored in state.needs):
        return state.kept(block_tokens)
    return block_tokens * next((n for n, block in enumerate(state.blocks) if block.name in bad), len(state.blocks))


def _bytes_on_disk(context: Context) -> dict[str, int] | None:
    """Bytes by kind of file; `unused` is what no state needs, including files that are being written.

    None where they cannot be told: a sum without some of the files would be taken for the whole.
    """
    from l4ctx.contexts.folder import BLOCKS
    from l4ctx.contexts.states import is_ours

    needed = {stored.name for state in context.usable for stored in state.needs}
    sizes = dict.fromkeys(("blocks", "token_ids", "tails", "unused", "other"), 0)
    try:
        for prefix in ("", f"{BLOCKS}/"):
            with suppress(FileNotFoundError), os.scandir(context.folder / prefix) as entries:
                for entry in entries:
                    name = prefix + entry.name
                    kind = _kind(name) if name in needed else "unused" if is_ours(name) else "other"
                    with suppress(FileNotFoundError):  # a writer may be at work
                        sizes[kind] += entry.stat(follow_symlinks=False).st_size * entry.is_file(follow_symlinks=False)
    except OSError:
        return None
    return sizes


def _kind(name: str) -> str:
    return "token_ids" if name.startswith("tokens-") else "tails" if name.startswith("tail-") else "blocks"
