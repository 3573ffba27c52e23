"""Saved contexts: a folder that keeps what a model has read, once, to be asked many times.

    manifest.json               what it was made with (l4ctx.manifest); never changed
    journal                     what is sealed, and which documents; append-only (l4ctx.journal, l4ctx.states)
    head.json                   the newest complete state, so that a journal that was cut short is noticed
    tokens-*.safetensors        token ids and documents of a state, written once
    blocks/*.safetensors        a sealed block of every NoPE layer each
    tail-*.safetensors          the tokens behind the last sealed block, with the RoPE layers' windows
    writer.lock, readers.lock   one writer at a time; old blocks go only while nobody reads

Files are named at random and never written again, and a file counts once the journal names it. So a reader, which goes
by the journal as it was when it came, is not disturbed, and what a crash leaves behind is either whole or unknown.
"""

from __future__ import annotations

import json
import os
import secrets
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cache.blocks import Block
from cache.disk import NO_SPACE, DiskError, DiskFullError, UnitFile, Units, as_bytes, write_units
from cache.sizes import StoreLayout
from l4ctx.journal import Journal, JournalError
from l4ctx.manifest import FILE as MANIFEST
from l4ctx.manifest import (
    ContextError,
    Recipe,
    read_manifest,
    read_small,
    sync_folder,
    write_atomically,
    write_manifest,
)
from l4ctx.prefill import grid_period
from l4ctx.prompt import Span
from l4ctx.states import State, Stored, block_record, digest, end_record, is_ours, replay

if TYPE_CHECKING:
    from cache.hybrid import HybridKVCache

JOURNAL, HEAD, WRITER_LOCK, READERS_LOCK, BLOCKS = "journal", "head.json", "writer.lock", "readers.lock", "blocks"


def saved_recipe(folder: Path) -> Recipe | None:
    """What the context in `folder` was made with; None where one can be made. Raises ContextError."""
    if (folder / MANIFEST).exists() or not folder.exists():
        return read_manifest(folder) if folder.exists() else None
    if not folder.is_dir():
        raise ContextError(f"{folder}: a file, not a folder; name a folder for the context")
    ours = {JOURNAL, WRITER_LOCK, READERS_LOCK, BLOCKS}
    others = sorted(entry.name for entry in folder.iterdir()
                    if entry.name not in ours and not entry.name.startswith(f".{MANIFEST}."))
    if others:
        raise ContextError(f"{folder}: holds other files ({', '.join(others[:3])}) and no saved context; "
                           "name a new or an empty folder")
    return None


