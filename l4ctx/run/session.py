"""One reading of documents, and perhaps one question over them, in steps that the CLI walks through and renders.

The steps are ordered so that what can be refused is refused early: arguments, contexts and documents before torch is
imported, shards before text is tokenized, memory before weights are loaded. Prints nothing and exits nowhere.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cache.layout import KV_DTYPES
from l4ctx.documents.document import DocumentSet, Skipped
from l4ctx.documents.reader import read_documents
from l4ctx.errors import RequestError
from l4ctx.formatting import counted
from l4ctx.machine.device import expect_no_numpy, free_on_accelerator, usable_device
from l4ctx.machine.memory import PeakSampler, ProcessMemory, available_disk, available_memory, process_memory
from l4ctx.machine.processor import computing_dtype
from l4ctx.planning import remedies
from l4ctx.planning.memory_plan import MemoryPlan, MemoryPlanError
from l4ctx.planning.workload import Capacity, Workload
from l4ctx.run.context import ContextUse
from l4ctx.run.images import ImageUse
from l4ctx.run.report import MemoryReport, Timing
from l4ctx.run.request import DEFAULT_MAX_NEW_TOKENS, Request, check_kv_device_memory, check_kv_dir
from model.config import TextConfig
from model.costs import Operations, reading_operations

if TYPE_CHECKING:
    import torch

    from cache.disk import Scratch
    from cache.hybrid import HybridKVCache
    from l4ctx.checkpoint.generation_config import GenerationConfig, Sampling
    from l4ctx.checkpoint.tokenizer import Tokenizer
    from l4ctx.engine.loop_guard import Loop
    from l4ctx.engine.prefill import PrefillProgress
    from l4ctx.prompt.builder import Prompt
    from l4ctx.run.images import ImageReading
    from l4ctx.vision.features import ImageFeatures
    from model.transformer import Transformer
    from model.weights.shards import StoredTensor

SKIPPED_LINES = 12


@dataclass
class Run:
    """The steps, to be called in the order in which they are written here; `note` is told what a user should know, and
    `tell` what is being done, as often as it changes."""

    request: Request
    note: Callable[[str], None]
    tell: Callable[[str], None] = lambda what: None
    answer: str = ""
    stop_reason: str | None = None
    generated_tokens: int = 0
    loop: Loop | None = None  # what ended the answer, if the stop reason is "repetition"
    timings: dict[str, Timing] = field(
        default_factory=lambda: {name: Timing() for name in ("load", "tokenize", "prefill", "decode")}
    )
    skipped: list[Skipped] = field(default_factory=list)

    config: TextConfig = field(init=False)
    contexts: ContextUse = field(init=False)
    images: ImageUse = field(init=False)
    tokenizer: Tokenizer = field(init=False)
    prompt: Prompt = field(init=False)
    prompt_tokens: int = field(init=False)
    max_new_tokens: int = field(init=False)
    generation: GenerationConfig = field(init=False)
    sampling: Sampling = field(init=False)
    plan: MemoryPlan = field(init=False)
    model: Transformer = field(init=False)
    cache: HybridKVCache = field(init=False)
    _reading: ImageReading | None = field(init=False, default=None)  # where images are among the documents
    _features: ImageFeatures | None = field(init=False, default=None)
    _documents: DocumentSet = field(init=False)
    _stored: dict[str, StoredTensor] = field(init=False)
    _provenance: dict[str, str] = field(init=False, default_factory=dict)
    _device: torch.device = field(init=False)
    _attention: str = field(init=False)
    _scratch: Scratch | None = field(init=False, default=None)
    _sampler: PeakSampler = field(init=False)
    _before: ProcessMemory | None = field(init=False, default=None)  # before weights and cache are made

    @contextmanager
    def sampling_memory(self) -> Iterator[None]:
        """Within it the process's memory is sampled for the report's peaks."""
        with PeakSampler() as self._sampler:
            yield

    def read_documents(self) -> None:
        """Reads the configuration, what a saved context was made with, and the documents.

        Raises ConfigError, ContextError, DocumentError and RequestError.
        """
        self.tell("reading files")
        self.config = TextConfig.from_folder(self.request.model)
        self.contexts = ContextUse(self.request)
        check_kv_dir(self.request.kv_dir)
        self.images = ImageUse(self.request.model, self.config, no_images=self.request.no_images, pdf=self.request.pdf)
        self._documents = read_documents(
            self.request.paths,
            stdin=self.request.stdin,
            pdf=self.request.pdf,
            encoding=self.request.encoding,
            keep_payload=self.request.keep_payload,
            no_images=self.images.why_not,
            progress=self._tell_of_documents,
            skip_unreadable=self.request.skip_unreadable,
        )
        self.skipped = self._documents.skipped
        if self.request.paths == ["-"] and self.skipped:
            or_alone = "" if self.request.question is None else "; --no-documents asks the model alone"
            raise RequestError(
                f"no documents: standard input has nothing to read: {self.skipped[0].reason} "
                f"(name a file or folder{or_alone})"
            )
        if self.request.paths:
            self._documents.require_any(self.request.paths)
        for entry in self.skipped[:SKIPPED_LINES]:
            self.note(f"skipped {entry.source}: {entry.reason}")
        if len(self.skipped) > SKIPPED_LINES:
            self.note(f"skipped {len(self.skipped) - SKIPPED_LINES} more (--json lists them all)")
        for text in self._documents.notes:
            self.note(text)

    def make_prompt(self) -> None:
        """Checks the shards, then tokenizes.

        Raises RequestError, CheckpointError, TokenizerError, PromptError, PromptLengthError, ContextError and
        GenerationConfigError.
        """
        from l4ctx.checkpoint.chat_template import ChatTemplate
        from l4ctx.checkpoint.tokenizer import Tokenizer
        from l4ctx.prompt.builder import build_prompt, check_length

        began = time.perf_counter()
        self.tell("checking the checkpoint")
        self._check_checkpoint()
        self.contexts.open_reader(self.note)
        self.tokenizer = Tokenizer.from_folder(self.request.model, self.config.vocab_size)
        template = ChatTemplate.from_folder(self.request.model, date=self.contexts.date)
        self.timings["load"].seconds += time.perf_counter() - began
        if template is None:
            self.note("the checkpoint has no chat template: documents and question are given to it as plain text")
        began = time.perf_counter()
        self.tell("tokenizing")
        if self._documents.has_images:
            self._reading = self.images.prepare(
                self.tokenizer, self.images.stored_tensors(), with_digests=self.contexts.folder is not None
            )
        held = self._leave_out_what_is_held()
        self.prompt = build_prompt(
            self.tokenizer,
            template,
            self._documents.take(),
            self.request.question or "",
            images=self._reading.prompter if self._reading else None,
            system=self.request.system,
            first_index=held + 1,
            progress=self._tell_of_tokens(self._documents.characters),
        )
        self._keep_what_is_asked()
        self.timings["tokenize"] = Timing(time.perf_counter() - began, len(self.prompt.ids))
        for text in self.prompt.notes:
            self.note(text)
        room = self.config.max_position_embeddings - self.prompt_tokens
        self.max_new_tokens = self.request.max_new_tokens or max(1, min(DEFAULT_MAX_NEW_TOKENS, room))
        if self.request.question is None:
            self.max_new_tokens = 0
        if 0 < room < self.max_new_tokens:
            raise RequestError(
                f"--max-new-tokens {self.max_new_tokens}: the prompt's {self.prompt_tokens:,} tokens "
                f"leave {room:,} of the model's {self.config.max_position_embeddings:,} positions"
            )
        check_length(self.prompt, self.max_new_tokens, self.config.max_position_embeddings, self.prompt_tokens)
        if self.prompt.spans:
            self.note(
                f"{counted(len(self.prompt.spans), 'document')}, "
                f"{counted(len(self.prompt.images), 'image') + ', ' if self.prompt.images else ''}"
                f"{len(self.prompt.ids):,} tokens"
            )

    def plan_memory(self) -> None:
        """Predicts every owner's bytes, and opens a context that is written to.

        Raises MemoryPlanError when they are more than is free, ContextError, and DiskFullError.
        """
        from model.weights.loading import can_be_mapped, stored_parameters
        from model.weights.shards import stored_dtype

        self.tell("planning memory")
        is_mappable = can_be_mapped(self._stored)
        stored = stored_dtype(self._stored)
        parameters = stored_parameters(self._stored, self.config)
        self._before = process_memory()
        capacity = self._capacity()
        on_accelerator = self._device.type != "cpu"
        dtype = computing_dtype(
            self.contexts.choice("dtype"), stored, parameters, available=capacity.host, on_accelerator=on_accelerator
        )
        self._attention = self.contexts.attention(dtype, on_accelerator=on_accelerator)
        workload = Workload(
            self.config,
            prompt_tokens=self.prompt_tokens,
            max_new_tokens=self.max_new_tokens,
            weights=parameters * KV_DTYPES[dtype],
            weights_are_mapped=not on_accelerator and dtype == stored and is_mappable,
            dtype=dtype,
            kv_dtype=self.contexts.choice("kv_dtype"),
            prefill_chunk_size=self.contexts.choice("prefill_chunk_size"),
            is_saved=self.contexts.folder is not None,
            on_disk_already=2**62 if self.request.context is not None else 0,  # all of it: nothing is written
            new_tokens=len(self.prompt.ids),
            stored_dtype=stored if is_mappable else None,
            largest=self._largest(),
            saved_layout=self.contexts.saved_layout(self.config, self.prompt_tokens + self.max_new_tokens, dtype),
            images=self._reading.work(self.prompt.images) if self._reading else None,
        )
        self.plan = MemoryPlan.of(workload, capacity)
        if self.request.save_context is not None and self.request.save_context.exists():
            capacity = replace(capacity, disk=None)  # much of it may be there already, and a full disk loses nothing
        remedies.check(self.plan, capacity)
        for text in self.plan.notes:
            self.note(text)
        self.tell(f"comparing with {self.contexts.folder}" if self.contexts.folder else "planning memory")
        self.contexts.begin(
            self.prompt, self._provenance, self.plan.layout, self.plan.prefill_chunk_size, self._attention
        )
        for text in self.contexts.notes:
            self.note(text)
        self._check_unsaved_rows()

    def load_model(self) -> None:
        """Maps or converts the weights, and makes a cache with what need not be read.

        Raises CheckpointError, ContextError and DiskFullError.
        """
        from cache.disk import Scratch
        from cache.hybrid import HybridKVCache
        from model.weights.loading import load_checkpoint

        began = time.perf_counter()
        self.tell("loading weights")
        self.model = load_checkpoint(
            self.request.model,
            dtype=self.plan.workload.dtype,
            device=self._device,
            attention=self._attention,
            is_mapped=self.plan.weights_are_mapped,
        )
        unread = [placed for placed in self.prompt.images if placed.span.stop > self.contexts.reused]
        if self._reading is not None and unread:
            self._features = self._reading.load(
                unread, dtype=self.model.dtype, device=self._device, is_mapped=self.plan.weights_are_mapped
            )
        if self.request.kv_dir is not None:
            self._scratch = Scratch(self.request.kv_dir)
        self.cache = HybridKVCache(
            self.config,
            length=self.prompt_tokens + self.max_new_tokens,
            dtype=self.model.dtype,
            device=self._device,
            layout=self.plan.layout,
            residency=self.plan.residency,
            rows=self.contexts.writer or self._scratch,
        )
        if self.contexts.reused:
            self.tell(f"loading {self.contexts.reused:,} tokens of {self.contexts.folder}")
        self.contexts.restore(self.cache)
        self.timings["load"].seconds += time.perf_counter() - began

    def prefill(self) -> Iterator[PrefillProgress]:
        """Reads all of the prompt that is not there yet but its last token; keeps the documents, if that is asked for.

        Raises ContextError and DiskFullError.
        """
        if self.contexts.writer is not None:
            yield from self._read(self.prompt.documents_stop)
            if not self.contexts.writer.tip.is_complete:
                self.contexts.writer.finish(self.cache)
            self.cache.rows = self._scratch
        if self.request.question is not None:
            yield from self._read(self.prompt_tokens - 1)

    def work(self, start: int, stop: int) -> Operations:
        """What reading positions start .. stop - 1 of the prompt takes."""
        operations = reading_operations(self.config, start, stop)
        return self._reading.with_images(operations, self.prompt.images, start, stop) if self._reading else operations

    def _read(self, stop: int) -> Iterator[PrefillProgress]:
        from l4ctx.engine.prefill import prefill

        first = self.prompt_tokens - len(self.prompt.ids)  # position of the prompt's first own token
        ids = memoryview(self.prompt.ids)[self.cache.offset - first : stop - first]
        before = self.timings["prefill"]
        with self.contexts.with_repair_hint(), self._telling_what_is_kept():
            for step in prefill(
                self.model, self.cache, ids, prefill_chunk_size=self.plan.prefill_chunk_size, features=self._features
            ):
                self.timings["prefill"] = Timing(before.seconds + step.seconds, before.tokens + step.done)
                yield step

    @property
    def reading_stop(self) -> int:
        """The position up to which `prefill` reads; `contexts.reused` is that from which on."""
        return self.prompt.documents_stop if self.request.question is None else self.prompt_tokens - 1

    @contextmanager
    def _telling_what_is_kept(self) -> Iterator[None]:
        """An image that cannot be read any more ends the run; what was read before it may be kept."""
        from l4ctx.documents.images import ImageError

        try:
            yield
        except ImageError as error:
            raise type(error)(f"{error}; {self.kept()}") from None

    def decode(self) -> Iterator[str]:
        """The answer in pieces of text, as they are known. Raises GenerationError."""
        from l4ctx.checkpoint.tokenizer import StreamDecoder
        from l4ctx.engine.generate import generate
        from l4ctx.engine.loop_guard import LoopGuard

        began = time.perf_counter()
        decoder = StreamDecoder(self.tokenizer)
        guard = LoopGuard() if self.request.loop_guard else None
        tokens = generate(
            self.model,
            self.cache,
            self.prompt.ids[-1],
            max_new_tokens=self.max_new_tokens,
            stop_tokens=self.generation.stop_tokens,
            sampling=self.sampling,
            guard=guard,
        )
        while True:
            try:
                with self.contexts.with_repair_hint():
                    piece = decoder.push(next(tokens))
            except StopIteration as end:
                self.stop_reason = end.value
                self.loop = guard.loop if guard else None
                break
            self.generated_tokens += 1
            self.timings["decode"] = Timing(time.perf_counter() - began, self.generated_tokens)
            self.answer += piece
            if piece:
                yield piece
        rest = decoder.finish()
        self.answer += rest
        self.timings["decode"] = Timing(time.perf_counter() - began, self.generated_tokens)
        yield rest

    def kept(self) -> str:
        """What an interruption now leaves."""
        return self.contexts.kept() if hasattr(self, "contexts") else "nothing of it is kept"

    def close(self) -> None:
        """Lets saved contexts go, and gives back the space of a scratch file."""
        if hasattr(self, "contexts"):
            self.contexts.close()
        if self._scratch is not None:
            self._scratch.close()

    def memory_report(self) -> MemoryReport:
        import torch

        held = self.cache.held()
        on_gpu = self._device.type == "cuda"
        return MemoryReport(
            predicted=self.plan,
            weights=sum(p.nbytes for p in self.model.parameters())
            + (self._features.weight_bytes if self._features else 0),
            rope_windows=held.rope_windows,
            nope_device=held.nope_device,
            nope_host=held.nope_host,
            nope_disk=held.nope_disk,
            buffers=held.buffers,
            token_ids=memoryview(self.prompt.ids).nbytes,
            process_before=self._before,
            process=process_memory(),
            process_peak=self._sampler.peak,
            accelerator_peak=torch.cuda.max_memory_allocated(self._device) if on_gpu else None,
        )

    def _tell_of_documents(self, count: int) -> None:
        self.tell(f"reading files: {counted(count, 'document')}")

    def _tell_of_tokens(self, characters: int) -> Callable[[int, int], None]:
        return lambda done, tokens: self.tell(f"tokenizing: {done:,} of {characters:,} characters, {tokens:,} tokens")

    def _check_checkpoint(self) -> None:
        """What can be refused before any text is tokenized: device, shards, generation settings."""
        expect_no_numpy()
        from l4ctx.checkpoint.generation_config import GenerationConfig
        from model.weights.loading import checked_tensors
        from model.weights.shards import unused_weights

        self._device = usable_device(self.request.device)
        self._stored = checked_tensors(self.request.model, self.config)
        if (text := unused_weights(self.request.model)) is not None:
            self.note(text)
        self.generation = GenerationConfig.from_folder(self.request.model)
        self.generation.check(self.config.vocab_size)
        self.sampling = self._sampling()
        if self.contexts.folder is not None:
            from l4ctx.checkpoint.fingerprint import fingerprint

            self._provenance = fingerprint(self.request.model, self.config, self._stored)
            self.contexts.check(self._provenance, self.config)

    def _keep_what_is_asked(self) -> None:
        """Where the documents are in a context, the question alone; where nothing is asked, the documents alone."""
        from l4ctx.prompt.builder import DOCUMENT_END

        stop = self.prompt.documents_stop
        if self.request.question is None:
            del self.prompt.ids[stop:]
        self.prompt_tokens = len(self.prompt.ids)
        if self.contexts.reader is not None and self.request.answers_from_all:
            end = array("i")
            if self.contexts.ends_amid_a_document:
                self.tokenizer.encode_data(DOCUMENT_END, into=end)
            self.prompt.follow(self.contexts.reader.tokens + len(end))
            self.prompt.ids[:0] = end
            self.prompt_tokens = self.contexts.reader.tokens + len(self.prompt.ids)

    def _leave_out_what_is_held(self) -> int:
        """Of documents that are added to a context, those that it holds; returns the number that it holds."""
        from l4ctx.documents.added import added_documents

        if not self.request.added or self.contexts.reader is None:
            return 0
        tokens = self.contexts.reader.tokens  # it may still be being read
        held = [span for span in self.contexts.documents() if span.start < tokens]
        self._documents.documents, skipped = added_documents(
            self._documents.documents, {span.source: span.sha256 if span.stop <= tokens else "" for span in held}
        )
        for entry in skipped:
            self.note(f"skipped {entry.source}: {entry.reason}")
        self.skipped += skipped
        return len(held)

    def _largest(self) -> list[tuple[str, int]]:
        spans = sorted(self.prompt.spans, key=lambda span: span.start - span.stop)
        return [(span.source, span.stop - span.start) for span in spans]

    def _capacity(self) -> Capacity:
        """What the machine has, within what the user allows; blocks of a context are on disk already."""
        asked = self.request
        check_kv_device_memory(asked.kv_device_memory, on_accelerator=self._device.type == "cuda")
        folder = asked.save_context or asked.kv_dir
        disk = None if folder is None else available_disk(folder)
        return Capacity(
            host=available_memory(),
            accelerator=free_on_accelerator(self._device),
            kv_device=asked.kv_device_memory,
            kv_host=asked.kv_host_memory,
            disk=disk,
            disk_folder=str(folder or asked.context) if folder or asked.context else None,
        )

    def _check_unsaved_rows(self) -> None:
        """Blocks that are read anew beside a context that is only answered from have no place on disk."""
        host, layout = self.plan.residency.host_rows, self.plan.layout
        if self.contexts.reader is None or self.request.kv_dir is not None or host is None:
            return
        new = layout.sealed_rows(self.prompt_tokens) - self.contexts.reused // layout.block_tokens
        if new > host + self.plan.residency.device_rows:
            raise MemoryPlanError(
                "what these documents have beyond the context does not fit into memory; add "
                "--kv-dir, or read them into the context with l4ctx prefill"
            )

    def _sampling(self) -> Sampling:
        from l4ctx.checkpoint.generation_config import Sampling

        asked = self.request
        given = {name: getattr(asked, name) for name in ("temperature", "top_p", "top_k", "seed")}
        base = self.generation.sampling if asked.sample else Sampling()
        sampling = replace(base, **{name: value for name, value in given.items() if value is not None})
        if sampling.temperature == 0 and (asked.top_p is not None or asked.top_k is not None or asked.seed is not None):
            self.note("--top-p, --top-k and --seed change nothing at temperature 0; add --temperature or --sample")
        return sampling
