"""The third stage of a run: the model and its cache, prefill, the answer, and what there is to report.

Prints nothing and exits nowhere.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from l4ctx.machine.device import compute_on
from l4ctx.machine.memory import process_memory, return_large_blocks
from l4ctx.machine.ranks import Launch
from l4ctx.run.context import with_repair_hint
from l4ctx.run.drafting import DraftSource
from l4ctx.run.memory_report import HeldOnDevice, MemoryReport
from l4ctx.run.monitor import Monitor, Timing
from l4ctx.run.pinning import pin
from l4ctx.run.request import Request
from l4ctx.run.sizing import Sized

if TYPE_CHECKING:
    import torch

    from cache.context import ContextKVCache
    from cache.disk import Scratch
    from cache.hybrid import HybridKVCache
    from cache.tiers import RowStore
    from l4ctx.drafts.drafter import DraftCounts
    from l4ctx.engine.loop_guard import Loop
    from l4ctx.engine.prefill import LayerCount, PrefillProgress
    from l4ctx.planning.memory_plan import MemoryPlan
    from l4ctx.prompt.citations import Citations, Citing
    from l4ctx.run.channel import Channel
    from l4ctx.run.context import WrittenContext
    from l4ctx.run.inputs import Inputs
    from l4ctx.run.rank_report import RankReport
    from l4ctx.run.ranks import Job, Leader
    from l4ctx.run.response_format import ResponseFormat
    from l4ctx.vision.features import ImageFeatures
    from model.config import TextConfig
    from model.transformer import LayerWatcher, Transformer


@dataclass
class Answer:
    """What has been generated so far. `stop_reason` is None until the end; `loop` is the repetition that ended it."""

    text: str = ""
    tokens: int = 0
    ids: array[int] = field(default_factory=lambda: array("i"))
    stop_reason: str | None = None
    loop: Loop | None = None
    drafts: DraftCounts | None = None  # of all answers; None: without drafts
    draft_index: int = 0  # bytes
    citations: Citations | None = None  # its sources, once it has ended

    def as_dict(self) -> dict[str, Any]:
        return {"answer": self.text, "stop_reason": self.stop_reason, "generated_tokens": self.tokens}


@dataclass(frozen=True)
class Session:
    """A model and a cache. Call `prefill`, then `decode`, once each; `answer` grows meanwhile."""

    sized: Sized
    monitor: Monitor
    model: Transformer
    cache: HybridKVCache | ContextKVCache
    features: ImageFeatures | None  # of the images still to be read
    scratch: Scratch | None  # for blocks that no context keeps
    layers: LayerCount
    leader: Leader | None = None  # of several processes
    answer: Answer = field(default_factory=Answer)
    drafts: DraftSource | None = None  # where the prompt has been indexed already

    @property
    def request(self) -> Request:
        return self.sized.inputs.request

    @property
    def undivided_cache(self) -> HybridKVCache:
        """That of one process, or of ranks that all have the same tokens."""
        from cache.hybrid import HybridKVCache

        assert isinstance(self.cache, HybridKVCache), "the sequence is divided over ranks"
        return self.cache

    def prefill(self) -> Iterator[PrefillProgress]:
        """Prefills the rest of the prompt, but for the last token of a question in it; saves the documents, if the
        request says so.

        Raises ContextError and DiskFullError.
        """
        inputs, written = self.sized.inputs, self.sized.written
        with self.monitor.loading():
            pin(self.cache, self.sized.plan, self.monitor)
        if written is not None:
            yield from self._read(inputs.prompt.documents_stop)
            self._finish(written)
        yield from self._read(inputs.reading_stop)

    def _finish(self, written: WrittenContext) -> None:
        """Completes the context; what is read from now on is no part of it."""
        cache, leader = self.cache, self.leader
        if leader is not None:
            written.finish(cache.offset, lambda: leader.tail(cache))
            leader.stop_saving(cache, self.scratch)
        else:
            written.finish(cache.offset, self.undivided_cache.tail)
            self.undivided_cache.rows = self.scratch

    def decode(self) -> Iterator[str]:
        """Streams the answer in pieces of text. Raises GenerationError."""
        from l4ctx.checkpoint.tokenizer import StreamDecoder
        from l4ctx.engine.generate import generate
        from l4ctx.engine.loop_guard import LoopGuard
        from l4ctx.engine.row import Row

        inputs, answer, timings = self.sized.inputs, self.answer, self.monitor.timings
        source, citing = self.draft_source(), self.citing()
        log = None if citing is None else citing.log()
        began = time.perf_counter()
        decoder = StreamDecoder(inputs.tokenizer)
        guard = LoopGuard() if self.request.answer.loop_guard else None
        row = Row(
            self.cache,
            inputs.prompt.ids[-1],
            max_new_tokens=inputs.max_new_tokens,
            stop_tokens=inputs.checked.generation.stop_tokens,
            sampling=inputs.checked.sampling,
            guard=guard,
            drafts=None if source is None else source.drafter(),
            observer=log,
            constraint=None if (format := self.response_format()) is None else format.answer(),
        )
        tokens = generate(self.model, row)
        while True:
            try:
                with with_repair_hint(self.request.context.folder):
                    token = next(tokens)
            except StopIteration as end:
                answer.stop_reason = end.value
                answer.loop = guard.loop if guard else None
                break
            answer.ids.append(token)
            answer.tokens += 1
            piece = decoder.push(token)
            timings["decode"] = Timing(time.perf_counter() - began, answer.tokens)
            answer.text += piece
            if piece:
                yield piece
        rest = decoder.finish()
        answer.text += rest
        timings["decode"] = Timing(time.perf_counter() - began, answer.tokens)
        yield rest
        if citing is not None and log is not None:
            answer.citations = citing.cite(answer.ids, self.request.question or "", log, inputs.prompt_tokens - 1)

    def citing(self) -> Citing | None:
        """What finds the sources of answers, if the request wants them. Raises ContextError and RequestError."""
        if not self.request.answer.cites:
            return None
        from l4ctx.run.citing import citing

        return citing(self.sized.inputs)

    def draft_source(self) -> DraftSource | None:
        """Indexes the prompt, unless the request wants no drafts, or that has been done."""
        if not self.request.has_drafts:
            return None
        if self.drafts is not None:
            self.answer.draft_index, self.answer.drafts = self.drafts.nbytes, self.drafts.counts
            return self.drafts
        with self.monitor.loading():
            self.monitor.tell("indexing the prompt")
            source = DraftSource.of(self.sized)
        self.answer.draft_index, self.answer.drafts = source.nbytes, source.counts
        return source

    def response_format(self) -> ResponseFormat | None:
        """The schema that answers keep to, compiled. Raises RequestError."""
        from l4ctx.run.response_format import ResponseFormat

        inputs = self.sized.inputs
        if (schema := self.request.answer.schema) is None:
            return None
        with self.monitor.loading():
            self.monitor.tell("compiling the schema")
            stop_tokens = inputs.checked.generation.stop_tokens
            return ResponseFormat(schema, inputs.tokenizer, inputs.checked.whole.vocab_size, stop_tokens)

    def memory_report(self) -> MemoryReport:
        from l4ctx.machine.device import most_allocated
        from l4ctx.planning.placement import held_weights
        from model.weights.device_stream import DeviceStream
        from model.weights.tiers import held_bytes

        held, watcher, spread = self.cache.held(), self.layers.other, self.model.spread
        towers = [self.features.tower] if self.features else []
        tower = self.features.weight_bytes if self.features else 0
        return MemoryReport(
            predicted=self.sized.plan,
            weights=self.model.weight_bytes + tower,
            weights_by_owner=held_weights(self.sized.plan.weights_by_owner, held_bytes([self.model, *towers])),
            rope_windows=held.rope_windows,
            nope_device=held.nope_device,
            nope_host=held.nope_host,
            nope_disk=held.nope_disk,
            buffers=held.buffers,
            weight_buffers=watcher.buffer_bytes if isinstance(watcher, DeviceStream) else 0,
            token_ids=memoryview(self.sized.inputs.prompt.ids).nbytes,
            draft_index=self.answer.draft_index,
            process_before=self.sized.before,
            process=process_memory(),
            process_peak=self.monitor.sampler.peak,
            accelerator_peak=most_allocated((self.model.device,) if spread is None else spread.devices),
            pinned=held.pinned,
            devices=list(self._held_on_devices()),
            ranks=self._rank_reports(),
        )

    def _held_on_devices(self) -> Iterator[HeldOnDevice]:
        """Of several devices each, in the order of the layers; the vision tower is on the first one."""
        from l4ctx.machine.device import most_allocated
        from model.weights.tiers import bytes_by_device

        if (spread := self.model.spread) is None:
            return
        weights = bytes_by_device(self.model, spread)
        for share, device in zip(self.sized.plan.shares, spread.devices, strict=True):
            held = self.undivided_cache.held(device)
            tower = self.features.weight_bytes if self.features and device == spread.first else 0
            in_all, peak = weights[device] + tower, most_allocated((device,))
            yield HeldOnDevice(str(device), share.layers, in_all, held.rope_windows, held.nope_device, peak)

    def _rank_reports(self) -> list[RankReport]:
        if self.leader is None:
            return []
        return self.leader.reports(_job(self.sized), self.cache, self.sized.before, self.monitor.sampler.peak)

    def anew(self, inputs: Inputs) -> Session:
        """The same model with an empty cache, for another prompt of no more tokens than was planned for."""
        assert inputs.length <= self.sized.plan.layout.length and self.leader is None and self.sized.written is None
        if self.scratch is not None:
            self.scratch.close()
        sized = replace(self.sized, inputs=inputs)
        scratch = _scratch(inputs.request, self.monitor)
        return replace(self, sized=sized, cache=_cache(sized, self.model, scratch), scratch=scratch, answer=Answer())

    def _read(self, stop: int) -> Iterator[PrefillProgress]:
        from l4ctx.engine.prefill import prefill

        prompt = self.sized.inputs.prompt
        first = self.sized.inputs.prompt_tokens - len(prompt.ids)  # position of the prompt's first own token
        ids = memoryview(prompt.ids)[self.cache.offset - first : stop - first]
        before = self.monitor.timings["prefill"]
        with with_repair_hint(self.request.context.folder), self._telling_what_is_kept():
            for step in prefill(
                self.model,
                self.cache,
                ids,
                prefill_chunk_size=self.sized.plan.prefill_chunk_size,
                features=self.features,
            ):
                self.monitor.timings["prefill"] = Timing(before.seconds + step.seconds, before.tokens + step.done)
                yield step

    @contextmanager
    def _telling_what_is_kept(self) -> Iterator[None]:
        """An image that has become unreadable ends the run; the error says what was saved of the part before it."""
        from l4ctx.documents.images import ImageError

        try:
            yield
        except ImageError as error:
            raise type(error)(f"{error}; {self.monitor.kept()}") from None


def load(sized: Sized, monitor: Monitor) -> Session:
    """Maps or converts the weights, and creates the cache, filled with what is reused.

    Raises CheckpointError, ContextError and DiskFullError.
    """
    from l4ctx.engine.prefill import LayerCount
    from model.weights.loading import load_checkpoint

    inputs, plan = sized.inputs, sized.plan
    request, device = inputs.request, sized.device
    compute_on(device)
    if request.launch is not None:
        return_large_blocks()
    with monitor.loading():
        monitor.tell("loading weights")
        copied = plan.device_weights
        channel = None if request.launch is None else _channel(request.launch, sized, monitor)
        exchange, context = (None, None) if channel is None else channel.mesh(request.compute.context_ranks)
        model = load_checkpoint(
            request.model,
            dtype=plan.workload.dtype,
            device="cpu" if copied else device,
            attention=sized.attention,
            is_mapped=plan.weights_are_mapped or copied is not None,
            quantization=inputs.choices.compute.quantization,
            exchange=exchange,
            context=context,
            spread=sized.spread,
        )
        leader = None if channel is None else _leader(model, channel, inputs.checked.whole)
        watcher = _watcher(model, plan, device, monitor)
        model.watcher = layers = LayerCount(watcher)
        features, unread = None, [placed for placed in inputs.prompt.images if placed.span.stop > sized.reused]
        if inputs.images is not None and unread:
            features = inputs.images.load(unread, dtype=model.dtype, device=device, is_mapped=plan.weights_are_mapped)
        scratch = _scratch(request, monitor)
        cache = _run_cache(sized, model, leader, scratch)
        pin(cache, plan, monitor)
        if sized.context is not None and sized.reused:
            monitor.tell(f"loading {sized.reused:,} tokens of {sized.context.folder}")
            held = sized.context.held(sized.reused)
            with with_repair_hint(sized.context.folder):
                held.restore(cache) if leader is None else leader.restore(held, cache)
    return Session(sized, monitor, model, cache, features, scratch, layers, leader)


def _scratch(request: Request, monitor: Monitor) -> Scratch | None:
    """Raises DiskFullError."""
    from cache.disk import Scratch

    if request.kv.folder is None:
        return None
    scratch = Scratch(request.kv.folder)
    monitor.resources.callback(scratch.close)
    return scratch


def _run_cache(
    sized: Sized, model: Transformer, leader: Leader | None, scratch: Scratch | None
) -> HybridKVCache | ContextKVCache:
    """That of the run; sealed rows are saved in a context, if what is read is kept."""
    writer = None if sized.written is None else sized.written.writer
    if leader is None:
        return _cache(sized, model, writer or scratch)
    job = _job(sized)
    return job.cache(model, scratch, None if writer is None else leader.saved_rows(job, writer))


def _cache(sized: Sized, model: Transformer, rows: RowStore | None) -> HybridKVCache:
    """An empty one."""
    from cache.hybrid import HybridKVCache

    plan = sized.plan
    return HybridKVCache(
        sized.inputs.config,
        length=plan.layout.length,
        dtype=model.dtype,
        device=sized.device,
        devices=None if model.spread is None else model.spread.layers,
        layout=plan.layout,
        residency=plan.residency,
        rows=rows,
    )


def _channel(launch: Launch, sized: Sized, monitor: Monitor) -> Channel:
    """Meets the other processes. Raises RankLostError, then and as long as the run lasts."""
    from l4ctx.run.channel import leading

    return monitor.resources.enter_context(leading(launch, _job(sized).as_dict(), lambda: monitor.kept()))


def _job(sized: Sized) -> Job:
    """That of several processes."""
    from l4ctx.run.ranks import Job

    return Job.of(sized.inputs.request, sized.plan, sized.inputs.length, sized.attention)


def _leader(model: Transformer, channel: Channel, whole: TextConfig) -> Leader:
    from l4ctx.run.ranks import Leader

    return Leader(model, channel, whole)


def _watcher(model: Transformer, plan: MemoryPlan, device: torch.device, monitor: Monitor) -> LayerWatcher | None:
    """What brings the weights that do not stay where the model computes, for as long as the run lasts."""
    from model.weights.device_stream import DeviceStream
    from model.weights.streaming import WeightStream
    from model.weights.transport import CudaTransport

    budget = plan.weight_residency.budget
    stream: DeviceStream | WeightStream | None = None
    if (copied := plan.device_weights) is not None:
        stream = DeviceStream(model, CudaTransport(device), copied.layers_budget, is_pinned=copied.is_pinned)
    elif budget is not None:
        stream = WeightStream.of(model, budget)
    if stream is not None:
        monitor.resources.callback(stream.close)
    return stream
