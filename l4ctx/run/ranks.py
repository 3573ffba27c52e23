"""Several processes carry out one request: the first one leads, the others do what it is about to do.

Only the leader reads documents, chooses tokens and speaks. Before each forward it tells the others what the forward
gets; `l4ctx.run.follower` is what they do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cache.blocks import Block
from cache.context import ContextKVCache, Continuation
from cache.disk import Scratch
from cache.hybrid import HybridKVCache
from cache.layout import StoreLayout
from cache.residency import Residency
from cache.tiers import RowStore
from l4ctx.errors import UsageError
from l4ctx.formatting import counted
from l4ctx.run.channel import EMBED, FORWARD, RAGGED, REPORT, RESTORE, TAIL, UNSAVED, Channel, leading
from l4ctx.run.mesh_rows import MeshRows
from l4ctx.run.rank_report import RankReport
from l4ctx.run.rank_rows import RankRows, heads_of, tensor_rank
from model.config import TextConfig
from model.context_parallel import ContextTransformer
from model.division import copies_of_kv_heads, divided
from model.parallel import GroupContextExchange, GroupExchange
from model.quantization.choice import Quantization
from model.transformer import Transformer
from model.weights.loading import load_checkpoint

if TYPE_CHECKING:
    from l4ctx.contexts.restoring import Held
    from l4ctx.machine.memory import ProcessMemory
    from l4ctx.machine.ranks import Launch
    from l4ctx.planning.memory_plan import MemoryPlan
    from l4ctx.run.request import Request

Cache = HybridKVCache | ContextKVCache
SavedRows = RankRows | MeshRows

DTYPES = (torch.int64, torch.float32, torch.bfloat16, torch.float16)
LOGITS = ("all", "last", "none")


def check(request: Request) -> None:
    """Raises UsageError for what several processes cannot do yet."""
    for option, value in (
        ("--weights-memory", request.compute.weights_memory),
        ("--weights-device-memory", request.compute.weights_device_memory),
    ):
        if value is not None:
            raise UsageError(f"{option} does not go with several ranks yet: run l4ctx without torchrun")
    if request.answer.cites:
        raise UsageError("--cite does not go with several ranks yet: run l4ctx without torchrun")
    context_ranks = request.compute.context_ranks
    if context_ranks == 1:
        return
    assert request.launch is not None, "nobody to share with"
    if request.launch.count % context_ranks:
        raise UsageError(
            f"--context-ranks {context_ranks}: {request.launch.count} ranks cannot be divided by it; "
            "start another number"
        )


def note_on(config: TextConfig, count: int, context_ranks: int = 1) -> str:
    """What the user should know; `config` is the whole model's."""
    heads, tensor = config.num_key_value_heads, count // context_ranks
    copies = copies_of_kv_heads(config, tensor)
    replicated = f"; {counted(heads, 'KV head')} for {tensor} ranks: each is on {copies} of them" if copies > 1 else ""
    if context_ranks == 1:
        return f"{count} ranks, and the model divided over them{replicated}"
    model = f"in groups of {tensor}, over each of which the model is divided" if tensor > 1 else "each with the model"
    return f"{count} ranks {model}; the documents are divided over {context_ranks}{replicated}"


def dismiss(launch: Launch) -> None:
    """Lets the other ranks go: there is nothing to compute."""
    with leading(launch, None, lambda: "nothing was left to do"):
        pass


