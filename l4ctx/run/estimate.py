"""What `l4ctx plan` finds out without loading weights: tokens, bytes by owner and tier, what fits here, and the time.

For a number of tokens nothing but config.json is read, and torch is not imported; for documents they are read and
tokenized as `ask` does it. Plans themselves are made in `l4ctx.planning.memory_plan`; nothing is printed here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from cache.layout import KV_DTYPES
from l4ctx.errors import RequestError
from l4ctx.machine.device import available_on_gpu, expect_no_numpy
from l4ctx.machine.memory import available_disk, available_memory
from l4ctx.machine.processor import computing_dtype
from l4ctx.planning.memory_plan import MemoryPlan
from l4ctx.planning.remedies import remedies, tokens_that_fit
from l4ctx.planning.speed import Speed, measured_speed
from l4ctx.planning.workload import Capacity, Workload
from l4ctx.run.images import ImageUse
from l4ctx.run.request import DEFAULT_MAX_NEW_TOKENS, check_kv_device_memory, check_kv_dir
from model.config import TextConfig
from model.costs import parameter_count, reading_operations

if TYPE_CHECKING:
    from l4ctx.documents.document import Skipped
    from l4ctx.run.images import ImageReading
    from l4ctx.vision.prompter import PlacedImage
    from model.weights.shards import StoredTensor

Note = Callable[[str], None]


@dataclass(frozen=True)
class PlanRequest:
    """Documents to read, or a number of tokens. Sizes in tokens and bytes; None: not limited, or as `ask` has it."""

    model: Path
    paths: Sequence[str] = ()
    stdin: BinaryIO | None = None
    tokens: int | None = None
    no_images: bool = False
    skip_unreadable: bool = False  # leave out what cannot be read in a folder
    pdf: str = "text"  # of l4ctx.documents.pdf.PDF_MODES
    encoding: str | None = None  # of texts that do not say theirs; None: detected
    keep_payload: bool = False
    dtype: str = "auto"
    kv_dtype: str = "auto"
    device: str = "auto"
    kv_device_memory: int | None = None
    kv_host_memory: int | None = None
    kv_dir: Path | None = None
    prefill_chunk_size: int | None = None
    max_new_tokens: int | None = None
    rate: float | None = None  # tokens a second at the start of a reading
    measure: bool = False  # find out how fast this machine is


@dataclass(frozen=True)
class PlanReport:
    """The plan, and what a person wants to know about it."""

    plan: MemoryPlan
    capacity: Capacity
    shortfalls: dict[str, tuple[int, int]]  # bytes needed and there, by tier
    documents: list[tuple[str, int]]  # with their tokens, wrapping included; none for a number of tokens
    skipped: list[Skipped]
    notes: list[str]
    tokens_in_memory: int  # the longest prompt that fits
    tokens_with_disk: int | None  # None: no disk is given
    speed: Speed | None
    seconds: float | None  # to read the prompt; None: no rate is known
    read_from_disk: int  # bytes, in all steps of the prefill together

    @property
    def exceeds_positions(self) -> bool:
        return self.plan.workload.length > self.plan.workload.config.max_position_embeddings

    @property
    def fits(self) -> bool:
        return not self.shortfalls and not self.exceeds_positions

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for --json."""
        workload = self.plan.workload
        return {
            "fits": self.fits,
            "prompt_tokens": workload.prompt_tokens,
            "max_new_tokens": workload.max_new_tokens,
            "max_position_embeddings": workload.config.max_position_embeddings,
            "exceeds_positions": self.exceeds_positions,
            "documents": [{"path": source, "tokens": tokens} for source, tokens in self.documents],
            "skipped": [{"path": entry.source, "reason": entry.reason} for entry in self.skipped],
            "plan": self.plan.as_dict(),
            "room": asdict(self.capacity),
            "missing": {tier: {"needed": needed, "there": there} for tier, (needed, there) in self.shortfalls.items()},
            "remedies": remedies(self.plan, self.capacity),
            "notes": self.notes,
            "tokens_in_memory": self.tokens_in_memory,
            "tokens_with_disk": self.tokens_with_disk,
            "read_from_disk": self.read_from_disk,
            "operations_per_second": self.speed and self.speed._asdict(),
            "seconds": self.seconds,
        }


