"""How long the ranks of a mesh take, in closed form: an estimate from stated rates, not a measurement. No torch.

In every layer a rank computes, sums over the tensor ranks and, in NoPE layers, exchanges with the context ranks, one
after the other. At the same time the host link brings what the GPU does not hold: the weights of the next layer, and
blocks of keys and values, of which those on disk are read first and only a few are on the GPU at a time. A layer takes
the longer of the two, and a step the sum over its layers. `samples/simulations` plays the same by events.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from cache.layout import KV_DTYPES
from l4ctx.planning.mesh import RankPlan
from l4ctx.planning.mesh_layers import Copies, LayerKind, layer_kinds
from l4ctx.planning.step_time import parts_of
from model.context_division import ContextRank
from model.costs import chunked_pairs, kv_size, query_size
from model.weights.owners import Owner

LATENCY = 20e-6
"""Seconds that each exchange between ranks takes beside its bytes: assumed."""


@dataclass(frozen=True)
class Rates:
    """Of one rank, a second. The defaults are those of an H100 or H200 of 8 in one machine, from NVIDIA's data sheets:
    60 % of 989 TFLOP/s in bf16, 400 of 450 GB/s of NVLink one way, 50 of 64 GB/s of PCIe 5.0 with 16 lanes, and
    3.35 TB/s of an H100's memory; the disk's is that of one PCIe 4.0 drive."""

    compute: float = 593e12  # floating-point operations
    link: float = 400e9  # bytes to other ranks
    host_link: float = 50e9  # bytes from host memory
    disk: float = 5e9  # bytes from disk to host memory
    memory: float = 3.35e12  # bytes from the GPU's own memory


@dataclass(frozen=True)
class Seconds:
    """Of a step, or of many. Copies are hidden as far as they take no longer than the rest."""

    computing: float
    sums: float
    exchange: float
    waiting: float  # for what comes from host memory or disk

    @property
    def total(self) -> float:
        return self.computing + self.sums + self.exchange + self.waiting

    @property
    def share_waiting(self) -> float:
        """For links of all kinds."""
        return 1 - self.computing / self.total if self.total else 0.0

    def times(self, count: int) -> Seconds:
        return Seconds(*(count * getattr(self, name) for name in self.__dataclass_fields__))

    @classmethod
    def added(cls, parts: list[Seconds]) -> Seconds:
        return cls(*(sum(getattr(part, name) for part in parts) for name in cls.__dataclass_fields__))


@dataclass(frozen=True)
class Traffic:
    """Bytes of one rank in one step, or for one token of an answer."""

    sums: int
    exchange: int
    host: int  # from host memory to the GPU
    disk: int  # of these, read from disk first

    @property
    def between_ranks(self) -> int:
        return self.sums + self.exchange


@dataclass(frozen=True)
class MeshTime:
    """Of one rank; all take equally long, as whole attention chunks are dealt out evenly."""

    rank: RankPlan
    rates: Rates

    def step(self, start: int, stop: int) -> Seconds:
        """Of the prefill step over positions start .. stop - 1."""
        tokens, context, exchange = self._share(start, stop), self.rank.mesh.context, self.rank.exchange
        pairs = chunked_pairs(exchange.config, start + tokens) - chunked_pairs(exchange.config, start)
        queries_travel = exchange.nope_layer(range(start, stop)).are_queries
        attended = start + (stop - start + 1) / 2  # keys that a query of the step sees, on average
        all_pairs = attended * ((stop - start) / context if queries_travel else tokens)

        def computing(kind: LayerKind) -> float:
            seen = all_pairs if kind.is_nope else pairs if kind.is_whole else 0
            return (2 * kind.parameters * tokens + self._pair_operations * seen) / self.rates.compute

        a_key = self._pair_operations * (stop - start if queries_travel else tokens) / self.rates.compute
        return self._seconds(start, stop, layer_kinds(self.rank, is_decode=False), computing, a_key)

    def prefill(self) -> Seconds:
        """Of all steps; of very many, one in the middle stands for those around it."""
        last = self.number_of_steps - 1
        parts = [self._step(last)]  # which may be shorter
        for steps in parts_of(last):
            parts.append(self._step(steps[len(steps) // 2]).times(len(steps)))
        return Seconds.added(parts)

    @property
    def number_of_steps(self) -> int:
        return -(-self.rank.workload.prompt_tokens // self.rank.prefill_chunk_size)

    def positions(self, step: int) -> range:
        """Those that a step of the prefill reads; -1 is the last one."""
        size = self.rank.prefill_chunk_size
        start = step % self.number_of_steps * size
        return range(start, min(start + size, self.rank.workload.prompt_tokens))

    def _step(self, number: int) -> Seconds:
        positions = self.positions(number)
        return self.step(positions.start, positions.stop)

    def token(self) -> Seconds:
        """Of one token of an answer behind the whole prompt: reading the GPU's memory counts as computing."""
        workload, plan, exchange = self.rank.workload, self.rank.plan, self.rank.exchange
        length, stored = workload.prompt_tokens, plan.workload.stored
        assert stored is not None
        elements = 2 * kv_size(exchange.config)
        a_key = elements * KV_DTYPES[plan.layout.kv_dtype]
        window = (length % workload.config.attention_chunk_size) * elements * KV_DTYPES[workload.dtype]
        kept = plan.workload.held * a_key

        def reading(kind: LayerKind) -> float:
            return (kind.weight_bytes + (kept if kind.is_nope else window)) / self.rates.memory

        kinds = layer_kinds(self.rank, is_decode=True)
        layers = self._seconds(length, length + 1, kinds, reading, a_key / self.rates.memory)
        head = stored.owned_by(Owner.HEAD) or stored.owned_by(Owner.EMBEDDINGS)
        gathered = exchange.logits / self.rates.link + LATENCY if exchange.tensor > 1 else 0.0
        return Seconds.added([layers, Seconds(head / self.rates.memory, gathered, 0.0, 0.0)])

    def traffic(self, start: int, stop: int) -> Traffic:
        """Of the prefill step over positions start .. stop - 1."""
        return self._traffic(start, stop, is_decode=False)

    def traffic_of_token(self) -> Traffic:
        """Of one token of an answer behind the whole prompt."""
        length = self.rank.workload.prompt_tokens
        return self._traffic(length, length + 1, is_decode=True)

    @property
    def hiding_chunk(self) -> int | None:
        """The prefill chunk, of all ranks, from which on computing hides all copies from host memory at the end of the
        prompt, but for the last layer's; None if nothing is copied."""
        length, config = self.rank.workload.prompt_tokens, self.rank.exchange.config
        chunk = config.attention_chunk_size
        needed = 0.0
        for kind in layer_kinds(self.rank, is_decode=False):
            seen = length if kind.is_nope else min(chunk, length) / 2
            a_query = (2 * kind.parameters + self._pair_operations * seen) / self.rates.compute
            if kind.is_whole:
                needed = max(needed, self._copies.seconds(kind, length) / a_query)
        return math.ceil(needed * self.rank.mesh.context) or None

    def _seconds(
        self, start: int, stop: int, kinds: Counter[LayerKind], computing: Callable[[LayerKind], float], a_key: float
    ) -> Seconds:
        """Of a step whose layers compute so long, `a_key` of it for each key of a rank in a NoPE layer."""
        tokens, rates, exchange = self._share(start, stop), self.rates, self.rank.exchange
        of_sum = exchange.sums(tokens) / rates.link + LATENCY if exchange.tensor > 1 else 0.0
        sent = exchange.nope_layer(range(start, stop))
        of_exchange = sent.num_bytes / exchange.context / rates.link + LATENCY if exchange.context > 1 else 0.0
        attending = a_key * self._copies.tokens(start)
        parts = [Seconds(0.0, of_sum, 0.0, 0.0)]  # the embeddings
        for kind, count in kinds.items():
            computed, summed = computing(kind), 2 * of_sum if kind.is_whole else 0.0
            exchanged = of_exchange if kind.is_nope else 0.0
            waiting = max(0.0, self._copies.seconds(kind, start) - computed - summed - exchanged)
            if kind.is_nope:  # blocks are few at a time on the GPU: only attending to them hides their copies
                waiting = max(waiting, self._copies.seconds(replace(kind, copied=0), start) - attending)
            parts.append(Seconds(count * computed, count * summed, count * exchanged, count * waiting))
        return Seconds.added(parts)

    def _traffic(self, start: int, stop: int, *, is_decode: bool) -> Traffic:
        tokens, exchange = self._share(start, stop), self.rank.exchange
        kinds = layer_kinds(self.rank, is_decode=is_decode)
        nope = sum(count for kind, count in kinds.items() if kind.is_nope)
        whole = sum(count for kind, count in kinds.items() if kind.is_whole)
        copied = [(count, *self._copies.num_bytes(kind, start)) for kind, count in kinds.items()]
        return Traffic(
            (1 + 2 * whole) * exchange.sums(tokens) + (exchange.logits if is_decode else 0),
            nope * exchange.nope_layer(range(start, stop)).num_bytes // exchange.context,
            sum(count * host for count, host, _ in copied),
            sum(count * disk for count, _, disk in copied),
        )

    @cached_property
    def _copies(self) -> Copies:
        return Copies(self.rank, self.rates.host_link, self.rates.disk)

    @property
    def _pair_operations(self) -> int:
        """Of one query and one key, all heads of a rank: two multiply-adds an element."""
        return 4 * query_size(self.rank.exchange.config)

    def _share(self, start: int, stop: int) -> int:
        """The most tokens of a step that one rank computes."""
        tokens: Counter[int] = Counter()
        chunk_size = self.rank.exchange.config.attention_chunk_size
        for piece in ContextRank(0, self.rank.mesh.context).pieces(range(start, stop), chunk_size):
            tokens[piece.owner] += len(piece.positions)
        return max(tokens.values())
