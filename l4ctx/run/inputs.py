"""The first stage of a run: reads what the request names and builds the prompt.

The order makes refusals early: arguments, contexts and documents are checked before torch is imported, shards before
text is tokenized.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from l4ctx.documents.document import DocumentSet, Skipped
from l4ctx.documents.length import TextLimit
from l4ctx.documents.reader import read_documents
from l4ctx.errors import RequestError
from l4ctx.formatting import counted
from l4ctx.machine.device import device_of_rank, prepare_torch, usable_devices
from l4ctx.machine.ranks import Launch
from l4ctx.run.context import ContextChoices, ReadContext
from l4ctx.run.conversing import turns_of
from l4ctx.run.images import ImageUse
from l4ctx.run.monitor import Monitor, Timing
from l4ctx.run.request import DEFAULT_MAX_NEW_TOKENS, AnswerOptions, Request, SourceOptions
from l4ctx.run.templates import chat_template, wrapping_of
from l4ctx.run.weights import Weights
from model.config import TextConfig

if TYPE_CHECKING:
    import torch

    from l4ctx.checkpoint.generation_config import GenerationConfig, Sampling
    from l4ctx.checkpoint.tokenizer import Tokenizer
    from l4ctx.planning.workload import Rows
    from l4ctx.prompt.builder import Prompt
    from l4ctx.run.asking import Asking
    from l4ctx.run.images import ImageReading
    from model.weights.sources import WeightSource

SKIPPED_LINES = 12


@dataclass(frozen=True)
class Sources:
    """What was read, not tokenized yet."""

    config: TextConfig
    images: ImageUse
    documents: DocumentSet


@dataclass(frozen=True)
class Checked:
    """The checkpoint but for its tokenizer, and the device: everything that can be refused before tokenizing.

    Of several processes, each has its own part of the model.
    """

    config: TextConfig
    weights: Weights
    generation: GenerationConfig
    sampling: Sampling
    devices: tuple[torch.device, ...]  # that layers may be on
    provenance: dict[str, str]  # fingerprint, to compare with a saved context; empty without one
    whole: TextConfig  # the whole model's


@dataclass(frozen=True)
class Inputs:
    """A prompt, and everything that its plan depends on."""

    request: Request
    config: TextConfig
    choices: ContextChoices
    checked: Checked
    context: ReadContext | None
    tokenizer: Tokenizer
    prompt: Prompt  # without what `context` holds
    images: ImageReading | None  # None without images
    skipped: Sequence[Skipped]
    prompt_tokens: int  # including those that `context` holds
    max_new_tokens: int  # behind the prompt; with many questions, of the longest with its answer
    asking: Asking | None = None  # many questions, which are not part of the prompt
    rows: Rows | None = None  # what as many answers at a time as may be would need

    @property
    def length(self) -> int:
        """Positions for prompt and answer."""
        return self.prompt_tokens + self.max_new_tokens

    @property
    def reading_stop(self) -> int:
        """Where prefill ends."""
        return self.prompt.documents_stop if self.request.question is None else self.prompt_tokens - 1


def read_sources(
    model: Path,
    config: TextConfig,
    options: SourceOptions,
    progress: Callable[[int], None] | None = None,
    *,
    is_limited: bool = True,
) -> Sources:
    """Texts that surely have more tokens than the model has positions are refused if `is_limited`.

    Raises DocumentError, and RequestError for images that are asked for and cannot be read.
    """
    images = ImageUse(model, config, no_images=options.no_images, pdf=options.pdf)
    documents = read_documents(
        options.paths,
        stdin=options.stdin,
        pdf=options.pdf,
        encoding=options.encoding,
        keep_payload=options.keep_payload,
        html=options.html,
        no_images=images.why_not,
        progress=progress,
        skip_unreadable=options.skip_unreadable,
        selection=options.selection,
        limit=TextLimit(config.max_position_embeddings, lambda: _longest_token(model, config)) if is_limited else None,
    )
    return Sources(config, images, documents)


def _longest_token(model: Path, config: TextConfig) -> int | None:
    """In bytes; None where it has no bound. Raises TokenizerError."""
    from l4ctx.checkpoint.tokenizer import Tokenizer

    return Tokenizer.from_folder(model, config.vocab_size).longest_token


def read_request(request: Request, monitor: Monitor) -> tuple[ContextChoices, Sources]:
    """Reads the configuration, the provenance of a saved context, and the documents.

    Raises ConfigError, ContextError, DocumentError and RequestError.
    """
    monitor.tell("reading files")
    config = TextConfig.from_folder(request.model)
    choices = ContextChoices.of(request)
    monitor.kept = choices.kept
    request.kv.check_folder()
    sources = read_sources(
        request.model,
        config,
        request.sources,
        lambda count: monitor.tell(f"reading files: {counted(count, 'document')}"),
    )
    skipped, paths = sources.documents.skipped, request.sources.paths
    if list(paths) == ["-"] and skipped:
        or_alone = "; --no-documents asks the model alone" if request.asks else ""
        raise RequestError(
            f"no documents: standard input has nothing to read: {skipped[0].reason} (name a file or folder{or_alone})"
        )
    if paths:
        sources.documents.require_any(paths)
    tell_skipped(sources.documents, monitor.note)
    return choices, sources


def tell_skipped(found: DocumentSet, note: Callable[[str], None]) -> None:
    """What was left out, the first ones by name, and what there is to note about the others."""
    told = [entry for entry in found.skipped if not entry.is_asked]
    for entry in told[:SKIPPED_LINES]:
        note(f"skipped {entry.source}: {entry.reason}")
    if len(told) > SKIPPED_LINES:
        note(f"skipped {len(told) - SKIPPED_LINES} more (--json lists them all)")
    if len(told) < len(found.skipped):
        note(f"skipped {len(found.skipped) - len(told):,} as --include and --exclude say")
    for text in found.notes:
        note(text)


def make_inputs(choices: ContextChoices, sources: Sources, monitor: Monitor) -> Inputs:
    """Checks the shards, then tokenizes.

    Raises RequestError, CheckpointError, TokenizerError, PromptError, PromptLengthError, ContextError and
    GenerationConfigError.
    """
    from l4ctx.checkpoint.tokenizer import Tokenizer
    from l4ctx.prompt.builder import after_question, build_prompt, check_length
    from l4ctx.prompt.instruction import instructed
    from l4ctx.run.asking import Asking

    request, config = choices.request, sources.config
    with monitor.loading():
        monitor.tell("checking the checkpoint")
        checked = check_checkpoint(choices, config, monitor.note)
        context = _opened(request, monitor)
        template = chat_template(request, choices)
        tokenizer = Tokenizer.from_folder(request.model, config.vocab_size)
        if request.converses:
            turns_of(request, config, tokenizer, template)  # refuses before anything is read
    if template is None and not request.template.raw:
        monitor.note("the checkpoint has no chat template: documents and question are given to it as plain text")
    began = time.perf_counter()
    monitor.tell("tokenizing")
    reading = None
    if sources.documents.has_images:
        has_context = request.context.folder is not None
        reading = sources.images.prepare(tokenizer, sources.images.sources(), with_digests=has_context)
    held = _drop_held_documents(request, context, sources.documents, monitor.note)
    question = request.question or ""
    wrapping = wrapping_of(request, [document.source for document in sources.documents.documents])
    prompt = build_prompt(
        tokenizer,
        template,
        sources.documents.take(),
        instructed(question) if request.answer.cites and question else question,
        images=reading.prompter if reading else None,
        system=request.system,
        first_index=held + 1,
        progress=_tokenizing(monitor.tell, sources.documents.characters),
        positions=config.max_position_embeddings,
        wrapping=wrapping,
    )
    prompt_tokens = _cut_prompt(request, context, prompt, tokenizer)
    monitor.timings["tokenize"] = Timing(time.perf_counter() - began, len(prompt.ids))
    for text in prompt.notes:
        monitor.note(text)
    max_new_tokens = _answer_length(request, prompt_tokens, config.max_position_embeddings)
    check_length(prompt, max_new_tokens, config.max_position_embeddings, prompt_tokens)
    asking = rows = None
    if request.questions is not None:
        suffix = after_question(tokenizer, template, has_system_prompt=bool((request.system or "").strip()))
        left = config.max_position_embeddings - prompt_tokens
        asking = Asking(request.questions, request.answer, tokenizer, suffix, left)
        rows = asking.rows(monitor.tell)
        max_new_tokens = rows.room
    _tell_what_was_read(prompt, monitor.note)
    return Inputs(
        request,
        checked.config,
        choices,
        checked,
        context,
        tokenizer,
        prompt,
        reading,
        sources.documents.skipped,
        prompt_tokens,
        max_new_tokens,
        asking,
        rows,
    )


def check_checkpoint(choices: ContextChoices, config: TextConfig, note: Callable[[str], None]) -> Checked:
    """What can be refused before any text is tokenized: device, shards, generation settings."""
    prepare_torch()
    from l4ctx.checkpoint.generation_config import GenerationConfig
    from model.weights.loading import checked_sources, stored_tensors
    from model.weights.quantizing import quantized_sources
    from model.weights.shards import unused_weights

    request = choices.request
    name, launch = request.compute.device, request.launch
    devices = usable_devices(name) if launch is None else (device_of_rank(launch, name),)
    stored = checked_sources(request.model, config)
    held, own = stored, config
    if request.launch is not None:
        held, own = _divided(request.launch, request.compute.context_ranks, stored, config, note)
    weights = quantized_sources(held, choices.compute.quantization)
    if (text := unused_weights(request.model)) is not None:
        note(text)
    generation = GenerationConfig.from_folder(request.model)
    generation.check(config.vocab_size)
    sampling = _sampling(request.answer, generation, note)
    provenance = {}
    if request.context.folder is not None:
        from l4ctx.checkpoint.fingerprint import fingerprint

        whole = weights if request.launch is None else quantized_sources(stored, choices.compute.quantization)
        provenance = fingerprint(request.model, config, stored_tensors(whole))
        choices.check(provenance, config)
    return Checked(own, Weights.of(weights, own), generation, sampling, devices, provenance, config)


def _divided(
    launch: Launch,
    context_ranks: int,
    stored: dict[str, WeightSource],
    config: TextConfig,
    note: Callable[[str], None],
) -> tuple[dict[str, WeightSource], TextConfig]:
    """This process's part. Raises DivisionError and CheckpointError."""
    from l4ctx.run.ranks import note_on
    from model.division import TensorRank, divided
    from model.weights.cutting import cut_sources

    tensor_ranks = launch.count // context_ranks
    rank = TensorRank(launch.number % tensor_ranks, tensor_ranks)
    own = divided(config, rank)
    note(note_on(config, launch.count, context_ranks))
    return cut_sources(stored, config, rank) if tensor_ranks > 1 else stored, own