@dataclass
class _Read:
    """What is known of a prompt: its tokens, those of each document, what was left out, and its images."""

    tokens: int
    documents: list[tuple[str, int]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    images: list[PlacedImage] = field(default_factory=list)
    reading: ImageReading | None = None  # where there are images


def make_plan(request: PlanRequest, note: Note) -> PlanReport:
    """The plan for what is requested; `note` is told what a user should know.

    Raises RequestError, ConfigError, and for documents also DocumentError, TokenizerError, ImageProcessingError and
    PromptError.
    """
    if (request.tokens is None) == (not request.paths):
        raise RequestError("a plan is made for documents or for --tokens N: give one of them")
    config = TextConfig.from_folder(request.model)
    notes: list[str] = []

    def noted(text: str) -> None:
        notes.append(text)
        note(text)

    if request.tokens is not None:
        read, parameters, stored = _Read(request.tokens), parameter_count(config), _stored_dtype(config, noted)
        is_mappable = True  # as published
    else:
        parameters, stored, is_mappable = _stored_weights(request, config, noted)
        read = _tokenized(request, config, noted)
    if read.tokens < 1:
        raise RequestError(f"--tokens: {read.tokens} is not a positive number")
    capacity = _capacity(request)
    on_accelerator = capacity.accelerator is not None
    dtype = computing_dtype(request.dtype, stored, parameters, on_accelerator=on_accelerator, available=capacity.host)
    workload = Workload(
        config,
        prompt_tokens=read.tokens,
        max_new_tokens=_max_new_tokens(request, config, read.tokens),
        weights=parameters * KV_DTYPES[dtype],
        weights_are_mapped=dtype == stored and not on_accelerator and is_mappable,
        dtype=dtype,
        kv_dtype=request.kv_dtype,
        stored_dtype=stored if is_mappable else None,
        prefill_chunk_size=request.prefill_chunk_size,
        largest=read.documents,
        images=read.reading.work(read.images) if read.reading else None,
    )
    plan = MemoryPlan.of(workload, capacity)
    for text in plan.notes:
        noted(text)
    speed = _speed(request, plan, on_accelerator)
    operations = reading_operations(config, 0, read.tokens)
    if read.reading:
        operations = read.reading.with_images(operations, read.images, 0, read.tokens)
    return PlanReport(
        plan,
        capacity,
        plan.shortfalls(capacity),
        read.documents,
        read.skipped,
        notes,
        tokens_in_memory=tokens_that_fit(workload, capacity.without_disk),
        tokens_with_disk=tokens_that_fit(workload, capacity) if capacity.has_disk else None,
        speed=speed,
        seconds=speed and speed.seconds(operations),
        read_from_disk=_read_from_disk(plan),
    )


def _max_new_tokens(request: PlanRequest, config: TextConfig, prompt_tokens: int) -> int:
    """As `ask` has it for documents; a number of tokens is taken as it is, and nothing added unless asked for."""
    if request.max_new_tokens is not None or request.tokens is not None:
        return request.max_new_tokens or 0
    return max(1, min(DEFAULT_MAX_NEW_TOKENS, config.max_position_embeddings - prompt_tokens))


def _stored_dtype(config: TextConfig, note: Note) -> str:
    """That of the checkpoint, as its config.json says."""
    if config.torch_dtype in ("float32", "bfloat16", "float16"):
        return config.torch_dtype
    note(
        f"config.json says {'no dtype' if config.torch_dtype is None else repr(config.torch_dtype)}; "
        "bfloat16 is taken for the weights"
    )
    return "bfloat16"


def _stored_weights(request: PlanRequest, config: TextConfig, note: Note) -> tuple[int, str, bool]:
    """How many weights the checkpoint has, their dtype, and whether they can be mapped: by the shards' headers.

    Without shards by config.json.
    """
    expect_no_numpy()
    from model.errors import CheckpointError
    from model.weights.loading import can_be_mapped, checked_tensors, stored_parameters
    from model.weights.shards import stored_dtype, unused_weights

    try:
        stored = checked_tensors(request.model, config)
        if (text := unused_weights(request.model)) is not None:
            note(text)
    except CheckpointError as error:
        note(f"{error}; the weights are counted by config.json")
        return parameter_count(config), _stored_dtype(config, note), True
    if not can_be_mapped(stored):
        note("the experts are stored one by one: they are joined in memory, which takes room for all weights")
    return stored_parameters(stored, config), stored_dtype(stored), can_be_mapped(stored)


def _tokenized(request: PlanRequest, config: TextConfig, note: Note) -> _Read:
    """The prompt of an empty question."""
    from l4ctx.checkpoint.chat_template import ChatTemplate
    from l4ctx.checkpoint.tokenizer import Tokenizer
    from l4ctx.documents.reader import read_documents
    from l4ctx.prompt.builder import build_prompt

    images = ImageUse(request.model, config, no_images=request.no_images, pdf=request.pdf)
    found = read_documents(
        request.paths,
        stdin=request.stdin,
        pdf=request.pdf,
        no_images=images.why_not,
        encoding=request.encoding,
        keep_payload=request.keep_payload,
        skip_unreadable=request.skip_unreadable,
    )
    found.require_any(request.paths)
    for text in found.notes:
        note(text)
    tokenizer = Tokenizer.from_folder(request.model, config.vocab_size)
    reading = images.prepare(tokenizer, _tower(images, note)) if found.has_images else None
    prompt = build_prompt(
        tokenizer,
        ChatTemplate.from_folder(request.model),
        found.take(),
        "",
        images=reading.prompter if reading else None,
    )
    for text in prompt.notes:
        note(text)
    documents = [(span.source, span.stop - span.start) for span in prompt.spans]
    return _Read(len(prompt.ids), documents, found.skipped, prompt.images, reading)


def _tower(images: ImageUse, note: Note) -> dict[str, StoredTensor] | None:
    """The vision tower's tensors; None where they have to be counted by config.json."""
    from model.errors import CheckpointError

    try:
        return images.stored_tensors()
    except CheckpointError as error:
        note(f"{error}; the vision tower's weights are counted by config.json")
        return None


def _capacity(request: PlanRequest) -> Capacity:
    """What the machine has, within what the user allows."""
    accelerator = _accelerator(request.device, quick=request.tokens is not None)
    check_kv_device_memory(request.kv_device_memory, on_accelerator=accelerator is not None)
    folder = request.kv_dir
    check_kv_dir(folder)
    return Capacity(
        host=available_memory(),
        accelerator=accelerator,
        kv_device=request.kv_device_memory,
        kv_host=request.kv_host_memory,
        disk=None if folder is None else available_disk(folder),
        disk_folder=None if folder is None else str(folder),
    )


def _accelerator(device: str, *, quick: bool) -> int | None:
    """Bytes free on the GPU that `ask` would use; None for the CPU. `quick`: without torch, if that can be known."""
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise RequestError(f"--device {device}: no such device; auto, cpu and cuda are")
    if kind == "cpu":
        return None
    if quick and (kind == "auto" or available_on_gpu(int(index or 0)) is not None):
        return available_on_gpu(int(index or 0)) if _torch_may_use_gpus() else None
    import torch

    if torch.cuda.is_available() and int(index or 0) < torch.cuda.device_count():
        return torch.cuda.mem_get_info(int(index or 0))[0]
    if kind == "cuda":
        raise RequestError(f"--device {device}: cannot be used here (torch finds no such GPU)")
    return None


def _torch_may_use_gpus() -> bool:
    """Builds of torch that cannot say so in their version."""
    try:
        return not version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False


def _speed(request: PlanRequest, plan: MemoryPlan, on_accelerator: bool) -> Speed | None:
    step = min(plan.prefill_chunk_size, plan.workload.prompt_tokens)
    if request.rate is not None:
        if not 0 < request.rate < math.inf:
            raise RequestError(f"--rate: {request.rate} is not a positive number of tokens a second")
        per_token = reading_operations(plan.workload.config, 0, step).total / step
        return Speed(request.rate * per_token, request.rate * per_token)
    if not request.measure:
        return None
    device = request.device if request.device != "auto" else "cuda" if on_accelerator else "cpu"
    return measured_speed(plan.workload.config, plan.workload.dtype, device, step)


def _read_from_disk(plan: MemoryPlan) -> int:
    """Bytes of blocks that are on disk alone, read in every step of the prefill again, but for the last layer."""
    layout, step, config = plan.layout, min(plan.prefill_chunk_size, plan.workload.prompt_tokens), plan.workload.config
    if not plan.end.nope_disk:
        return 0
    reading = config.num_nope_layers - (not config.uses_rope(config.num_hidden_layers - 1))
    sealed = (layout.sealed_rows(start) for start in range(0, plan.workload.prompt_tokens, step))
    return layout.row_bytes * reading // config.num_nope_layers * sum(plan.residency.split(rows)[2] for rows in sealed)
