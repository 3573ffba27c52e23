"""Several processes carry out one request: the first one leads, the others do what it is about to do.

Only the leader reads documents, chooses tokens and speaks. Before each forward it tells the others what the forward
gets; the exchange within it is `model.parallel`'s. When any of them ends early, all do.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from cache.disk import Scratch
from cache.hybrid import HybridKVCache
from cache.layout import StoreLayout
from cache.residency import Residency
from l4ctx.errors import UsageError
from l4ctx.formatting import counted
from l4ctx.machine.device import prepare_torch
from l4ctx.machine.ranks import Launch
from model.config import TextConfig
from model.division import TensorRank, copies_of_kv_heads
from model.errors import RankLostError, UserError
from model.parallel import GroupExchange
from model.quantization.choice import Quantization
from model.transformer import Transformer
from model.weights.loading import load_checkpoint

if TYPE_CHECKING:
    from l4ctx.planning.memory_plan import MemoryPlan
    from l4ctx.run.request import Request

FOREVER = timedelta(days=30)
"""A leader may wait for a reader of its answer; torchrun sees which processes end."""

SECONDS_TO_SAY_WHY = 1.0
_FAILURE = "failure"
_END, _FORWARD, _EMBED = range(3)
_DTYPES = (torch.int64, torch.float32, torch.bfloat16, torch.float16)
_LOGITS = ("all", "last", "none")


def check(request: Request) -> None:
    """Raises UsageError for what several processes cannot do yet."""
    for option, is_given in (
        ("--context", request.context.answer_from is not None),
        ("--save-context", request.context.save_to is not None),
        ("--questions", request.questions is not None),
        ("--weights-memory", request.compute.weights_memory is not None),
    ):
        if is_given:
            raise UsageError(f"{option} does not go with several ranks yet: run l4ctx without torchrun")


def note_on(config: TextConfig, count: int) -> str:
    """What the user should know; `config` is the whole model's."""
    heads, copies = config.num_key_value_heads, copies_of_kv_heads(config, count)
    replicated = f"; {counted(heads, 'KV head')} for {count} ranks: each is on {copies} of them" if copies > 1 else ""
    return f"{count} ranks, and the model divided over them{replicated}"


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
        )

    def load(self, exchange: GroupExchange) -> Transformer:
        """Raises CheckpointError."""
        return load_checkpoint(
            self.model,
            dtype=self.dtype,
            attention=self.attention,
            is_mapped=False,
            quantization=None if self.quantize is None else Quantization.parse(self.quantize),
            exchange=exchange,
        )

    def cache(self, model: Transformer, scratch: Scratch | None) -> HybridKVCache:
        layout = StoreLayout(
            model.config, self.length, self.dtype, self.kv_dtype, 1, self.block_tokens, self.segment_tokens
        )
        return HybridKVCache(
            model.config,
            length=self.length,
            dtype=model.dtype,
            layout=layout,
            residency=Residency(self.host_rows),
            rows=scratch,
        )


class Channel:
    """One process's end of what all of them tell one another."""

    def __init__(self, launch: Launch) -> None:
        """Waits until all are there."""
        self._store = PrefixStore(
            "l4ctx",
            TCPStore(
                launch.address,
                launch.port,
                is_master=launch.speaks and not launch.is_met,
                timeout=FOREVER,
                wait_for_workers=False,
            ),
        )
        dist.init_process_group("gloo", store=self._store, rank=launch.number, world_size=launch.count, timeout=FOREVER)
        self.exchange = GroupExchange(TensorRank(launch.number, launch.count))

    def tell(self, numbers: list[int]) -> None:
        """Leader's; the others `hear` as many."""
        self.exchange.from_first(torch.tensor(numbers))

    def hear(self, count: int) -> list[int]:
        return self.exchange.from_first(torch.zeros(count, dtype=torch.int64)).tolist()

    def tell_job(self, job: Job) -> None:
        content = json.dumps(dataclasses.asdict(job)).encode()
        self.tell([len(content)])
        self.tell(list(content))

    def hear_job(self) -> Job:
        (size,) = self.hear(1)
        return Job(**json.loads(bytes(self.hear(size))))

    def say_failure(self, message: str) -> None:
        with suppress(RuntimeError):
            self._store.set(_FAILURE, message)

    def failure(self) -> str | None:
        """What another rank said before it ended; None if it ended without a word."""
        end = time.monotonic() + SECONDS_TO_SAY_WHY
        with suppress(RuntimeError):
            while time.monotonic() < end:
                if self._store.check([_FAILURE]):
                    return str(self._store.get(_FAILURE).decode(errors="replace"))
                time.sleep(0.05)
        return None

    def close(self) -> None:
        dist.destroy_process_group()


