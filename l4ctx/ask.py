"""One question over documents, from request to answer, in steps that the CLI walks through and renders.

The steps are ordered so that what can be refused is refused early: arguments and documents before torch is imported,
shards before text is tokenized, memory before weights are loaded. Prints nothing and exits nowhere.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from l4ctx.documents import DocumentSet, Skipped, read_documents
from l4ctx.memory import TOKEN_ID_BYTES, MemoryPlan, MemoryReport, PeakSampler, available_memory, process_memory
from model.config import TextConfig

if TYPE_CHECKING:
    import torch

    from cache.hybrid import HybridKVCache
    from l4ctx.generate import GenerationConfig, Sampling
    from l4ctx.prefill import PrefillProgress
    from l4ctx.prompt import Prompt
    from l4ctx.tokenizer import Tokenizer
    from model.checkpoint import StoredTensor
    from model.transformer import Transformer

DEFAULT_MAX_NEW_TOKENS = 1024
SKIPPED_LINES = 12


class RequestError(Exception):
    """A request that cannot be carried out: a device that this machine lacks, standard input without text."""


@dataclass(frozen=True)
class Request:
    """What the user asks for. None, where it is allowed, means the default that only the checkpoint can tell."""

    model: Path
    question: str
    paths: list[str]
    stdin: BinaryIO | None = None
    system: str | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    sample: bool = False
    dtype: str = "auto"
    device: str = "auto"
    attention: str = "sdpa"
    prefill_chunk_size: int = 8192


@dataclass
class Timing:
    seconds: float = 0.0
    tokens: int = 0

    def as_dict(self) -> dict[str, float | None]:
        rate = self.tokens / self.seconds if self.tokens and self.seconds else None
        return {"seconds": round(self.seconds, 6), "tokens_per_second": rate and round(rate, 3)}


@dataclass
class Run:
    """The steps, to be called in the order in which they are written here; `note` is told what a user should know."""

    request: Request
    note: Callable[[str], None]
    answer: str = ""
    stop_reason: str | None = None
    generated_tokens: int = 0
    timings: dict[str, Timing] = field(
        default_factory=lambda: {name: Timing() for name in ("load", "tokenize", "prefill", "decode")})
    skipped: list[Skipped] = field(default_factory=list)

    config: TextConfig = field(init=False)
    tokenizer: Tokenizer = field(init=False)
    prompt: Prompt = field(init=False)
    max_new_tokens: int = field(init=False)
    generation: GenerationConfig = field(init=False)
    sampling: Sampling = field(init=False)
    plan: MemoryPlan = field(init=False)
    model: Transformer = field(init=False)
    cache: HybridKVCache = field(init=False)
    _documents: DocumentSet = field(init=False)
    _stored: dict[str, StoredTensor] = field(init=False)
    _device: torch.device = field(init=False)
    _dtype: torch.dtype = field(init=False)
    _sampler: PeakSampler = field(init=False)

    @contextmanager
    def sampling_memory(self) -> Iterator[None]:
        """Within it the process's memory is sampled for the report's peaks."""
        with PeakSampler() as self._sampler:
            yield

    def read_documents(self) -> None:
        """Reads the configuration and the documents. Raises ConfigError, DocumentError and RequestError."""
        self.config = TextConfig.from_folder(self.request.model)
        self._documents = read_documents(self.request.paths, stdin=self.request.stdin)
        self.skipped = self._documents.skipped
        if self.request.paths == ["-"] and self.skipped:
            raise RequestError(f"standard input has no text to read: {self.skipped[0].reason} "
                               "(name a file or folder; to ask without documents, add < /dev/null)")
        if self.request.paths:
            self._documents.require_any(self.request.paths)
        self._note_if_a_path(self.request.question)
        for entry in self.skipped[:SKIPPED_LINES]:
            self.note(f"skipped {entry.source}: {entry.reason}")
        if len(self.skipped) > SKIPPED_LINES:
            self.note(f"skipped {len(self.skipped) - SKIPPED_LINES} more (--json lists them all)")
        for text in self._documents.notes:
            self.note(text)

    def make_prompt(self) -> None:
        """Checks the shards, then tokenizes.

        Raises RequestError, CheckpointError, TokenizerError, PromptError, PromptLengthError and
        GenerationConfigError.
        """
        from l4ctx.prompt import ChatTemplate, build_prompt, check_length
        from l4ctx.tokenizer import Tokenizer

        began = time.perf_counter()
        self._check_checkpoint()
        self.tokenizer = Tokenizer.from_folder(self.request.model)
        template = ChatTemplate.from_folder(self.request.model)
        self.timings["load"].seconds += time.perf_counter() - began
        if template is None:
            self.note("the checkpoint has no chat template: documents and question are given to it as plain text")
        began = time.perf_counter()
        self.prompt = build_prompt(self.tokenizer, template, self._documents.take(), self.request.question,
                                   system=self.request.system)
        self.timings["tokenize"] = Timing(time.perf_counter() - began, len(self.prompt.ids))
        for text in self.prompt.notes:
            self.note(text)
        room = self.config.max_position_embeddings - len(self.prompt.ids)
        self.max_new_tokens = self.request.max_new_tokens or max(1, min(DEFAULT_MAX_NEW_TOKENS, room))
        if 0 < room < self.max_new_tokens:
            raise RequestError(f"--max-new-tokens {self.max_new_tokens}: the prompt's {len(self.prompt.ids):,} tokens "
                               f"leave {room:,} of the model's {self.config.max_position_embeddings:,} positions")
        check_length(self.prompt, self.max_new_tokens, self.config.max_position_embeddings)
        if self.prompt.spans:
            self.note(f"{len(self.prompt.spans)} document{'s' * (len(self.prompt.spans) > 1)}, "
                      f"{len(self.prompt.ids):,} tokens")

    def plan_memory(self) -> None:
        """Predicts every owner's bytes. Raises MemoryPlanError when they are more than is free."""
        numbers = sum(tensor.num_bytes for tensor in self._stored.values())
        stored_itemsize = self._stored_dtype().itemsize
        available = available_memory()
        self._dtype = self._wanted_dtype(numbers // stored_itemsize * 4, available)
        self.plan = MemoryPlan.of(
            self.config, weights=numbers // stored_itemsize * self._dtype.itemsize,
            weights_are_mapped=self._device.type == "cpu" and self._dtype == self._stored_dtype(),
            prompt_tokens=len(self.prompt.ids), max_new_tokens=self.max_new_tokens, itemsize=self._dtype.itemsize,
            prefill_chunk_size=self.request.prefill_chunk_size)
        largest = sorted(self.prompt.spans, key=lambda span: span.start - span.stop)[:2]
        self.plan.check(available, [(span.source, span.stop - span.start) for span in largest], len(self.prompt.ids),
                        on_accelerator=self._free_on_accelerator())

    def load_model(self) -> None:
        """Maps or converts the weights, and makes an empty cache. Raises CheckpointError."""
        from cache.hybrid import HybridKVCache
        from model.checkpoint import load_checkpoint

        began = time.perf_counter()
        self.model = load_checkpoint(self.request.model, dtype=self._dtype, device=self._device,
                                     attention=self.request.attention)
        self.cache = HybridKVCache(self.config, length=len(self.prompt.ids) + self.max_new_tokens,
                                   dtype=self._dtype, device=self._device)
        self.timings["load"].seconds += time.perf_counter() - began

    def prefill(self) -> Iterator[PrefillProgress]:
        """Reads all of the prompt but its last token."""
        from l4ctx.prefill import prefill

        steps = prefill(self.model, self.cache, memoryview(self.prompt.ids)[:-1],
                        prefill_chunk_size=self.request.prefill_chunk_size)
        for step in steps:
            self.timings["prefill"] = Timing(step.seconds, step.done)
            yield step

    def decode(self) -> Iterator[str]:
        """The answer in pieces of text, as they are known. Raises GenerationError."""
        from l4ctx.generate import generate
        from l4ctx.tokenizer import StreamDecoder

        began = time.perf_counter()
        decoder = StreamDecoder(self.tokenizer)
        tokens = generate(self.model, self.cache, self.prompt.ids[-1], max_new_tokens=self.max_new_tokens,
                          stop_tokens=self.generation.stop_tokens, sampling=self.sampling)
        while True:
            try:
                piece = decoder.push(next(tokens))
            except StopIteration as end:
                self.stop_reason = end.value
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

    def memory_report(self) -> MemoryReport:
        import torch

        held = self.cache.held()
        on_gpu = self._device.type == "cuda"
        return MemoryReport(
            predicted=self.plan, weights=sum(p.nbytes for p in self.model.parameters()),
            rope_windows=held.rope_windows, nope_device=held.nope_device, nope_host=held.nope_host,
            token_ids=TOKEN_ID_BYTES * len(self.prompt.ids), process=process_memory(),
            process_peak=self._sampler.peak,
            accelerator_peak=torch.cuda.max_memory_allocated(self._device) if on_gpu else None)

    def as_dict(self) -> dict[str, Any]:
        """The object that --json prints; bytes, seconds and tokens are plain numbers."""
        return {
            "answer": self.answer,
            "stop_reason": self.stop_reason,
            "prompt_tokens": len(self.prompt.ids),
            "generated_tokens": self.generated_tokens,
            "documents": [{"path": span.source, "tokens": span.stop - span.start} for span in self.prompt.spans],
            "skipped": [{"path": entry.source, "reason": entry.reason} for entry in self.skipped],
            "timings": {name: timing.as_dict() for name, timing in self.timings.items()},
            "memory": self.memory_report().as_dict(),
        }

    def _check_checkpoint(self) -> None:
        """What can be refused before any text is tokenized: device, shards, generation settings."""
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch's, which we use without
        from l4ctx.generate import GenerationConfig
        from model.checkpoint import checked_tensors

        self._device = _device(self.request.device)
        self._stored = checked_tensors(self.request.model, self.config)
        self.generation = GenerationConfig.from_folder(self.request.model)
        self.sampling = self._sampling()

    def _free_on_accelerator(self) -> int | None:
        import torch

        return torch.cuda.mem_get_info(self._device)[0] if self._device.type == "cuda" else None

    def _sampling(self) -> Sampling:
        from l4ctx.generate import Sampling

        asked = self.request
        given = {name: getattr(asked, name) for name in ("temperature", "top_p", "top_k", "seed")}
        base = self.generation.sampling if asked.sample else Sampling()
        sampling = replace(base, **{name: value for name, value in given.items() if value is not None})
        if sampling.temperature == 0 and (asked.top_p is not None or asked.top_k is not None or asked.seed is not None):
            self.note("--top-p, --top-k and --seed change nothing at temperature 0; add --temperature or --sample")
        return sampling

    def _stored_dtype(self) -> torch.dtype:
        from model.checkpoint import DTYPES

        return DTYPES[self._stored["model.embed_tokens.weight"].dtype]

    def _wanted_dtype(self, bytes_in_float32: int, available: int | None) -> torch.dtype:
        """float32 on a CPU where it costs little: its matrix products are faster there, and exact."""
        import torch

        if self.request.dtype != "auto":
            return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.request.dtype]
        if self._device.type == "cpu" and (available is None or bytes_in_float32 < available / 4):
            return torch.float32
        return self._stored_dtype()

    def _note_if_a_path(self, question: str) -> None:
        try:
            if Path(question).exists():
                self.note(f"{question!r} is the question, though it is the name of a file; the question comes first")
        except (OSError, ValueError):
            pass


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise RequestError(f"--device {name}: no such device; auto, cpu and cuda are") from None
    try:
        torch.ones(1, device=device).item()  # fails on what cannot hold numbers, "meta" among them
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise RequestError(f"--device {name}: cannot be used here ({reason})") from None
    return device
