"""How one run uses saved contexts: not at all, to answer from one, or to save what it reads in one.

Compares their provenance with the request, and finds what can be reused.
"""

from __future__ import annotations

import datetime
import os
import shlex
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from cache.layout import StoreLayout
from l4ctx.contexts.manifest import Recipe, read_manifest, saved_checkpoint, saved_recipe
from l4ctx.documents.document import Skipped
from l4ctx.documents.folder import folder_source
from l4ctx.errors import ContextError, RequestError
from l4ctx.machine.processor import default_attention
from l4ctx.planning.speed import fastest_attention
from l4ctx.run.choices import KVDtype
from l4ctx.run.request import ComputeOptions, Request
from model.config import TextConfig
from model.quantization.choice import NONE

if TYPE_CHECKING:
    from cache.blocks import Block
    from l4ctx.contexts.reader import ContextReader
    from l4ctx.contexts.restoring import Held
    from l4ctx.contexts.writer import ContextWriter
    from l4ctx.drafts.index import IndexedText
    from l4ctx.prompt.builder import Prompt
    from l4ctx.spans import ImageSpan, Span

CHOICES = ("dtype", "kv_dtype", "attention", "prefill_chunk_size", "quantize")


@dataclass(frozen=True)
class ContextChoices:
    """The options of a request where a saved context fixes some: they may repeat what it was made with, not differ."""

    request: Request
    recipe: Recipe | None  # of the existing context

    @classmethod
    def of(cls, request: Request) -> ContextChoices:
        """Raises ContextError for a context that cannot be used with these options."""
        context = request.context
        recipe = None
        if context.answer_from is not None:
            recipe = read_manifest(context.answer_from)
        elif context.save_to is not None:
            recipe = saved_recipe(context.save_to)
        choices = cls(request, recipe)
        if recipe is not None and context.folder is not None:
            fixed = (
                CHOICES if context.save_to else ("kv_dtype", "quantize")
            )  # an answer may be computed in another dtype
            given = {name: choices._given(name) for name in fixed}
            recipe.check(context.folder, {name: value for name, value in given.items() if value not in (None, "auto")})
        return choices

    @property
    def date(self) -> datetime.datetime:
        """The date for the chat template: that of the first prefill, so that the token ids stay the same."""
        return self.recipe.pinned_date if self.recipe else datetime.datetime.now().replace(microsecond=0)

    @property
    def compute(self) -> ComputeOptions:
        return replace(
            self.request.compute,
            dtype=self._choice("dtype"),
            prefill_chunk_size=self._choice("prefill_chunk_size"),
            quantize=self._choice("quantize"),
        )

    @property
    def kv_dtype(self) -> KVDtype:
        return cast(KVDtype, self._choice("kv_dtype"))

    def attention(self, config: TextConfig, dtype: str, device: str) -> str:
        """The backend for this computing dtype: the user's, else that of the context being resumed, else the fastest
        here, which is measured on a GPU."""
        written_with = self.recipe.attention if self.recipe and self.request.context.save_to else None
        chosen = self.request.compute.attention or written_with
        if chosen is None and device.partition(":")[0] != "cpu":
            return fastest_attention(config, dtype, device)
        return chosen or default_attention(dtype, on_accelerator=False)

    def check(self, provenance: dict[str, str], config: TextConfig) -> None:
        """Raises ContextError for a context of another checkpoint; `provenance` is this one's `fingerprint`."""
        folder = self.request.context.folder
        if folder is None:
            return
        if config.rope_parameters.rope_type == "longrope":
            raise RequestError(
                "saved contexts cannot be used with rope_type longrope, whose table depends on the "
                "length of the whole run"
            )
        if self.recipe is not None:
            self.recipe.check(folder, provenance, self._where_the_checkpoint_was(folder))

    def saved_layout(self, config: TextConfig, length: int, dtype: str) -> StoreLayout | None:
        """The layout of the existing context's store, whatever dtype is computed in. Raises ContextError."""
        folder = self.request.context.folder
        if self.recipe is None or folder is None:
            return None
        saved = StoreLayout.of(config, length=length, dtype=self.recipe.dtype, kv_dtype=self.recipe.kv_dtype)
        self.recipe.check(folder, {"block_tokens": saved.block_tokens, "segment_tokens": saved.segment_tokens})
        return saved.computed_in(dtype)

    def recipe_for(
        self, provenance: dict[str, str], layout: StoreLayout, prefill_chunk_size: int, attention: str
    ) -> Recipe:
        """Of the existing context, or of the one to be created."""
        return self.recipe or Recipe(
            **provenance,
            dtype=layout.dtype,
            kv_dtype=layout.kv_dtype,
            attention=attention,
            prefill_chunk_size=prefill_chunk_size,
            block_tokens=layout.block_tokens,
            segment_tokens=layout.segment_tokens,
            date=self.date.isoformat(),
            quantize=self.request.compute.quantize or NONE,
        )

    def kept(self) -> str:
        """What an interruption leaves, before anything is written."""
        return "nothing is kept" if self.recipe is None else f"{self.request.context.folder} is as it was"

    def _given(self, name: str) -> Any:
        return self.request.kv.dtype if name == "kv_dtype" else getattr(self.request.compute, name)

    def _choice(self, name: str) -> Any:
        """The user's option, else the context's; None or "auto" where neither says."""
        given = self._given(name)
        return getattr(self.recipe, name) if given in (None, "auto") and self.recipe else given

    def _where_the_checkpoint_was(self, folder: Path) -> str:
        """In parentheses, for a message; empty where the context does not say."""
        known, model = saved_checkpoint(folder), self.request.model
        if known is None:
            return ""
        is_this = known == model.absolute() or (known.exists() and model.exists() and known.samefile(model))
        return f" ({known}{', which has changed since' if is_this else '' if known.exists() else ', not there now'})"