@contextmanager
def leading(launch: Launch, job: Job) -> Iterator[Channel]:
    """Meets the other ranks and gives them their work, which ends with this context.

    Raises RankLostError, which says why, when one of them ends before.
    """
    channel = Channel(launch)
    before = signal.signal(signal.SIGTERM, _ended_by_torchrun)
    try:
        channel.tell_job(job)
        yield channel
        channel.tell([_END, *[0] * 5])
        channel.close()
    except RankLostError as error:
        raise RankLostError(channel.failure() or str(error)) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def lead(model: Transformer, channel: Channel) -> None:
    """From now on the other ranks compute what this model does."""
    is_within = False

    def announce(kind: int, x: Tensor, cache: Any = None, logits: str = "all") -> None:
        assert x.device.type == "cpu" and logits in _LOGITS, (x.device, logits)
        assert cache is not None or kind == _EMBED, "the other ranks have one cache"
        header = [kind, *x.shape, *[0] * (3 - x.dim()), _DTYPES.index(x.dtype)]
        channel.tell([*header, cache.offset * len(_LOGITS) + _LOGITS.index(logits) if cache is not None else 0])
        channel.exchange.from_first(x)

    def before(module: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        nonlocal is_within
        announce(_FORWARD, *arguments, **options)
        is_within = True

    def after(*_: Any) -> None:
        nonlocal is_within
        is_within = False

    def embed(ids: Tensor) -> Tensor:
        if not is_within:
            announce(_EMBED, ids)
        return Transformer.embed(model, ids)

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, always_call=True)
    model.embed = embed  # type: ignore[method-assign]


def follow(launch: Launch) -> None:
    """What all ranks but the first do: nothing but compute. Raises RankLostError when another one ends early."""
    prepare_torch()
    channel = Channel(launch)
    try:
        job = channel.hear_job()
        model = job.load(channel.exchange)
        scratch = None if job.kv_folder is None else Scratch(Path(job.kv_folder))
        cache = job.cache(model, scratch)
        while True:
            kind, *shape, dtype, state = channel.hear(6)
            if kind == _END:
                channel.close()
                return
            _step(model, cache, channel, kind, torch.zeros(_shape(shape), dtype=_DTYPES[dtype]), state)
    except RankLostError:
        raise
    except Exception as error:
        what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        channel.say_failure(f"rank {launch.number} failed: {what}")
        raise


def _step(model: Transformer, cache: HybridKVCache, channel: Channel, kind: int, x: Tensor, state: int) -> None:
    x = channel.exchange.from_first(x)
    if kind == _EMBED:
        model.embed(x)
        return
    offset, logits = divmod(state, len(_LOGITS))
    if offset != cache.offset:
        cache.rewind(offset)  # tokens of a draft that were wrong
    model(x, cache, logits=_LOGITS[logits])


def _shape(sizes: list[int]) -> list[int]:
    return [size for size in sizes if size]


def _ended_by_torchrun(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough
    raise RankLostError("another rank has ended, or torchrun was: so all ranks end")
