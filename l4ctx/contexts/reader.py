"""Reading a saved context: what its journal names, its documents, and the cache that they were read into.

A reader goes by the journal as it was when the reader came. `l4ctx.contexts.folder` lists the files.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cache.disk import UnitFile
from cache.errors import DiskError, UnreadableError
from l4ctx.contexts.folder import BLOCKS, JOURNAL, RECREATE, typed
from l4ctx.contexts.head import check_head, read_head
from l4ctx.contexts.journal import Journal, JournalError
from l4ctx.contexts.locks import Lock, is_being_written, readers_lock
from l4ctx.contexts.manifest import Recipe, read_manifest
from l4ctx.contexts.restoring import Held
from l4ctx.contexts.states import State, Stored, replay
from l4ctx.drafts.index import IndexedText
from l4ctx.drafts.order import text_order
from l4ctx.errors import ContextError
from l4ctx.spans import ImageSpan, Span
from model.bounds import shown

if TYPE_CHECKING:
    from cache.hybrid import HybridKVCache

MAX_LIST_BYTES = 2**27
"""Of the list of documents, as JSON: 700,000 with long names."""


class Context:
    """A context as its journal described it when it was read. Raises ContextError where it cannot be trusted."""

    def __init__(
        self, folder: Path, recipe: Recipe, head: tuple[int, str] | None, records: list[dict[str, Any]]
    ) -> None:
        self.folder, self.recipe = folder, recipe
        if os.path.islink(folder / BLOCKS):
            raise ContextError(f"{folder / BLOCKS}: a symbolic link; a context's blocks lie in its own folder")
        self.states = replay(folder / JOURNAL, records, recipe.block_tokens)
        check_head(folder, head, records)
        tip = self.states[-1:]
        self.usable = tip + [state for state in (self.complete,) if state is not None and state not in tip]
        """The newest state, and the newest that is complete: those whose files are kept."""

    @classmethod
    def read(cls, folder: Path) -> Context:
        """The context as it is now, perhaps beside a writer: the head first, so that it is not the newer one."""
        recipe, head = read_manifest(folder), read_head(folder)
        try:
            records = Journal.read(folder / JOURNAL)
        except FileNotFoundError:
            records = []
        except OSError as error:
            raise ContextError(f"{folder / JOURNAL}: cannot be read: {error.strerror}") from None
        except JournalError as error:
            raise ContextError(f"{error}; {RECREATE}") from None
        if head is None and any(record.get("type") == "end" for record in records):
            head = read_head(folder)  # the writer made it after the first look
        return cls(folder, recipe, head, records)

    @property
    def complete(self) -> State | None:
        """The newest state whose documents were read to their end."""
        return next((state for state in reversed(self.states) if state.is_complete), None)

    def damage(self, state: State, *, verify: bool) -> dict[str, str]:
        """What is wrong with the state's files, by name; without `verify` only headers and lengths are checked.

        A file that cannot be read now counts as damaged only with `verify`, else raises UnreadableError.
        """
        found = {}
        for stored in state.needs:
            try:
                file = self.file(stored)
                file.verify() if verify else file.check_size()
            except DiskError as error:
                if isinstance(error, UnreadableError) and not verify:
                    raise
                found[stored.name] = str(error)
        return found

    def file(self, stored: Stored) -> UnitFile:
        return UnitFile(self.folder / stored.name, header_sha256=stored.header_sha256)

    def ids(self, state: State) -> array[int]:
        """The documents' token ids. Raises DiskError."""
        file, num_bytes = self.file(state.ids), 4 * state.tokens
        if "ids" not in file.units or file.num_bytes("ids", num_bytes) < num_bytes:
            raise DiskError(f"{file.source}: it does not hold {state.tokens:,} token ids")
        ids = array("i", bytes(num_bytes))
        file.read("ids", memoryview(ids).cast("B"))
        return ids

    def text(self, state: State) -> IndexedText:
        """The documents' token ids, to copy drafts from. Raises DiskError.

        The saved order is taken where it is whole; otherwise one is made. Nothing in it is trusted, for a wrong one
        leads to worse drafts only.
        """
        ids, file = self.ids(state), self.file(state.ids)
        if not ids:
            return IndexedText(ids, ids)
        order = array("i", bytes(4 * len(ids)))
        try:
            file.read("order", memoryview(order).cast("B"))
        except DiskError:
            return IndexedText(ids, text_order(ids))
        smallest, largest = torch.frombuffer(order, dtype=torch.int32).aminmax()
        is_within = int(smallest) >= 0 and int(largest) < len(ids)
        return IndexedText(ids, order if is_within else text_order(ids))

    def documents(self, state: State) -> list[Span]:
        """Source, SHA-256 and token span of each document. Raises DiskError."""
        file = self.file(state.ids)
        if "documents" not in file.units:
            raise DiskError(f"{file.source}: it lists no documents")
        return [Span(*entry) for entry in _listed(file, "documents", state.tokens)]

    def images(self, state: State) -> list[ImageSpan]:
        """Where images are among the tokens, and digests of everything their features depend on. Raises DiskError."""
        file = self.file(state.ids)
        return [
            ImageSpan(start, stop, sha256)
            for _, start, stop, sha256, *_ in (_listed(file, "images", state.tokens) if "images" in file.units else ())
        ]

    def held(self, state: State, tokens: int) -> Held:
        """Where the state's first `tokens` tokens are.

        They are all tokens of a complete state, or end at an attention chunk that `reusable` allows.
        """
        blocks = state.blocks[: tokens // self.recipe.block_tokens]
        return Held(self.folder, self.recipe.dtype, tokens, blocks, self.source(state, tokens))

    def restore(self, state: State, cache: HybridKVCache, tokens: int) -> None:
        """Fills an empty cache with the state's first `tokens` tokens. Raises DiskError."""
        self.held(state, tokens).restore(cache)

    def source(self, state: State, tokens: int) -> Stored | None:
        """The file with those of the first `tokens` that fill no whole block; None where there are none."""
        rows, rest = divmod(tokens, self.recipe.block_tokens)
        if rest == 0:
            return None
        if rows < len(state.blocks):
            return state.blocks[rows]
        return state.tail if state.is_complete else state.partial


def _listed(file: UnitFile, unit: str, tokens: int) -> list[tuple[str, int, int, str, str, int]]:
    """A unit of a tokens file that is a JSON list: source (or ""), start, stop, SHA-256, how it was read (or ""), its
    first line (or 1), within `tokens` tokens.

    Raises DiskError.
    """
    text = bytearray(file.num_bytes(unit, MAX_LIST_BYTES))
    file.read(unit, memoryview(text))
    try:
        return [_entry(typed(entry, dict), tokens) for entry in typed(json.loads(text), list)]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DiskError(f"{file.source}: its list of {unit} cannot be read ({error})") from None


def _entry(entry: dict[str, Any], tokens: int) -> tuple[str, int, int, str, str, int]:
    source, sha256 = typed(entry.get("source", ""), str), typed(entry["sha256"], str)
    start, stop = typed(entry["start"], int), typed(entry["stop"], int)
    if not 0 <= start <= stop <= tokens:
        raise ValueError(f"tokens {shown(start)} to {shown(stop)} of {tokens:,}")
    first_line = typed(entry.get("first_line", 1), int)
    if first_line < 1:
        raise ValueError(f"first line {shown(first_line)}")
    return source, start, stop, sha256, typed(entry.get("reading", ""), str), first_line


class ContextReader:
    """A context open for answering; any number at a time, beside one writer. Must be closed.

    Answers come from its newest complete state; while its first documents are still being read, from the sealed blocks.
    """

    def __init__(self, folder: Path, waiting: Callable[[str], None] | None = None) -> None:
        """`waiting` is called when another process keeps readers out. Raises ContextError."""
        # taken before the journal is read, so that the files it names are not deleted
        self._lock: Lock | None = readers_lock(folder, waiting)
        try:
            self.context, self.is_being_written = _read_beside_a_writer(folder)
            self.state = _answerable(self.context, self.is_being_written)
        except BaseException:
            self.close()
            raise

    @property
    def tokens(self) -> int:
        """How many of the state's tokens can be answered from: all of them, or those that are sealed."""
        return self.state.kept(self.context.recipe.block_tokens)

    def note(self, *, alone: bool) -> str | None:
        """What the user should know about the context; `alone`: no other documents are read."""
        tip = self.context.states[-1]
        done = f"{tip.kept(self.context.recipe.block_tokens):,} of {tip.tokens:,} tokens"
        if not self.state.is_complete:
            return f"{self.context.folder} is still being read: " + (
                f"the answer is from the first {done}" if alone else f"{done} are there so far"
            )
        if tip is self.state:
            return None
        how_far = f"are still being read ({done})" if self.is_being_written else f"were read up to {done} only"
        return (
            f"{self.context.folder}: newer documents {how_far}; "
            + ("the answer is from" if alone else "what is taken is from")
            + (f" the {self.state.tokens:,} tokens of the previous ones")
        )

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _read_beside_a_writer(folder: Path) -> tuple[Context, bool]:
    """The context as it is now, and whether it is being written."""
    context = Context.read(folder)
    if context.states and context.states[-1].is_complete:
        return context, False  # a writer may be at work, but readers need not know
    if is_being_written(folder):
        return context, True
    return Context.read(folder), False  # the writer may have finished in between


def _answerable(context: Context, is_being_written: bool) -> State:
    """Raises ContextError where there is nothing to answer from."""
    tip, complete = context.states[-1] if context.states else None, context.complete
    if complete is not None:
        return complete
    done = 0 if tip is None else tip.kept(context.recipe.block_tokens)
    if is_being_written:
        if tip is not None and done > 0:
            return tip
        how_far = "it has just begun" if tip is None else f"0 of {tip.tokens:,} tokens"
        raise ContextError(f"{context.folder}: it is still being read ({how_far}); nothing of it can be used yet")
    how_far = (
        "nothing was read yet" if tip is None else (f"reading was interrupted after {done:,} of {tip.tokens:,} tokens")
    )
    raise ContextError(
        f"{context.folder}: {how_far}; the command that made it (l4ctx prefill PATH... -o) resumes from there"
    )