class Reuse(NamedTuple):
    """How many of the prompt's first tokens are reused, and what the user should know about that."""

    tokens: int = 0
    notes: tuple[str, ...] = ()


class ReadContext:
    """A context to answer from, never changed. Close it."""

    def __init__(self, request: Request, note: Callable[[str], None]) -> None:
        """`note` is called while a writer keeps readers waiting. Raises ContextError."""
        from l4ctx.contexts.reader import ContextReader

        assert request.context.answer_from is not None
        self.folder = request.context.answer_from
        self._request = request
        self.reader: ContextReader = ContextReader(self.folder, waiting=note)
        text = self.reader.note(alone=not request.sources.paths)
        self._notes = (text,) if text else ()

    @property
    def tokens(self) -> int:
        """How many it holds so far: it may still be being read."""
        return self.reader.tokens

    @property
    def ends_amid_a_document(self) -> bool:
        """Whether it is still being read, and what it holds so far ends within a document. Raises ContextError."""
        return not self.reader.state.is_complete and any(
            span.start < self.tokens < span.stop for span in self.documents()
        )

    def documents(self) -> list[Span]:
        """All of them, also where it is still being read. Raises ContextError."""
        with with_repair_hint(self.folder):
            return self.reader.context.documents(self.reader.state)

    def images(self) -> list[ImageSpan]:
        """Raises ContextError."""
        with with_repair_hint(self.folder):
            return self.reader.context.images(self.reader.state)

    def ids(self) -> array[int]:
        """Token ids of its documents. Raises ContextError."""
        with with_repair_hint(self.folder):
            return self.reader.context.ids(self.reader.state)

    def text(self) -> IndexedText:
        """Its tokens, to copy drafts from. Raises ContextError."""
        with with_repair_hint(self.folder):
            return self.reader.context.text(self.reader.state)

    def reuse(self, prompt: Prompt, layout: StoreLayout) -> Reuse:
        """What it holds of this prompt. Raises ContextError, and RequestError for documents with nothing in common."""
        from l4ctx.contexts.reuse import reusable

        total = len(prompt.ids)
        if self._request.answers_from_all:
            tokens = self.tokens
            if not self._request.context.is_added_to:
                return Reuse(tokens, self._notes)
            total += tokens
        else:
            reader, ids = self.reader, memoryview(prompt.ids)[: prompt.documents_stop]
            with with_repair_hint(self.folder):
                tokens = reusable(reader.context, ids, layout, [reader.state], prompt.image_spans).tokens
                if not tokens:
                    self._check_beginning(ids)
        return Reuse(tokens, (*self._notes, f"{tokens:,} of {total:,} tokens are taken from {self.folder}"))

    def held(self, tokens: int) -> Held:
        """Where its first `tokens` tokens are."""
        return self.reader.context.held(self.reader.state, tokens)

    def close(self) -> None:
        self.reader.close()

    def _check_beginning(self, ids: memoryview) -> None:
        from l4ctx.contexts.reuse import common_prefix

        context, state = self.reader.context, self.reader.state
        first = next(iter(context.documents(state)), None)
        if first is not None and common_prefix(context.ids(state), ids) < min(first.stop, self.tokens):
            add = " ".join(f"--add {shlex.quote(path)}" for path in self._request.sources.paths[:3])
            raise RequestError(
                f"these documents start differently from those in {self.folder}, so nothing of it could be "
                f"reused: {add} adds them to what it holds; without --context "
                "the answer is from them alone"
            )


