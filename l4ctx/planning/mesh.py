"""What each rank of a mesh of tensor x context ranks holds, in closed form. Imports no torch.

Tensor ranks divide every layer (`model.division`). Context ranks hold the same weights and divide the text: each keeps
the keys and values of its own attention chunks. So a rank is planned as the program plans the processes that torchrun
starts: by `MemoryPlan`, of a smaller model and a share of the text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cache.layout import KV_DTYPES
from l4ctx.planning.exchange import Exchange
from l4ctx.planning.fitting import plan_memory
from l4ctx.planning.memory_plan import ACCELERATOR, MARGIN_BYTES, MemoryPlan
from l4ctx.planning.weights import StoredWeights, WeightBytes
from l4ctx.planning.workload import Capacity, Workload
from model.config import TextConfig
from model.context_division import most_tokens
from model.costs import kv_size
from model.division import TensorRank, copies_of_kv_heads, divided
from model.weights.owners import Owner


@dataclass(frozen=True)
class Mesh:
    """The ranks that read one text together: `tensor` x `context` GPUs, with a process for each."""

    tensor: int = 1
    context: int = 1

    @property
    def ranks(self) -> int:
        return self.tensor * self.context

    def config(self, config: TextConfig) -> TextConfig:
        """Of one rank's part of the layers. Raises DivisionError."""
        return divided(config, TensorRank(0, self.tensor))

    def tokens_of_a_rank(self, config: TextConfig, tokens: int) -> int:
        """The most tokens whose NoPE keys and values one context rank keeps."""
        return most_tokens(self.context, tokens, config.attention_chunk_size)


@dataclass(frozen=True)
class RankWeights:
    """The weights of one rank. Bytes."""

    stored: StoredWeights
    replicated: int  # of what every tensor rank holds: norms and routers
    kv_copies: int  # tensor ranks that hold the same KV heads

    @classmethod
    def of(cls, stored: StoredWeights, config: TextConfig, mesh: Mesh) -> RankWeights:
        """The largest rank's share, which differs from the others' by one row at the most."""
        copies = copies_of_kv_heads(config, mesh.tensor)
        parts = [_share(part, config, mesh.tensor, copies) for part in stored.parts]
        replicated = sum(part.num_bytes for part in parts if part.owner is Owner.SMALL)
        return cls(StoredWeights.of(config, parts, is_made=stored.is_made), replicated, copies)


def _share(part: WeightBytes, config: TextConfig, ranks: int, kv_copies: int) -> WeightBytes:
    """Keys' and values' projections are told from the other matrices of attention by their size."""
    if part.owner is Owner.SMALL:
        return part
    is_kv = part.owner is Owner.ATTENTION and part.parameters == config.hidden_size * kv_size(config)
    copies = kv_copies if is_kv else 1
    return replace(
        part,
        parameters=-(-part.parameters * copies // ranks),
        num_bytes=-(-part.num_bytes * copies // ranks),
    )


@dataclass(frozen=True)
class RankPlan:
    """What one rank holds: the plan of its share."""

    mesh: Mesh
    workload: Workload  # of all ranks together
    weights: RankWeights
    plan: MemoryPlan  # of the share
    exchange: Exchange

    @classmethod
    def of(cls, workload: Workload, mesh: Mesh, capacity: Capacity) -> RankPlan:
        """`capacity` is one rank's. Weights that the GPU does not hold are streamed from host memory.

        `workload.prefill_chunk_size` counts the tokens of all ranks. Raises DivisionError.
        """
        assert workload.stored is not None and capacity.accelerator is not None
        config = workload.config
        weights = RankWeights.of(workload.stored, config, mesh)
        part = replace(
            workload,
            config=mesh.config(config),
            whole=config if mesh.ranks > 1 else None,
            ranks=mesh.tensor,
            context_ranks=mesh.context,
            weights=weights.stored.bytes_in(workload.dtype),
            stored=weights.stored,
        )
        exchange = Exchange(part.config, mesh.tensor, mesh.context, KV_DTYPES[workload.dtype])
        return cls(mesh, workload, weights, plan_memory(part, _streaming(part, capacity)), exchange)

    @property
    def prefill_chunk_size(self) -> int:
        """Tokens of a prefill step on all ranks."""
        return self.plan.prefill_chunk_size

    @property
    def device(self) -> int:
        """Peak bytes on a GPU, the margin included."""
        return self.plan.needed_on_accelerator + MARGIN_BYTES

    @property
    def host(self) -> int:
        """Peak bytes of a rank's host memory, the margin included."""
        return self.plan.needed + MARGIN_BYTES

    @property
    def disk(self) -> int:
        return self.plan.needed_on_disk

    def shortfalls(self, capacity: Capacity) -> dict[str, tuple[int, int]]:
        """The tiers of one rank that are too small, each with the bytes needed and the bytes available."""
        found = {}
        if capacity.accelerator is not None and self.device > capacity.accelerator:
            found[ACCELERATOR] = (self.device, capacity.accelerator)
        if capacity.host is not None and self.host > capacity.host:
            found["host memory"] = (self.host, capacity.host)
        if capacity.kv_host is not None and not capacity.has_disk and self.plan.host_keys_values > capacity.kv_host:
            found["--kv-host-memory"] = (self.plan.host_keys_values, capacity.kv_host)
        return found


def _streaming(workload: Workload, capacity: Capacity) -> Capacity:
    """With a limit for weights on the GPU where it does not hold all: what is left beside everything else there."""
    if capacity.weights_device is not None or capacity.accelerator is None:
        return capacity
    plan = plan_memory(workload, replace(capacity, host=None))
    if plan.needed_on_accelerator + MARGIN_BYTES <= capacity.accelerator:
        return capacity
    least = plan_memory(workload, replace(capacity, host=None, kv_device=0))
    beside = least.needed_on_accelerator - least.weights
    return replace(capacity, weights_device=max(0, capacity.accelerator - MARGIN_BYTES - beside))