def _sampling(asked: AnswerOptions, generation: GenerationConfig, note: Callable[[str], None]) -> Sampling:
    from l4ctx.checkpoint.generation_config import Sampling

    given: Mapping[str, float | int | None] = {
        name: getattr(asked, name) for name in ("temperature", "top_p", "top_k", "seed")
    }
    base = generation.sampling if asked.sample else Sampling()
    sampling = replace(base, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    if sampling.temperature == 0 and (asked.top_p is not None or asked.top_k is not None or asked.seed is not None):
        note("--top-p, --top-k and --seed change nothing at temperature 0; add --temperature or --sample")
    return sampling


def _opened(request: Request, monitor: Monitor) -> ReadContext | None:
    """The context to answer from, opened."""
    if request.context.answer_from is None:
        return None
    context = ReadContext(request, monitor.note)
    monitor.resources.callback(context.close)
    return context


def _tokenizing(tell: Callable[[str], None], characters: int) -> Callable[[int, int], None]:
    return lambda done, tokens: tell(f"tokenizing: {done:,} of {characters:,} characters, {tokens:,} tokens")


def _drop_held_documents(
    request: Request, context: ReadContext | None, found: DocumentSet, note: Callable[[str], None]
) -> int:
    """Drops documents that the context holds already; returns how many documents it holds."""
    from l4ctx.documents.added import added_documents

    if context is None or not request.context.is_added_to:
        return 0
    held = [span for span in context.documents() if span.start < context.tokens]  # it may still be being read
    known = {span.source: span if span.stop <= context.tokens else replace(span, sha256="") for span in held}
    found.documents, skipped = added_documents(found.documents, known)
    for entry in skipped:
        note(f"skipped {entry.source}: {entry.reason}")
    found.skipped += skipped
    return len(held)


def _cut_prompt(request: Request, context: ReadContext | None, prompt: Prompt, tokenizer: Tokenizer) -> int:
    """Cuts the prompt to the question where the documents are in a context, and to the documents without a question.

    Returns the length of the whole prompt in tokens, including those that the context holds.
    """
    from l4ctx.prompt.builder import DOCUMENT_END

    if request.question is None:
        del prompt.ids[prompt.documents_stop :]
    if context is None or not request.answers_from_all:
        return len(prompt.ids)
    end = array("i")
    if context.ends_amid_a_document:
        tokenizer.encode_data(DOCUMENT_END, into=end)
    prompt.follow(context.tokens + len(end))
    prompt.ids[:0] = end
    return context.tokens + len(prompt.ids)


def _answer_length(request: Request, prompt_tokens: int, positions: int) -> int:
    """Maximum tokens of the answer; 0 without a question. Raises RequestError."""
    if request.question is None and not request.converses:
        return 0
    left = positions - prompt_tokens
    tokens = request.answer.max_new_tokens or max(1, min(DEFAULT_MAX_NEW_TOKENS, left))
    if 0 < left < tokens:
        raise RequestError(
            f"--max-new-tokens {tokens}: the prompt's {prompt_tokens:,} tokens "
            f"leave {left:,} of the model's {positions:,} positions"
        )
    return tokens


def _tell_what_was_read(prompt: Prompt, note: Callable[[str], None]) -> None:
    if prompt.spans:
        images = f"{counted(len(prompt.images), 'image')}, " if prompt.images else ""
        note(f"{counted(len(prompt.spans), 'document')}, {images}{len(prompt.ids):,} tokens")