class Context:
    """A context as its journal describes it now. Raises ContextError for one that cannot be trusted."""

    def __init__(self, folder: Path, recipe: Recipe, head: tuple[int, str] | None,
                 records: list[dict[str, Any]]) -> None:
        self.folder, self.recipe = folder, recipe
        if (folder / BLOCKS).is_symlink():
            raise ContextError(f"{folder / BLOCKS}: a symbolic link; a context's blocks lie in its own folder")
        self.states = replay(folder / JOURNAL, records, recipe.block_tokens)
        _check_head(folder, head, records)
        tip = self.states[-1:]
        self.usable = tip + [state for state in (self.complete,) if state is not None and state not in tip]
        """The newest state, and the newest that is complete: those whose files are kept."""

    @classmethod
    def read(cls, folder: Path) -> Context:
        """As it is now, perhaps beside a writer: the head is read first, so that the journal is not older."""
        recipe, head = read_manifest(folder), _read_head(folder)
        try:
            records = Journal.read(folder / JOURNAL)
        except FileNotFoundError:
            records = []
        except OSError as error:
            raise ContextError(f"{folder / JOURNAL}: cannot be read: {error.strerror}") from None
        except JournalError as error:
            raise ContextError(f"{error}; make the context anew") from None
        return cls(folder, recipe, head or _read_head(folder), records)

    @property
    def complete(self) -> State | None:
        """The newest state whose documents were read to their end."""
        return next((state for state in reversed(self.states) if state.is_complete), None)

    def damage(self, state: State, *, verify: bool) -> dict[str, str]:
        """What is wrong with the state's files, by name; `verify` reads them, else headers and lengths are checked."""
        found = {}
        for stored in state.needs:
            try:
                file = self.file(stored)
                file.verify() if verify else file.check_size()
            except DiskError as error:
                found[stored.name] = str(error)
        return found

    def file(self, stored: Stored) -> UnitFile:
        return UnitFile(self.folder / stored.name, header_sha256=stored.header_sha256)

    def ids(self, state: State) -> array[int]:
        """The documents' token ids. Raises DiskError."""
        file = self.file(state.ids)
        unit = file.units.get("ids")
        if unit is None or unit.nbytes != 4 * state.tokens:
            raise DiskError(f"{file.source}: it does not hold {state.tokens:,} token ids")
        ids = array("i", bytes(unit.nbytes))
        file.read("ids", memoryview(ids).cast("B"))
        return ids

    def documents(self, state: State) -> list[Span]:
        """Path, SHA-256 and token span of each document. Raises DiskError."""
        file = self.file(state.ids)
        if "documents" not in file.units:
            raise DiskError(f"{file.source}: it lists no documents")
        text = bytearray(file.units["documents"].nbytes)
        file.read("documents", memoryview(text))
        try:
            return [Span(str(entry["source"]), int(entry["start"]), int(entry["stop"]), str(entry["sha256"]))
                    for entry in json.loads(text)]
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
            raise DiskError(f"{file.source}: its list of documents cannot be read ({error})") from None

    def restore(self, state: State, cache: HybridKVCache, tokens: int) -> None:
        """Fills an empty cache with the state's first `tokens` tokens. Raises DiskError.

        They are all of a complete state's, or end at an attention chunk that `reusable` allows.
        """
        rows = tokens // self.recipe.block_tokens
        files = [self.file(stored) for stored in state.blocks[:rows]]
        source = self.source(state, tokens)
        if source is None:
            cache.restore(tokens, files)
        elif source.name.startswith(BLOCKS):
            cache.restore(tokens, files, partial=self.file(source))
        else:
            cache.restore(tokens, files, tail=self._tail(source, cache.layout))

    def source(self, state: State, tokens: int) -> Stored | None:
        """Where the tokens lie that fill no whole block."""
        rows, rest = divmod(tokens, self.recipe.block_tokens)
        if rest == 0:
            return None
        if rows < len(state.blocks):
            return state.blocks[rows]
        return state.tail if state.is_complete else state.partial

    def _tail(self, stored: Stored, layout: StoreLayout) -> dict[int, Block]:
        file, config = self.file(stored), layout.config
        dtype = getattr(torch, self.recipe.dtype)
        per_token = config.num_key_value_heads * config.head_dim * dtype.itemsize
        tail = {}
        for name, unit in file.units.items():
            tokens, rest = divmod(unit.nbytes, 2 * per_token)
            if rest or not name.isdecimal() or int(name) >= config.num_hidden_layers:
                raise DiskError(f"{file.source}: {name} is no layer of this model")
            shape = (2, 1, config.num_key_value_heads, tokens, config.head_dim)
            buffer = torch.empty(shape, dtype=dtype)
            file.read(name, as_bytes(buffer))
            tail[int(name)] = Block(buffer[0], buffer[1])
        return tail


@dataclass(frozen=True)
class Reuse:
    """How much of the documents to be read is there: the first `tokens`, in `state`. `is_same`: its documents are
    these, no more and no less."""

    state: State | None = None
    tokens: int = 0
    is_same: bool = False


def common_prefix(a: array[int] | memoryview, b: array[int] | memoryview) -> int:
    """Tokens that two sequences of 32-bit ids have in common from the start."""
    left, right = (memoryview(x).cast("B") if memoryview(x).format != "B" else memoryview(x) for x in (a, b))
    size, step = min(len(left), len(right)), 1 << 20
    for start in range(0, size, step):
        here = slice(start, min(size, start + step))
        if left[here] != right[here]:
            low, high = 0, here.stop - start  # bytes known to be equal, and length in which they differ
            while high - low > 4:
                middle = (low + high) // 8 * 4
                if left[start + low:start + middle] == right[start + low:start + middle]:
                    low = middle
                else:
                    high = middle
            return (start + low) // 4
    return size // 4