class WrittenContext:
    """A context that what is read is saved in. Close it."""

    def __init__(self, choices: ContextChoices, recipe: Recipe, skipped: Sequence[Skipped] = ()) -> None:
        """Creates or opens it; `skipped` is what is left out of what is read. Raises ContextError and
        DiskFullError."""
        from l4ctx.contexts.writer import ContextWriter

        request = choices.request
        assert request.context.save_to is not None
        self.folder = request.context.save_to
        self._choices, self._skipped = choices, skipped
        self.writer: ContextWriter = ContextWriter(self.folder, recipe, request.model)

    def reuse(self, prompt: Prompt, layout: StoreLayout) -> Reuse:
        """Starts writing: drops what is damaged or changed, and says what is left. Raises ContextError,
        DiskFullError."""
        from l4ctx.contexts.reuse import why_unusable

        request, writer = self._choices.request, self.writer
        notes, held = list(writer.notes), writer.kept
        ids, has_system_prompt = memoryview(prompt.ids)[: prompt.documents_stop], bool((request.system or "").strip())
        with with_repair_hint(self.folder):
            damage = writer.drop_damaged(verify=request.context.verify)
            notes += [f"{text}; it is read again from there on" for text in damage]
            if not request.context.replace:
                self._check_loss(prompt, layout, has_system_prompt)
            why = ""
            if held:
                chunk = layout.config.attention_chunk_size
                why = why_unusable(writer.context, writer.tip, ids, prompt.spans, chunk)
            tokens = writer.begin(ids, prompt.spans, layout, system=has_system_prompt, images=prompt.image_spans)
        if tokens:
            notes.append(f"{tokens:,} of {prompt.documents_stop:,} tokens are in {self.folder} already")
        elif held:
            notes.append(f"none of the {held:,} tokens in {self.folder} can be used: {why}")
        return Reuse(tokens, tuple(notes))

    def held(self, tokens: int) -> Held:
        """Where its first `tokens` tokens are."""
        return self.writer.context.held(self.writer.tip, tokens)

    def finish(self, tokens: int, tail: Callable[[], Mapping[int, Block]]) -> None:
        """Saves the `tail` after the last sealed block: the documents, of so many tokens, have been read."""
        if not self.writer.tip.is_complete:
            self.writer.finish(tokens, tail)

    def text(self) -> IndexedText:
        """The documents' tokens, to copy drafts from. Raises ContextError."""
        with with_repair_hint(self.folder):
            return self.writer.context.text(self.writer.tip)

    def kept(self) -> str:
        """What an interruption leaves."""
        if not self.writer.context.states:
            return self._choices.kept()
        self.writer.close()  # waits for writes in flight
        tip = self.writer.tip
        if tip.is_complete:
            return f"all {tip.tokens:,} tokens of the documents are kept in {self.folder}"
        return (
            f"{self.writer.kept:,} of {tip.tokens:,} tokens are kept in {self.folder}; the same command resumes there"
        )

    def bytes_on_disk(self) -> int | None:
        """None where the folder cannot be listed."""
        try:
            return sum(path.lstat().st_size for path in self.folder.rglob("*") if path.is_file())
        except OSError:
            return None

    def close(self) -> None:
        self.writer.close()

    def _check_loss(self, prompt: Prompt, layout: StoreLayout, has_system_prompt: bool) -> None:
        """Raises ContextError where the context would lose documents without --replace."""
        from l4ctx.contexts.guard import Reading, check_loss

        paths = self._choices.request.sources.paths
        reading = Reading(
            memoryview(prompt.ids)[: prompt.documents_stop],
            prompt.spans,
            {folder_source(path): path for path in paths if os.path.isdir(path)},
            _left_out(self._skipped),
            has_system_prompt,
            layout.config.attention_chunk_size,
        )
        check_loss(self.writer.context, reading)


def _left_out(skipped: Sequence[Skipped]) -> Callable[[str], str | None]:
    """Why a document is left out, by its name: for its own sake, or with a folder that it is in."""
    reasons = {entry.source: entry.reason for entry in skipped if not entry.reason.startswith("the same as ")}

    def reason(source: str) -> str | None:
        while source and source not in reasons:
            source = source.rpartition("/")[0]
        return reasons.get(source)

    return reason


@contextmanager
def with_repair_hint(folder: Path | None) -> Iterator[None]:
    """Turns damage in a context's files into an error that says how to repair it."""
    from cache.errors import DiskError, UnreadableError

    try:
        yield
    except UnreadableError as error:
        raise ContextError(
            f"{error}; {folder} was not changed: fix that and run the same command again, "
            "or read it again: l4ctx prefill with the same documents, the same -o and --verify"
        ) from None
    except DiskError as error:
        raise ContextError(
            f"{error}; l4ctx inspect {folder} --verify lists the damage, and l4ctx prefill "
            "with the same documents, the same -o and --verify keeps what is before it"
        ) from None
