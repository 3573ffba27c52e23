"""What one run does with saved contexts: nothing, answer from one, or keep in one what it reads.

Compares what they were made with, and finds what need not be read again. What is in a context's folder is left to
`l4ctx.contexts.reader`.
"""

from __future__ import annotations

import datetime
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache.layout import StoreLayout
from l4ctx.contexts.manifest import Recipe, read_manifest, saved_checkpoint, saved_recipe
from l4ctx.documents.folder import folder_source
from l4ctx.errors import ContextError, RequestError
from l4ctx.machine.processor import default_attention
from l4ctx.run.request import Request
from model.config import TextConfig

if TYPE_CHECKING:
    from cache.hybrid import HybridKVCache
    from l4ctx.contexts.reader import ContextReader
    from l4ctx.contexts.writer import ContextWriter
    from l4ctx.prompt.builder import Prompt
    from l4ctx.spans import ImageSpan, Span

CHOICES = ("dtype", "kv_dtype", "attention", "prefill_chunk_size")


class ContextUse:
    """Made before documents are read, so that what cannot be used is refused at once."""

    def __init__(self, request: Request) -> None:
        """Raises ContextError."""
        self.request = request
        self.recipe: Recipe | None = None  # of the context that is there
        self.reader: ContextReader | None = None
        self.writer: ContextWriter | None = None
        self.reused = 0  # tokens that need not be read
        self.notes: list[str] = []
        if request.context is not None:
            self.recipe = read_manifest(request.context)
        elif request.save_context is not None:
            self.recipe = saved_recipe(request.save_context)
        self._check_choices()

    def open_reader(self, note: Callable[[str], None]) -> None:
        """Opens the context that is to be answered from. Raises ContextError."""
        if self.request.context is not None:
            from l4ctx.contexts.reader import ContextReader

            self.reader = ContextReader(self.request.context, waiting=note)
            if text := self.reader.note(alone=not self.request.paths):
                self.notes.append(text)

    @property
    def folder(self) -> Path | None:
        return self.request.context or self.request.save_context

    @property
    def date(self) -> datetime.datetime:
        """What the chat template is told: the day of the first reading, so that what follows matches it."""
        return self.recipe.pinned_date if self.recipe else datetime.datetime.now().replace(microsecond=0)

    def choice(self, name: str) -> Any:
        """An option as the user gave it, else as the context has it; None or "auto" where neither says."""
        given = getattr(self.request, name)
        return getattr(self.recipe, name) if given in (None, "auto") and self.recipe else given

    def attention(self, dtype: str, *, on_accelerator: bool) -> str:
        """The backend for this computing dtype: the user's; the one that wrote a context that is gone on with; or the
        quickest here."""
        provenance = self.recipe.attention if self.recipe and self.request.save_context else None
        return self.request.attention or provenance or default_attention(dtype, on_accelerator=on_accelerator)

    def _check_choices(self) -> None:
        """Options that a context fixes may be given, but not differ; an answer may be computed in another dtype."""
        if self.recipe is None or self.folder is None:
            return
        fixed = CHOICES if self.request.save_context else ("kv_dtype",)
        given = {name: getattr(self.request, name) for name in fixed}
        self.recipe.check(self.folder, {name: value for name, value in given.items() if value not in (None, "auto")})

    def check(self, provenance: dict[str, str], config: TextConfig) -> None:
        """Raises ContextError for a context of another checkpoint; `provenance` is this one's `fingerprint`."""
        if self.folder is None:
            return
        if config.rope_parameters.rope_type == "longrope":
            raise RequestError(
                "saved contexts cannot be used with rope_type longrope, whose table depends on the "
                "length of the whole run"
            )
        if self.recipe is not None:
            self.recipe.check(self.folder, provenance, self._where_the_checkpoint_was(self.folder))

    def _where_the_checkpoint_was(self, folder: Path) -> str:
        """In brackets, for a message; nothing where the context does not tell."""
        known = saved_checkpoint(folder)
        if known is None:
            return ""
        is_this = known == self.request.model.absolute() or (
            known.exists() and self.request.model.exists() and known.samefile(self.request.model)
        )
        return f" ({known}{', which has changed since' if is_this else '' if known.is_dir() else ', not there now'})"

    def saved_layout(self, config: TextConfig, length: int, dtype: str) -> StoreLayout | None:
        """The store's layout as the context that is there has it, whatever is computed in. Raises ContextError."""
        if self.recipe is None or self.folder is None:
            return None
        saved = StoreLayout.of(config, length=length, dtype=self.recipe.dtype, kv_dtype=self.recipe.kv_dtype)
        self.recipe.check(self.folder, {"block_tokens": saved.block_tokens, "segment_tokens": saved.segment_tokens})
        return saved.computed_in(dtype)

    def begin(
        self, prompt: Prompt, provenance: dict[str, str], layout: StoreLayout, prefill_chunk_size: int, attention: str
    ) -> None:
        """Finds what need not be read, and for writing, makes or opens the context.

        Raises ContextError and DiskFullError.
        """
        if self.reader is not None:
            self._begin_reading(self.reader, prompt, layout)
        elif self.request.save_context is not None:
            recipe = self.recipe or Recipe(
                **provenance,
                dtype=layout.dtype,
                kv_dtype=layout.kv_dtype,
                attention=attention,
                prefill_chunk_size=prefill_chunk_size,
                block_tokens=layout.block_tokens,
                segment_tokens=layout.segment_tokens,
                date=self.date.isoformat(),
            )
            self._begin_writing(self.request.save_context, recipe, prompt, layout)

    def _begin_reading(self, reader: ContextReader, prompt: Prompt, layout: StoreLayout) -> None:
        from l4ctx.contexts.reuse import reusable

        if self.request.answers_from_all:
            self.reused = reader.tokens
            if self.request.added:
                self.notes.append(
                    f"{self.reused:,} of {self.reused + len(prompt.ids):,} tokens are taken from "
                    f"{reader.context.folder}"
                )
            return
        with self.with_repair_hint():
            reuse = reusable(
                reader.context,
                memoryview(prompt.ids)[: prompt.documents_stop],
                layout,
                [reader.state],
                prompt.image_spans,
            )
            if not reuse.tokens:
                self._check_beginning(reader, prompt)
        self.reused = reuse.tokens
        self.notes.append(f"{reuse.tokens:,} of {len(prompt.ids):,} tokens are taken from {reader.context.folder}")

    def _check_beginning(self, reader: ContextReader, prompt: Prompt) -> None:
        """Raises RequestError where documents have nothing to do with the context beside which they are asked about."""
        from l4ctx.contexts.reuse import common_prefix

        first = next(iter(reader.context.documents(reader.state)), None)
        common = common_prefix(reader.context.ids(reader.state), memoryview(prompt.ids)[: prompt.documents_stop])
        if first is not None and common < min(first.stop, reader.tokens):
            add = " ".join(f"--add {shlex.quote(path)}" for path in self.request.paths[:3])
            raise RequestError(
                f"these documents begin otherwise than those of {reader.context.folder}, so that "
                f"nothing would be taken from it: {add} adds them to what it holds; without --context "
                "the answer is from them alone"
            )

    def _begin_writing(self, folder: Path, recipe: Recipe, prompt: Prompt, layout: StoreLayout) -> None:
        from l4ctx.contexts.reuse import why_unusable
        from l4ctx.contexts.writer import ContextWriter

        writer = self.writer = ContextWriter(folder, recipe, self.request.model)
        self.notes += writer.notes
        held = writer.kept
        ids = memoryview(prompt.ids)[: prompt.documents_stop]
        with self.with_repair_hint():
            damage = writer.drop_damaged(verify=self.request.verify)
            self.notes += [f"{text}; it is read anew from there" for text in damage]
            if not self.request.replace:
                self._check_loss(writer, prompt, layout)
            why = (
                why_unusable(writer.context, writer.tip, ids, prompt.spans, layout.config.attention_chunk_size)
                if held
                else ""
            )
            self.reused = writer.begin(
                ids, prompt.spans, layout, system=bool((self.request.system or "").strip()), images=prompt.image_spans
            )
        if self.reused:
            self.notes.append(f"{self.reused:,} of {prompt.documents_stop:,} tokens are in {folder} already")
        elif held:
            self.notes.append(f"none of the {held:,} tokens in {folder} can be used: {why}")

    @property
    def ends_amid_a_document(self) -> bool:
        """Whether the context is still being read, and what is there of it ends within one. Raises ContextError."""
        assert self.reader is not None
        tokens = self.reader.tokens
        return not self.reader.state.is_complete and any(span.start < tokens < span.stop for span in self.documents())

    def _check_loss(self, writer: ContextWriter, prompt: Prompt, layout: StoreLayout) -> None:
        """Raises ContextError where the context would lose documents that nobody said it may lose."""
        from l4ctx.contexts.guard import Reading, check_loss

        folders = [folder_source(path) for path in self.request.paths if os.path.isdir(path)]
        check_loss(
            writer.context,
            Reading(
                memoryview(prompt.ids)[: prompt.documents_stop],
                prompt.spans,
                folders,
                bool((self.request.system or "").strip()),
                layout.config.attention_chunk_size,
            ),
        )

    def documents(self) -> list[Span]:
        """Those of a context that is answered from without reading any. Raises ContextError."""
        assert self.reader is not None
        with self.with_repair_hint():
            return self.reader.context.documents(self.reader.state)

    def images(self) -> list[ImageSpan]:
        """Those of a context that is answered from without reading any. Raises ContextError."""
        assert self.reader is not None
        with self.with_repair_hint():
            return self.reader.context.images(self.reader.state)

    def restore(self, cache: HybridKVCache) -> None:
        """Fills an empty cache with what need not be read. Raises ContextError."""
        with self.with_repair_hint():
            if self.reader is not None and self.reused:
                self.reader.context.restore(self.reader.state, cache, self.reused)
            elif self.writer is not None and self.reused:
                self.writer.restore(cache, self.reused)

    @contextmanager
    def with_repair_hint(self) -> Iterator[None]:
        """Damage in a context's file ends as an error that says what can be done."""
        from cache.errors import DiskError, UnreadableError

        try:
            yield
        except UnreadableError as error:
            raise ContextError(
                f"{error}; {self.folder} is left as it is: see to that and run the same command again, "
                "or let l4ctx prefill with the same documents, the same -o and --verify read it "
                "anew"
            ) from None
        except DiskError as error:
            raise ContextError(
                f"{error}; l4ctx inspect {self.folder} --verify lists the damage, and l4ctx prefill "
                "with the same documents, the same -o and --verify keeps what is before it"
            ) from None

    def kept(self) -> str:
        """What an interruption leaves."""
        if self.writer is None or not self.writer.context.states:
            return "nothing is kept" if self.recipe is None else f"{self.folder} is as it was"
        self.writer.close()  # what is on its way to the disk counts, too
        tip = self.writer.tip
        if tip.is_complete:
            return f"all {tip.tokens:,} tokens of the documents are kept in {self.writer.folder}"
        return (
            f"{self.writer.kept:,} of {tip.tokens:,} tokens are kept in {self.writer.folder}; the same command "
            "goes on from there"
        )

    def bytes_on_disk(self) -> int | None:
        """Of the context that is written to; None without one."""
        if self.writer is None:
            return None
        return sum(path.lstat().st_size for path in self.writer.folder.rglob("*") if path.is_file())

    def close(self) -> None:
        for used in (self.reader, self.writer):
            if used is not None:
                used.close()