def reusable(context: Context, ids: memoryview, layout: StoreLayout, states: Sequence[State]) -> Reuse:
    """The longest prefix of `ids` that one of the states holds, as far as it can be gone on from. Raises DiskError.

    Unless all of a complete state is used it is cut to an attention chunk, where windows are empty; and to a block
    where those are stored otherwise than computed with: what followed a part of one had seen it unpacked.
    """
    best = Reuse()
    for state in states:
        kept = state.kept(layout.block_tokens)
        if min(kept, len(ids)) <= best.tokens:
            continue
        prefix = common_prefix(context.ids(state), ids)
        tokens = min(prefix, kept)
        if not (state.is_complete and tokens == state.tokens):
            is_in_block = tokens // layout.block_tokens < len(state.blocks)
            tokens -= tokens % (layout.block_tokens if layout.is_packed and is_in_block
                                else layout.config.attention_chunk_size)
        is_same = prefix == state.tokens == len(ids)
        if tokens > best.tokens or is_same:
            best = Reuse(state, tokens, is_same)
        if is_same:
            break
    return best


class ContextReader:
    """A complete context for asking; many at a time, beside one writer. To be closed."""

    def __init__(self, folder: Path) -> None:
        """Raises ContextError."""
        # before the journal is read: what it names then stays
        self._lock = readers_lock(folder)
        try:
            self.context = Context.read(folder)
            state = self.context.complete
            if state is None:
                raise ContextError(_not_ready(self.context))
        except BaseException:
            self.close()
            raise
        self.state = state

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _not_ready(context: Context) -> str:
    tip = context.states[-1] if context.states else None
    done = "nothing was read yet" if tip is None else (
        f"reading was interrupted after {tip.kept(context.recipe.block_tokens):,} of {tip.tokens:,} tokens")
    return f"{context.folder}: {done}; the command that made it (l4ctx prefill PATH... -o) goes on from there"


