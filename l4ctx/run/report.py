"""What a run did: its answer, what was read, seconds by step, bytes held beside those planned, by owner and tier.

Measures nothing itself; imports no torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from l4ctx.machine.memory import ProcessMemory
from l4ctx.planning.memory_plan import MemoryPlan

if TYPE_CHECKING:
    from l4ctx.contexts.reader import ContextReader
    from l4ctx.run.session import Run
    from l4ctx.spans import ImageSpan, Span


@dataclass
class Timing:
    seconds: float = 0.0
    tokens: int = 0

    def as_dict(self) -> dict[str, float | None]:
        rate = self.tokens / self.seconds if self.tokens and self.seconds else None
        return {"seconds": round(self.seconds, 6), "tokens_per_second": rate and round(rate, 3)}


@dataclass(frozen=True)
class MemoryReport:
    """Bytes predicted, held at the end, and at the peak of a run, by owner."""

    predicted: MemoryPlan
    weights: int
    rope_windows: int
    nope_device: int
    nope_host: int
    nope_disk: int
    buffers: int
    token_ids: int
    process_before: ProcessMemory | None  # before weights and cache were made
    process: ProcessMemory | None
    process_peak: ProcessMemory | None
    accelerator_peak: int | None

    def as_dict(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return fields | {
            "predicted": self.predicted.as_dict(),
            "process_before": self.process_before and asdict(self.process_before),
            "process": self.process and asdict(self.process),
            "process_peak": self.process_peak and asdict(self.process_peak),
        }


def run_report(run: Run) -> dict[str, Any]:
    """The object that --json prints; bytes, seconds and tokens are plain numbers."""
    answer = {"answer": run.answer, "stop_reason": run.stop_reason, "generated_tokens": run.generated_tokens}
    folder = run.contexts.folder
    return {
        **({} if run.request.question is None else answer),
        "prompt_tokens": run.prompt_tokens,
        "reused_tokens": run.contexts.reused,
        "context": str(folder) if folder else None,
        **_how_far(run.contexts.reader),
        **_what_was_read(run),
        "skipped": [{"path": entry.source, "reason": entry.reason} for entry in run.skipped],
        "timings": {name: timing.as_dict() for name, timing in run.timings.items()},
        "memory": run.memory_report().as_dict(),
    }


def _how_far(reader: ContextReader | None) -> dict[str, Any]:
    """Where the context is still being read: how many of its tokens are there, and how many it will have."""
    if reader is None or reader.state.is_complete:
        return {}
    return {"context_is_partial": {"tokens": reader.tokens, "of": reader.state.tokens}}


def _what_was_read(run: Run) -> dict[str, Any]:
    """Documents and images; where a context is answered from, first its own, an image by the name of its document."""
    reader, end = run.contexts.reader, run.prompt_tokens
    documents = [_read_of(span.source, span, end) for span in run.prompt.spans]
    images = [_read_of(placed.image.source, placed.span, end) for placed in run.prompt.images]
    if reader is not None and run.request.answers_from_all:
        held = run.contexts.documents()
        of_held = [
            (next((document.source for document in held if document.stop > span.start), ""), span)
            for span in run.contexts.images()
        ]
        documents = [
            _read_of(span.source, span, reader.tokens) for span in held if span.start < reader.tokens
        ] + documents
        images = [
            _read_of(source, span, reader.tokens) for source, span in of_held if span.start < reader.tokens
        ] + images
    return {"documents": documents, "images": images}


def _read_of(path: str, span: Span | ImageSpan, end: int) -> dict[str, Any]:
    """Its tokens before `end`; a context that is still being read may end amid a document."""
    is_whole = span.stop <= end
    return {"path": path, "tokens": min(span.stop, end) - span.start} | ({} if is_whole else {"is_partial": True})
