"""The one writer of a saved context: seals blocks while documents are read, so that a crash costs one block at most.

The order that makes this so: a file is written and synced, then the journal names it, and only then is an older file
deleted. `l4ctx.contexts.folder` lists the files.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cache.disk import UnitFile, Units
from cache.errors import DiskFullError
from cache.grid import grid_period
from cache.layout import StoreLayout
from l4ctx.contexts.files import delete_unused, make_private, sync_file, write_file
from l4ctx.contexts.folder import BLOCKS, JOURNAL, RECREATE
from l4ctx.contexts.head import read_head, update_head
from l4ctx.contexts.journal import Journal, JournalError
from l4ctx.contexts.locks import make_readers_lock, writer_lock
from l4ctx.contexts.manifest import Recipe, read_manifest, saved_recipe, write_manifest
from l4ctx.contexts.reader import Context
from l4ctx.contexts.reuse import reusable
from l4ctx.contexts.states import MOST_TOKENS, State, Stored, block_record, end_record
from l4ctx.drafts.order import text_order
from l4ctx.errors import REMEDIES, SHORTAGES, ContextError
from l4ctx.machine.files import make_folder
from l4ctx.spans import ImageSpan, Span

if TYPE_CHECKING:
    from cache.blocks import Block
    from cache.hybrid import HybridKVCache


class ContextWriter:
    """The one writer of a context: a `cache.tiers.RowStore` that saves every row as soon as it is sealed.

    `write` returns when the row is in the page cache. One row behind, a thread syncs its file and then appends it to
    the journal.
    """

    is_durable = True

    def __init__(self, folder: Path, recipe: Recipe, checkpoint: Path | None = None) -> None:
        """Creates the context, or opens an existing one; a new one records the `checkpoint` folder.

        Raises ContextError, also when another process is writing to it, and DiskFullError.
        """
        self.folder = folder
        self._pending: Future[None] | None = None
        with ExitStack() as opened:
            try:
                self._journal = _open(folder, recipe, checkpoint, opened)
            except JournalError as error:
                raise ContextError(f"{error}; {RECREATE}") from None
            self.context = Context(folder, recipe, read_head(folder), self._journal.records)
            self.notes = make_private(folder)
            self._update_head()
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="context-writer")
            opened.callback(self._worker.shutdown)
            self._opened = opened.pop_all()  # closed in reverse: the thread, the journal, the lock

    @property
    def tip(self) -> State:
        return self.context.states[-1]

    @property
    def kept(self) -> int:
        """Tokens that are durable now."""
        return self.tip.kept(self.context.recipe.block_tokens) if self.context.states else 0

    def drop_damaged(self, *, verify: bool) -> list[str]:
        """Forgets each damaged file and all that follows it; returns what is wrong with them.

        `verify` reads every file, else only headers and lengths are checked. Raises UnreadableError, and then nothing
        is forgotten.
        """
        found: dict[str, str] = {}
        states = [(state, self.context.damage(state, verify=verify)) for state in self.context.usable]
        for state, damaged in states:
            if damaged:
                sound = next((n for n, block in enumerate(state.blocks) if block.name in damaged), len(state.blocks))
                state.forget(0 if state.ids.name in damaged else sound, self.context.recipe.block_tokens)
            found |= damaged
        return list(found.values())

    def begin(
        self,
        ids: memoryview,
        documents: Sequence[Span],
        layout: StoreLayout,
        *,
        system: bool,
        images: Sequence[ImageSpan],
    ) -> int:
        """Starts to read `ids`, or resumes it; returns how many of them need not be read.

        Raises DiskError, DiskFullError, and ContextError for too many.
        """
        if len(ids) > MOST_TOKENS:
            raise ContextError(f"{self.folder}: {len(ids):,} tokens are more than a context can hold, {MOST_TOKENS:,}")
        reuse = reusable(self.context, ids, layout, self.context.usable, images)
        base = reuse.state
        if base is not None and reuse.is_same and base is self.tip:
            if base.is_complete:
                self._delete_unused()  # left by a crash, or because a reader held its lock
                return base.tokens
            if not base.has_ended:
                return _resume(base, layout, self.context.recipe.prefill_chunk_size)
        start = reuse.tokens - reuse.tokens % layout.config.attention_chunk_size
        state = State(len(ids), start, self._write_ids(ids, documents, images), system)
        number = None
        if base is not None:
            number = self.context.states.index(base)
            state.blocks = base.blocks[: start // layout.block_tokens]
            state.partial = self.context.source(base, start)
        with _as_disk_full(self.folder):
            self._journal.append(state.begin_record(number))
        self.context.states.append(state)
        self._delete_unused()
        return start

    def restore(self, cache: HybridKVCache, tokens: int) -> None:
        """Fills an empty cache with the tokens that `begin` returned. Raises DiskError."""
        self.context.restore(self.tip, cache, tokens)

    def write(self, row: int, units: Units) -> UnitFile:
        """Writes a sealed row. Raises DiskFullError, for the row before as well; what came before stays."""
        self.flush()
        assert row == len(self.tip.blocks), (row, len(self.tip.blocks))
        with _as_disk_full(self.folder, self):
            stored = write_file(self.folder, f"{BLOCKS}/{row:06d}", units, {"block": str(row)})
        self._pending = self._worker.submit(self._commit, row, stored)
        return self.context.file(stored)

    def _commit(self, row: int, stored: Stored) -> None:
        """On the thread: makes a row's file durable, then names it in the journal."""
        sync_file(self.folder, stored)
        self._journal.append(block_record(row, stored))
        self.tip.blocks.append(stored)

    def flush(self) -> None:
        """Waits until every row that was written is durable and in the journal. Raises DiskFullError."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with _as_disk_full(self.folder, self):
                pending.result()

    def finish(self, tokens: int, tail_of: Callable[[], Mapping[int, Block]]) -> None:
        """Saves the tokens behind the last sealed block (`HybridKVCache.tail`), which completes the context.

        `tokens` were read. Raises DiskFullError.
        """
        self.flush()
        assert tokens == self.tip.tokens and len(self.tip.blocks) == tokens // self.context.recipe.block_tokens
        units = {str(layer): [("keys", block.keys), ("values", block.values)] for layer, block in tail_of().items()}
        with _as_disk_full(self.folder, self):
            tail = write_file(self.folder, "tail", units, {}) if units else None
            if tail is not None:
                sync_file(self.folder, tail)
            self._journal.append(end_record(tail, self.tip.ids))
        self.tip.tail, self.tip.is_complete, self.tip.has_ended = tail, True, True
        self._update_head()
        self._delete_unused()

    def close(self) -> None:
        """Stops writing; every sealed row is in the journal then, if the disk had space."""
        try:
            self.flush()
        except DiskFullError:
            pass  # it was raised before, or will be when the reading is resumed
        finally:
            self._opened.close()

    def _update_head(self) -> None:
        """Also when opening: a crash can come between the record that ends a state and the head that names it."""
        with _as_disk_full(self.folder, self):
            update_head(self.folder, self._journal.records)

    def _write_ids(self, ids: memoryview, documents: Sequence[Span], images: Sequence[ImageSpan]) -> Stored:
        order = text_order(ids)
        units = {
            "ids": [("tokens", torch.frombuffer(ids, dtype=torch.int32))],
            "order": [("positions", torch.frombuffer(order, dtype=torch.int32))],
            "documents": [("json", _as_json([_listed(span) for span in documents]))],
        }
        if images:
            units["images"] = [("json", _as_json([span._asdict() for span in images]))]
        with _as_disk_full(self.folder, self):
            stored = write_file(self.folder, "tokens", units, {})
        with _as_disk_full(self.folder):
            sync_file(self.folder, stored)
        return stored

    def _delete_unused(self) -> None:
        """Deletes files that neither the tip nor the newest complete state needs, unless the context is being read."""
        states = [self.tip, self.context.complete]
        delete_unused(self.folder, {stored.name for state in states if state is not None for stored in state.needs})


def _open(folder: Path, recipe: Recipe, checkpoint: Path | None, opened: ExitStack) -> Journal:
    """Locks the folder and makes what is missing in it; `opened` holds the lock and the journal."""
    saved_recipe(folder)  # refuses a folder of something else before anything is made in it
    with _as_disk_full(folder):
        make_folder(folder)
        opened.enter_context(closing(writer_lock(folder)))
        make_folder(folder / BLOCKS)  # of an old context, too: it may have been lost
        make_readers_lock(folder)
        if saved_recipe(folder) is None:
            write_manifest(folder, recipe, checkpoint)
        read_manifest(folder).check(folder, asdict(recipe))  # made before we had the lock
        if (folder / JOURNAL).exists() and not (folder / JOURNAL).is_file():
            raise ContextError(f"{folder / JOURNAL}: not a regular file")
        return opened.enter_context(closing(Journal.open(folder / JOURNAL)))


def _resume(state: State, layout: StoreLayout, prefill_chunk_size: int) -> int:
    """Where to resume an interrupted state: at a cut of the driver's grid, so that every step is the same again.

    Drops the blocks behind it.
    """
    period = grid_period(prefill_chunk_size, layout.config.attention_chunk_size, layout.block_tokens)
    sealed = len(state.blocks) * layout.block_tokens
    start = max(state.start, sealed // period * period)
    del state.blocks[start // layout.block_tokens :]
    return start


def _listed(span: Span) -> dict[str, Any]:
    """A document in the list of them; how it was read, and its first line, only where that was not as usual."""
    usual = {"reading": "", "first_line": 1}
    return {name: value for name, value in asdict(span).items() if value != usual.get(name)}


def _as_json(entries: list[dict[str, Any]]) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(entries).encode()), dtype=torch.uint8)


@contextmanager
def _as_disk_full(folder: Path, writer: ContextWriter | None = None) -> Iterator[None]:
    """Turns a write that fails into a DiskFullError that says what is kept."""
    try:
        yield
    except DiskFullError:
        raise
    except OSError as error:
        kept = f"{writer.kept:,} tokens are kept" if writer is not None else "nothing of this was kept"
        number = error.errno or 0
        remedy = f"{REMEDIES[number]}," if number in SHORTAGES else "fix that"
        if number in (errno.ENOSPC, errno.EDQUOT):
            remedy = "free some space"
        raise DiskFullError(
            f"{folder}: cannot be written: {error.strerror}; {kept}: {remedy} and run the same command again"
        ) from None