class ContextWriter:
    """The one writer of a context: a `cache.tiers.RowStore` that keeps every sealed row at once.

    Writing goes through the system's cache at once, and to the disk in the background, one row behind; the journal
    names a row when it is there.
    """

    is_durable = True

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        """Makes the context, or opens it as it is. Raises ContextError, also when somebody else writes to it."""
        self.folder = folder
        self._pending: Future[None] | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="context-writer")
        self._journal: Journal | None = None
        self._lock: int | None = None
        try:
            with _as_disk_full(folder):
                folder.mkdir(parents=True, exist_ok=True)
                self._lock = _writer_lock(folder)
                if saved_recipe(folder) is None:
                    (folder / BLOCKS).mkdir(exist_ok=True)
                    (folder / READERS_LOCK).touch()
                    write_manifest(folder, recipe)
                read_manifest(folder).check(folder, asdict(recipe))  # it may have been made meanwhile
                self._journal = Journal.open(folder / JOURNAL)
            self.context = Context(folder, recipe, _read_head(folder), self._journal.records)
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
        headers and lengths are looked at."""
        found: dict[str, str] = {}
        for state in self.context.usable:
            damaged = self.context.damage(state, verify=verify)
            if damaged:
                sound = next((n for n, block in enumerate(state.blocks) if block.name in damaged), len(state.blocks))
                state.forget(0 if state.ids.name in damaged else sound, self.context.recipe.block_tokens)
            found |= damaged
        return list(found.values())

    def begin(self, ids: memoryview, documents: Sequence[Span], layout: StoreLayout, *, system: bool) -> int:
        """Starts to read `ids`, or goes on with it; returns how many of them need not be read.

        Raises DiskError and DiskFullError.
        """
        reuse = reusable(self.context, ids, layout, self.context.usable)
        base = reuse.state
        if base is not None and reuse.is_same and base is self.tip:
            if base.is_complete:
                return base.tokens
            if not base.has_ended:
                return self._go_on(base, layout)
        start = reuse.tokens - reuse.tokens % layout.config.attention_chunk_size
        state = State(len(ids), start, self._write_ids(ids, documents), system)
        number = None
        if base is not None:
            number = self.context.states.index(base)
            state.blocks = base.blocks[:start // layout.block_tokens]
            state.partial = self.context.source(base, start)
        with _as_disk_full(self.folder):
            self._append(state.begin_record(number))
        self.context.states.append(state)
        self._delete_unused()
        return start

    def _go_on(self, state: State, layout: StoreLayout) -> int:
        """Where an interrupted state goes on: at a cut of the driver's grid, so that it takes the very same steps."""
        period = grid_period(self.context.recipe.prefill_chunk_size, layout.config.attention_chunk_size,
                             layout.block_tokens)
        sealed = len(state.blocks) * layout.block_tokens
        start = max(state.start, sealed // period * period)
        del state.blocks[start // layout.block_tokens:]
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
            self._sync(stored)
        with _as_disk_full(self.folder, self):
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
                os.close(self._lock)
                self._lock = None

    def _renew_head(self) -> None:
        """A crash can come between the record that ends a state and the head that names it."""
        assert self._journal is not None
        records = self._journal.records
        last = max((n for n, record in enumerate(records, 1) if record["type"] == "end"), default=0)
        if last:
            with _as_disk_full(self.folder):
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
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                yield name, descriptor
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            finally:
                os.close(descriptor)

    def _write_ids(self, ids: memoryview, documents: Sequence[Span]) -> Stored:
        listed = json.dumps([asdict(span) for span in documents]).encode()
        units = {"ids": [("tokens", torch.frombuffer(ids, dtype=torch.int32))],
                 "documents": [("json", torch.frombuffer(bytearray(listed), dtype=torch.uint8))]}
        with self._new_file("tokens") as (name, descriptor):
            header, _ = write_units(descriptor, units, {})
        stored = Stored(name, header)
        with _as_disk_full(self.folder):
            self._sync(stored)
        return stored

    def _delete_unused(self) -> None:
        """Removes files that neither the tip nor the newest complete state needs, unless somebody is reading."""
        lock = _lock(self.folder / READERS_LOCK, exclusive=True)
        if lock is None:
            return
        try:
            states = [self.tip, self.context.complete]
            needed = {stored.name for state in states if state is not None for stored in state.needs}
            for path in (*self.folder.iterdir(), *(self.folder / BLOCKS).iterdir()):
                name = path.relative_to(self.folder).as_posix()
                if is_ours(name) and name not in needed:
                    path.unlink(missing_ok=True)
        except OSError:
            pass  # they take room, no more
        finally:
            os.close(lock)


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
        raise DiskFullError(f"{folder}: cannot be written: {error.strerror}; {kept}: {remedy} and run the same "
                            "command again") from None


def _read_head(folder: Path) -> tuple[int, str] | None:
    """The number of the record that ends the newest complete state, and its digest. Raises ContextError."""
    file = folder / HEAD
    try:
        head = json.loads(read_small(file))
        return int(head["records"]), str(head["end"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise ContextError(f"{file}: damaged ({type(error).__name__}: {error}); make the context anew") from None


def _check_head(folder: Path, head: tuple[int, str] | None, records: list[dict[str, Any]]) -> None:
    """Raises ContextError where the journal lacks the end of the newest complete state."""
    if head is None:
        if any(record.get("type") == "end" for record in records[:-1]):
            raise ContextError(f"{folder / HEAD}: missing, so that it cannot be told whether the journal is whole; "
                               "make the context anew")
        return
    number, expected = head
    if not 0 < number <= len(records) or digest(records[number - 1]) != expected:
        raise ContextError(f"{folder / JOURNAL}: cut short: it has {len(records)} records, and number {number} should "
                           "be the end of the newest state; make the context anew")


def _write_head(folder: Path, records: int, record: dict[str, Any]) -> None:
    write_atomically(folder / HEAD, json.dumps({"records": records, "end": digest(record)}) + "\n")


def _lock(path: Path, *, exclusive: bool, wait: bool = False, create: bool = False) -> int | None:
    """A lock that lasts until the descriptor is closed; None when somebody else has it, or it cannot be had."""
    import fcntl

    try:
        flags = os.O_RDWR | os.O_CREAT if create else os.O_RDONLY
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError:
        if create:
            raise
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def readers_lock(folder: Path) -> int | None:
    """Keeps files from being deleted until the descriptor is closed; None where it cannot be had."""
    return _lock(folder / READERS_LOCK, exclusive=False, wait=True)


def _writer_lock(folder: Path) -> int:
    descriptor = _lock(folder / WRITER_LOCK, exclusive=True, create=True)
    if descriptor is None:
        raise ContextError(f"{folder}: another process is writing to it; wait for that, or name another folder")
    return descriptor