@dataclass(frozen=True)
class Job:
    """What the other ranks need to know before the first forward."""

    model: str
    dtype: str
    attention: str
    quantize: str | None
    length: int
    kv_dtype: str
    block_tokens: int
    segment_tokens: int
    host_rows: int | None
    kv_folder: str | None
    is_saved: bool  # what is read is kept in a context
    device: str = "cpu"  # or cuda: each rank's own
    device_rows: int = 0
    context_ranks: int = 1
    is_mapped: bool = False
    all_on_disk: bool = False  # every block is, or will be, in a saved context

    @classmethod
    def of(cls, request: Request, plan: MemoryPlan, length: int, attention: str) -> Job:
        layout, folder, quantization = plan.layout, request.kv.folder, request.compute.quantization
        return cls(
            str(request.model),
            layout.dtype,
            attention,
            None if quantization is None else str(quantization),
            length,
            layout.kv_dtype,
            layout.block_tokens,
            layout.segment_tokens,
            plan.residency.host_rows,
            None if folder is None else str(folder),
            request.context.save_to is not None,
            "cuda" if plan.residency.on_accelerator else "cpu",
            plan.residency.device_rows,
            request.compute.context_ranks,
            plan.weights_are_mapped,
            plan.workload.is_saved,
        )

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def load(
        self,
        exchange: GroupExchange | None,
        context: GroupContextExchange | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> Transformer:
        """`Channel.mesh` makes the exchanges. Raises CheckpointError."""
        return load_checkpoint(
            self.model,
            dtype=self.dtype,
            device=device,
            attention=self.attention,
            is_mapped=self.is_mapped,
            quantization=None if self.quantize is None else Quantization.parse(self.quantize),
            exchange=exchange,
            context=context,
        )

    def scratch(self) -> Scratch | None:
        return None if self.kv_folder is None else Scratch(Path(self.kv_folder))

    def layout(self, config: TextConfig, length: int | None = None) -> StoreLayout:
        """`config` is the rank's, `length` that of its own cache."""
        length = self.length if length is None else length
        return StoreLayout(config, length, self.dtype, self.kv_dtype, 1, self.block_tokens, self.segment_tokens)

    def saved_rows(self, channel: Channel, whole: TextConfig, store: RowStore | None = None) -> SavedRows:
        """Where all ranks save what they read; `whole` is the whole model's configuration. The first one has the
        `store`."""
        layout = self.layout(divided(whole, tensor_rank(channel.exchange.rank, self.context_ranks)))
        if self.context_ranks == 1:
            return RankRows(channel, whole, layout, store)
        return MeshRows(channel, whole, layout, self.context_ranks, store)

    def cache(self, model: Transformer, rows: RowStore | None, saved: SavedRows | None = None) -> Cache:
        """`rows` holds what memory does not; with `saved`, every row is saved there until `stop_saving`."""
        rank = model.exchange.rank if isinstance(model, ContextTransformer) else None
        length = self.length if rank is None else rank.own_length(self.length, model.config.attention_chunk_size)
        cache = HybridKVCache(
            model.config,
            length=length,
            dtype=model.dtype,
            device=model.device,
            layout=self.layout(model.config, length),
            residency=Residency(self.host_rows, self.device_rows, on_accelerator=self.device == "cuda"),
            rows=saved if isinstance(saved, RankRows) else rows,
        )
        if rank is None:
            return cache
        assert not isinstance(saved, RankRows), "rows of tensor ranks"
        return ContextKVCache(cache, rank, self.length, saved)


def restore(held: Held, cache: Cache, channel: Channel, whole: TextConfig) -> None:
    """Fills one rank's cache. Raises DiskError."""
    context_ranks = cache.rank.count if isinstance(cache, ContextKVCache) else 1
    held.restore(cache, heads_of(whole, tensor_rank(channel.exchange.rank, context_ranks)))


def report(
    channel: Channel,
    job: Job,
    model: Transformer,
    cache: Cache,
    before: ProcessMemory | None,
    peak: ProcessMemory | None,
) -> list[RankReport]:
    """Every rank's, on the first one; elsewhere nothing. Raises CheckpointError where the checkpoint was changed."""
    rank = channel.exchange.rank
    place = tensor_rank(rank, job.context_ranks)
    own = RankReport.of(rank.number, model, cache, Path(job.model), place, before, peak)
    return [RankReport.from_numbers(numbers) for numbers in channel.gathered(own.numbers)]


def tail(rows: SavedRows, cache: Cache) -> dict[int, Block]:
    """What all ranks have behind the rows that are saved, on the first one."""
    if isinstance(rows, RankRows):
        assert isinstance(cache, HybridKVCache)
        return rows.tail(cache)
    assert isinstance(cache, ContextKVCache)
    return rows.tail(cache)


def stop_saving(cache: Cache, rows: RowStore | None) -> None:
    """What memory does not hold goes to `rows` from now on."""
    if isinstance(cache, ContextKVCache):
        cache.stop_saving(rows)
    else:
        cache.rows = rows


class Leader:
    """The first rank's model and cache, whatever is done with which the others do, too."""

    def __init__(self, model: Transformer, channel: Channel, whole: TextConfig) -> None:
        """From now on the other ranks compute what `model` does; `whole` is the whole model's configuration."""
        self._model, self._channel, self._whole = model, channel, whole
        self._is_within = False  # a forward, of which all know
        self._forks: WeakKeyDictionary[Continuation, int] = WeakKeyDictionary()
        self._made = 0  # forks so far
        self._rows: SavedRows | None = None
        self._reports: list[RankReport] | None = None
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.register_forward_hook(self._after, always_call=True)
        model.embed = self._embed  # type: ignore[method-assign]
        model.forward_ragged = self._forward_ragged  # type: ignore[method-assign]

    def saved_rows(self, job: Job, store: RowStore) -> SavedRows:
        """Where rows are saved in a context; `store` writes them with the KV heads and tokens of all ranks."""
        self._rows = job.saved_rows(self._channel, self._whole, store)
        return self._rows

    def restore(self, held: Held, cache: Cache) -> None:
        """Fills the cache, on each rank with its heads and tokens. Raises DiskError."""
        self._channel.announce(RESTORE)
        self._channel.tell_json(held.as_dict())
        restore(held, cache, self._channel, self._whole)

    def tail(self, cache: Cache) -> dict[int, Block]:
        """That of a cache of all heads and tokens."""
        assert self._rows is not None, "nothing is saved"
        self._channel.announce(TAIL)
        return tail(self._rows, cache)

    def reports(
        self, job: Job, cache: Cache, before: ProcessMemory | None, peak: ProcessMemory | None
    ) -> list[RankReport]:
        """Of all ranks, as of the first call; `before` and `peak` are of this process."""
        if self._reports is None:
            self._channel.announce(REPORT)
            self._reports = report(self._channel, job, self._model, cache, before, peak)
        return self._reports

    def stop_saving(self, cache: Cache, rows: RowStore | None) -> None:
        """What is sealed from now on is no part of a context."""
        self._channel.announce(UNSAVED)
        stop_saving(cache, rows)

    def _before(self, module: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._announce(FORWARD, *arguments, **options)
        self._is_within = True

    def _after(self, *_: Any) -> None:
        self._is_within = False

    def _announce(self, kind: int, x: Tensor, cache: Any = None, logits: str = "all", observer: None = None) -> None:
        assert logits in LOGITS and observer is None, logits
        assert isinstance(cache, HybridKVCache | ContextKVCache) or kind == EMBED, "the other ranks have one cache"
        state = 0 if cache is None else cache.offset * len(LOGITS) + LOGITS.index(logits)
        self._channel.announce(kind, *x.shape, *[0] * (3 - x.dim()), DTYPES.index(x.dtype), state)
        self._channel.exchange.from_first(x)

    def _embed(self, ids: Tensor) -> Tensor:
        if not self._is_within:
            self._announce(EMBED, ids)
        return Transformer.embed(self._model, ids)

    def _forward_ragged(
        self, ids: Sequence[Sequence[int]], caches: Sequence[Any], logits: Any = "all", observers: Any = None
    ) -> list[Tensor] | None:
        """Also says which forks there are: the others forget those that are gone."""
        assert not isinstance(logits, str) and not any(observers or ()), logits
        for cache in caches:
            if cache not in self._forks:
                self._forks[cache] = self._made
                self._made += 1
        fed = {id(cache): (len(some), wanted) for cache, some, wanted in zip(caches, ids, logits, strict=True)}
        order = [*caches, *(cache for cache in self._forks if id(cache) not in fed)]
        table = [[self._forks[cache], cache.capacity, cache.offset, *fed.get(id(cache), (0, 0))] for cache in order]
        joined = [int(token) for some in ids for token in some]
        self._channel.announce(RAGGED, len(table), len(joined))
        self._channel.tell([*(number for row in table for number in row), *joined])
        self._is_within = True
        try:
            return type(self._model).forward_ragged(self._model, ids, caches, logits)
        finally:
            self._is_within = False
