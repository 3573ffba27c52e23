"""The one writer of a saved context: seals what is read as it is read, so that a crash costs one block at most.

What lies in the folder, and how it is read, is said in `l4ctx.contexts.reader`.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cache.disk import NO_SPACE, UnitFile, Units, write_units
from cache.errors import DiskFullError
from cache.grid import grid_period
from cache.layout import StoreLayout
from l4ctx.contexts.folder import BLOCKS, FILE, HEAD, JOURNAL, READERS_LOCK, WRITER_LOCK
from l4ctx.contexts.journal import Journal, JournalError
from l4ctx.contexts.locks import Lock, deletion_lock, writer_lock
from l4ctx.contexts.manifest import Recipe, read_manifest, saved_recipe, write_manifest
from l4ctx.contexts.reader import Context, read_head
from l4ctx.contexts.reuse import reusable
from l4ctx.contexts.states import State, Stored, block_record, digest, end_record, is_ours, is_temporary
from l4ctx.errors import ContextError
from l4ctx.machine.files import sync_folder, write_atomically
from l4ctx.machine.private import make_folder, narrow, open_private
from l4ctx.spans import ImageSpan, Span

if TYPE_CHECKING:
    from cache.hybrid import HybridKVCache


class ContextWriter:
    """The one writer of a context: a `cache.tiers.RowStore` that keeps every sealed row at once.

    Writing goes through the system's cache at once, and to the disk in the background, one row behind; the journal
    names a row when it is there.
    """

    is_durable = True

    def __init__(self, folder: Path, recipe: Recipe, checkpoint: Path | None = None) -> None:
        """Makes the context, or opens it as it is; a new one tells of the `checkpoint` folder.

        Raises ContextError, also when somebody else writes to it.
        """
        self.folder = folder
        self._pending: Future[None] | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="context-writer")
        self._journal: Journal | None = None
        self._lock: Lock | None = None
        self.notes: list[str] = []
        try:
            saved_recipe(folder)
            with _as_disk_full(folder):
                make_folder(folder)
                self._lock = writer_lock(folder)
                make_folder(folder / BLOCKS)  # also where it was lost
                _make_readers_lock(folder)
                if saved_recipe(folder) is None:
                    write_manifest(folder, recipe, checkpoint)
                read_manifest(folder).check(folder, asdict(recipe))  # it may have been made meanwhile
                if (folder / JOURNAL).exists() and not (folder / JOURNAL).is_file():
                    raise ContextError(f"{folder / JOURNAL}: not a regular file")
                self._journal = Journal.open(folder / JOURNAL)
            self.context = Context(folder, recipe, read_head(folder), self._journal.records)
            self.notes += _narrowed(folder)
            self._renew_head()
        except JournalError as error:
            self.close()
            raise ContextError(f"{error}; make the context anew") from None
        except BaseException:
            self.close()
            raise

    @property
    def tip(self) -> State:
        return self.context.states[-1]

    @property
    def kept(self) -> int:
        """Tokens that are safe on disk now."""
        return self.tip.kept(self.context.recipe.block_tokens) if self.context.states else 0

    def drop_damaged(self, *, verify: bool) -> list[str]:
        """Forgets what is not as it was written and all that follows it; says what. `verify` reads everything, else
        headers and lengths are looked at. Raises UnreadableError, and then nothing is forgotten."""
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
        """Starts to read `ids`, or goes on with it; returns how many of them need not be read.

        Raises DiskError and DiskFullError.
        """
        reuse = reusable(self.context, ids, layout, self.context.usable, images)
        base = reuse.state
        if base is not None and reuse.is_same and base is self.tip:
            if base.is_complete:
                self._delete_unused()  # what a reader, or an end by force, has kept from being deleted
                return base.tokens
            if not base.has_ended:
                return self._go_on(base, layout)
        start = reuse.tokens - reuse.tokens % layout.config.attention_chunk_size
        state = State(len(ids), start, self._write_ids(ids, documents, images), system)
        number = None
        if base is not None:
            number = self.context.states.index(base)
            state.blocks = base.blocks[: start // layout.block_tokens]
            state.partial = self.context.source(base, start)
        with _as_disk_full(self.folder):
            self._append(state.begin_record(number))
        self.context.states.append(state)
        self._delete_unused()
        return start

    def _go_on(self, state: State, layout: StoreLayout) -> int:
        """Where an interrupted state goes on: at a cut of the driver's grid, so that it takes the very same steps."""
        period = grid_period(
            self.context.recipe.prefill_chunk_size, layout.config.attention_chunk_size, layout.block_tokens
        )
        sealed = len(state.blocks) * layout.block_tokens
        start = max(state.start, sealed // period * period)
        del state.blocks[start // layout.block_tokens :]
        return start

    def restore(self, cache: HybridKVCache, tokens: int) -> None:
        """Fills an empty cache with what `begin` said is there. Raises DiskError."""
        self.context.restore(self.tip, cache, tokens)

    def write(self, row: int, units: Units) -> UnitFile:
        """Keeps a sealed row. Raises DiskFullError, also for the row before, and then keeps what came before."""
        self.flush()
        assert row == len(self.tip.blocks), (row, len(self.tip.blocks))
        with self._new_file(f"{BLOCKS}/{row:06d}") as (name, descriptor):
            header, _ = write_units(descriptor, units, {"block": str(row)})
        stored = Stored(name, header)
        self._pending = self._worker.submit(self._keep, row, stored)
        return self.context.file(stored)

    def flush(self) -> None:
        """Waits until all that was written is on the disk and in the journal. Raises DiskFullError."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with _as_disk_full(self.folder, self):
                pending.result()

    def finish(self, cache: HybridKVCache) -> None:
        """Keeps what is behind the last sealed block: the context is complete then. Raises DiskFullError."""
        self.flush()
        assert cache.offset == self.tip.tokens and len(self.tip.blocks) == cache.offset // cache.layout.block_tokens
        units = {str(layer): [("keys", block.keys), ("values", block.values)] for layer, block in cache.tail().items()}
        stored = None
        if units:
            with self._new_file("tail") as (name, descriptor):
                header, _ = write_units(descriptor, units, {})
            stored = Stored(name, header)
        with _as_disk_full(self.folder, self):
            if stored is not None:
                self._sync(stored)
            self._append(end_record(stored, self.tip.ids))
        self.tip.tail, self.tip.is_complete, self.tip.has_ended = stored, True, True
        self._renew_head()
        self._delete_unused()

    def close(self) -> None:
        """Ends the writing: what was sealed is in the journal then, if there was room."""
        try:
            self.flush()
        except DiskFullError:
            pass  # it was said, or will be when the reading goes on
        finally:
            self._worker.shutdown()
            if self._journal is not None:
                self._journal.close()
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def _renew_head(self) -> None:
        """A crash can come between the record that ends a state and the head that names it."""
        assert self._journal is not None
        records = self._journal.records
        last = max((n for n, record in enumerate(records, 1) if record["type"] == "end"), default=0)
        if last and read_head(self.folder) != (last, digest(records[last - 1])):
            with _as_disk_full(self.folder, self):
                _write_head(self.folder, last, records[last - 1])

    def _append(self, record: dict[str, Any]) -> None:
        assert self._journal is not None
        self._journal.append(record)

    def _keep(self, row: int, stored: Stored) -> None:
        """In the background: makes a row's file durable, then names it in the journal."""
        self._sync(stored)
        self._append(block_record(row, stored))
        self.tip.blocks.append(stored)

    def _sync(self, stored: Stored) -> None:
        path = self.folder / stored.name
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_folder(path.parent)

    @contextmanager
    def _new_file(self, prefix: str) -> Iterator[tuple[str, int]]:
        """A file of a new name, which is removed when it cannot be written."""
        name = f"{prefix}-{secrets.token_hex(6)}.safetensors"
        path = self.folder / name
        with _as_disk_full(self.folder, self):
            descriptor = open_private(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                yield name, descriptor
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            finally:
                os.close(descriptor)

    def _write_ids(self, ids: memoryview, documents: Sequence[Span], images: Sequence[ImageSpan]) -> Stored:
        units = {
            "ids": [("tokens", torch.frombuffer(ids, dtype=torch.int32))],
            "documents": [("json", _as_json([asdict(span) for span in documents]))],
        }
        if images:
            units["images"] = [("json", _as_json([span._asdict() for span in images]))]
        with self._new_file("tokens") as (name, descriptor):
            header, _ = write_units(descriptor, units, {})
        stored = Stored(name, header)
        with _as_disk_full(self.folder):
            self._sync(stored)
        return stored

    def _delete_unused(self) -> None:
        """Removes files that neither the tip nor the newest complete state needs, unless somebody is reading."""
        held = deletion_lock(self.folder)
        if held is None:
            return
        try:
            states = [self.tip, self.context.complete]
            needed = {stored.name for state in states if state is not None for stored in state.needs}
            for path in (*self.folder.iterdir(), *(self.folder / BLOCKS).iterdir()):
                name = path.relative_to(self.folder).as_posix()
                if (is_ours(name) or is_temporary(name)) and name not in needed:
                    path.unlink(missing_ok=True)
        except OSError:
            pass  # they take room, no more
        finally:
            held.close()


def _as_json(entries: list[dict[str, Any]]) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(entries).encode()), dtype=torch.uint8)


@contextmanager
def _as_disk_full(folder: Path, writer: ContextWriter | None = None) -> Iterator[None]:
    """What the system says of a write that fails becomes one line that tells what is kept."""
    try:
        yield
    except DiskFullError:
        raise
    except OSError as error:
        kept = f"{writer.kept:,} tokens are kept" if writer is not None else "nothing of this was kept"
        remedy = "free some space" if error.errno in NO_SPACE else "see to that"
        raise DiskFullError(
            f"{folder}: cannot be written: {error.strerror}; {kept}: {remedy} and run the same command again"
        ) from None


def _write_head(folder: Path, records: int, record: dict[str, Any]) -> None:
    write_atomically(folder / HEAD, json.dumps({"records": records, "end": digest(record)}) + "\n")


def _make_readers_lock(folder: Path) -> None:
    """Raises OSError."""
    with suppress(FileExistsError):  # made by a process that got no further
        os.close(open_private(folder / READERS_LOCK, os.O_WRONLY | os.O_CREAT | os.O_EXCL))


def _narrowed(folder: Path) -> list[str]:
    """Takes others' rights away on all that the context's text can be decoded from; says so when there were any."""
    ours = {FILE, HEAD, JOURNAL, WRITER_LOCK, READERS_LOCK, BLOCKS}
    try:
        was_open = narrow(folder, follow=True)
        for path in (*folder.iterdir(), *(folder / BLOCKS).iterdir()):
            name = path.relative_to(folder).as_posix()
            if name in ours or is_ours(name) or is_temporary(name):
                was_open |= narrow(path)
    except OSError as error:
        return [f"{folder}: others may read it, and that cannot be changed: {error.strerror}"]
    return (
        [f"{folder}: others could read it; now only you can (its text can be decoded from what it holds)"]
        if was_open
        else []
    )
