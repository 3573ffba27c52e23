"""What the user asks for: everything that the command line says, before anything is read.

The groups of options are shared by all requests. None, where it is allowed, means the default that only the checkpoint,
a saved context or the machine can tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from l4ctx.documents.selection import Selection
from l4ctx.errors import RequestError
from l4ctx.machine.ranks import Launch
from l4ctx.run.choices import AttentionBackend, Dtype, HtmlMode, KVDtype, PdfMode
from l4ctx.run.questions import QuestionsOptions
from model.quantization.choice import NONE, Quantization

DEFAULT_MAX_NEW_TOKENS = 1024


@dataclass(frozen=True)
class SourceOptions:
    """What is to be read, and how."""

    paths: Sequence[str] = ()  # - stands for `stdin`
    stdin: BinaryIO | None = None
    pdf: PdfMode = "text"
    encoding: str | None = None  # of texts that do not declare theirs; None: detected
    no_images: bool | str = False  # or the reason why images are left out
    keep_payload: bool = False
    html: HtmlMode = "source"
    skip_unreadable: bool = False  # in a folder, leave out what cannot be read
    selection: Selection = field(default_factory=Selection)


@dataclass(frozen=True)
class ComputeOptions:
    device: str = "auto"
    dtype: Dtype = "auto"
    attention: AttentionBackend | None = None
    prefill_chunk_size: int | None = None  # tokens
    quantize: str | None = None  # as Quantization.parse reads it, or "none"
    weights_memory: int | None = None  # bytes for weights that stay mapped
    weights_device_memory: int | None = None  # bytes for weights on an accelerator, which the others are copied to
    context_ranks: int = 1  # of several processes, those that the documents are divided over

    @property
    def quantization(self) -> Quantization | None:
        return None if self.quantize in (None, NONE) else Quantization.parse(self.quantize)

    def check_device_memory(self, *, on_accelerator: bool) -> None:
        """Raises RequestError for a --weights-device-memory where there is no such memory."""
        if self.weights_device_memory is not None and not on_accelerator:
            raise RequestError(
                "--weights-device-memory: the model computes on the CPU, whose memory is the host's: "
                "--weights-memory limits that"
            )


@dataclass(frozen=True)
class KVOptions:
    """Storage of keys and values; sizes in bytes."""

    dtype: KVDtype = "auto"
    device_memory: int | None = None
    host_memory: int | None = None
    folder: Path | None = None  # --kv-dir

    def check_folder(self) -> None:
        """Raises RequestError for a --kv-dir that is not there."""
        if self.folder is not None and not self.folder.is_dir():
            raise RequestError(f"--kv-dir {self.folder}: no such folder; make it, or name another one")

    def check_device_memory(self, *, on_accelerator: bool) -> None:
        """Raises RequestError for a --kv-device-memory where there is no such memory."""
        if self.device_memory is not None and not on_accelerator:
            raise RequestError(
                "--kv-device-memory: the model computes on the CPU, whose memory is the host's: "
                "--kv-host-memory limits that"
            )


@dataclass(frozen=True)
class AnswerOptions:
    max_new_tokens: int | None = None
    sample: bool = False  # as the checkpoint's authors recommend
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    draft_tokens: int | None = None  # of a draft at most; 0: no drafts; None: as many as the steps hold best
    loop_guard: bool = True  # ends an answer that only repeats itself
    cites: bool = False  # names sources
    schema: str | None = None  # in JSON, that the answer keeps to


@dataclass(frozen=True)
class TemplateOptions:
    """How documents and question become a prompt, if not by the checkpoint's chat template alone."""

    raw: bool = False  # nothing around them
    tools: str | None = None  # for the chat template: a list, in JSON
    wrapping: str | None = None  # a Jinja template of what the user says

    @property
    def is_given(self) -> bool:
        return self != TemplateOptions()


@dataclass(frozen=True)
class ContextOptions:
    """Saved contexts: at most one of the two folders is given."""

    answer_from: Path | None = None  # --context
    save_to: Path | None = None  # --save-context, prefill's --output
    is_added_to: bool = False  # the paths are read behind what the context to answer from holds
    replace: bool = False  # other documents that the context holds may be dropped
    verify: bool = False  # read all of a context that is resumed

    @property
    def folder(self) -> Path | None:
        return self.answer_from or self.save_to


@dataclass(frozen=True)
class Request:
    """Documents to read, and perhaps a question about them, or many."""

    model: Path
    sources: SourceOptions = field(default_factory=SourceOptions)
    question: str | None = None  # None: documents are read and kept, or there are many questions
    system: str | None = None
    context: ContextOptions = field(default_factory=ContextOptions)
    answer: AnswerOptions = field(default_factory=AnswerOptions)
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    kv: KVOptions = field(default_factory=KVOptions)
    questions: QuestionsOptions | None = None  # None: one question, or none
    launch: Launch | None = None  # one of several processes that carry it out
    template: TemplateOptions = field(default_factory=TemplateOptions)
    converses: bool = False  # a conversation follows, whose first message begins with the documents

    @property
    def asks(self) -> bool:
        return self.question is not None or self.questions is not None or self.converses

    @property
    def has_drafts(self) -> bool:
        return self.asks and self.answer.draft_tokens != 0

    @property
    def answers_from_all(self) -> bool:
        """Whether all that a context holds is part of the prompt, and only what follows it is read."""
        return self.context.answer_from is not None and (self.context.is_added_to or not self.sources.paths)


@dataclass(frozen=True)
class GpuOptions:
    """GPUs to plan for, which need not be here. Bytes, and rates of each a second; None: not limited, or assumed."""

    memory: int
    host_memory: int | None = None  # for each GPU
    tensor: int = 1
    context: int = 1
    compute: float | None = None  # floating-point operations
    link: float | None = None
    host_link: float | None = None
    disk: float | None = None
    bandwidth: float | None = None  # of its own memory
    one_process: int | None = None  # so many in one process, instead of ranks


@dataclass(frozen=True)
class PlanRequest:
    """Documents to read, or a number of tokens."""

    model: Path
    sources: SourceOptions = field(default_factory=SourceOptions)
    tokens: int | None = None
    max_new_tokens: int | None = None
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    kv: KVOptions = field(default_factory=KVOptions)
    rate: float | None = None  # tokens per second at the start of a reading
    measure: bool = False  # find out how fast this machine is
    gpus: GpuOptions | None = None  # None: for this machine
