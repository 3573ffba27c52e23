"""Tensor parallelism, applied from outside to a model on the meta device: its layers do not know their rank.

Every rank computes its heads and its part of every feed-forward layer for all tokens; the parts are summed after
attention and after the feed-forward layer. Embeddings are looked up where they are and summed, logits are gathered.
What a rank holds is said in `model.division`, who calls the model in `l4ctx.run.ranks`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.attention import Step
from model.config import TextConfig
from model.context_attention import ContextExchange
from model.context_division import ContextRank
from model.context_parallel import ContextTransformer
from model.division import TensorRank, divided
from model.errors import RankLostError
from model.layers import Embedding, Linear, looked_up
from model.moe import MoE
from model.programs import Programs
from model.transformer import Transformer


class Exchange(Protocol):
    """What the ranks tell one another; every rank calls the same in the same order."""

    rank: TensorRank

    def summed(self, x: Tensor) -> Tensor:
        """The sum over all ranks, the same bits on each; x may be overwritten."""
        ...

    def gathered(self, x: Tensor, total: int) -> Tensor:
        """x (..., N_i) of each rank -> (..., total), joined in the order of ranks; N_i is `rank.part(total)`."""
        ...

    def from_first(self, x: Tensor) -> Tensor:
        """Rank 0's x, on every rank; elsewhere x is overwritten."""
        ...


class GroupExchange:
    """By a process group of torch.distributed, with sums in float32. Raises RankLostError when another rank ends."""

    def __init__(self, rank: TensorRank, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self._group = rank, group

    def summed(self, x: Tensor) -> Tensor:
        wide = x.float().contiguous()
        with _losses():
            dist.all_reduce(wide, group=self._group)
        return wide.to(x.dtype)

    def gathered(self, x: Tensor, total: int) -> Tensor:
        widest = -(-total // self.rank.count)
        padded = x.new_zeros(*x.shape[:-1], widest)
        padded[..., : x.shape[-1]] = x
        found = [torch.empty_like(padded) for _ in range(self.rank.count)]
        with _losses():
            dist.all_gather(found, padded, group=self._group)
        sizes = [len(TensorRank(number, self.rank.count).part(total)) for number in range(self.rank.count)]
        return torch.cat([part[..., :size] for part, size in zip(found, sizes, strict=True)], -1)

    def from_first(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        with _losses():
            dist.broadcast(x, group_src=0, group=self._group)
        return x

    def to_first(self, x: Tensor, into: Sequence[Tensor] | None = None) -> None:
        """Every rank's x, all of one shape, into the tensors that the first rank gives; x is contiguous."""
        with _losses():
            dist.gather(x, None if into is None else list(into), group=self._group, group_dst=0)


class GroupContextExchange:
    """The exchange of context ranks by a process group. Raises RankLostError when another rank ends."""

    def __init__(self, rank: ContextRank, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self._group = rank, group

    def from_rank(self, x: Tensor, number: int) -> Tensor:
        x = x.contiguous()
        with _losses():
            dist.broadcast(x, group_src=number, group=self._group)
        return x

    def returned(self, parts: Sequence[Tensor]) -> list[Tensor]:
        own, count = parts[self.rank.number], self.rank.count
        found = own.new_empty(count * own.numel())
        sent = torch.cat([part.flatten() for part in parts])
        sizes = [part.numel() for part in parts]
        with _losses():
            dist.all_to_all_single(found, sent, [own.numel()] * count, sizes, group=self._group)
        return [part.view(own.shape) for part in found.chunk(count)]


def mesh_exchanges(
    tensor: int, context: int, timeout: timedelta | None = None
) -> tuple[GroupExchange, GroupContextExchange]:
    """This process's exchanges in a mesh of context x tensor ranks; further processes of the group are copies of it.

    Tensor ranks are the inner axis, since they talk most. Every process calls it, since each takes part in making all
    groups (a DeviceMesh would make them without `timeout`).
    """
    size, number = tensor * context, dist.get_rank()
    rows = [range(start, start + tensor) for start in range(0, dist.get_world_size(), tensor)]
    columns = [
        range(start + place, start + size, tensor)
        for start in range(0, dist.get_world_size(), size)
        for place in range(tensor)
    ]
    groups = [
        next(group for ranks, group in [(x, dist.new_group(list(x), timeout)) for x in axis] if number in ranks)
        for axis in (rows, columns)
    ]
    return (
        GroupExchange(TensorRank(number % tensor, tensor), groups[0]),
        GroupContextExchange(ContextRank(number % size // tensor, context), groups[1]),
    )


@contextmanager
def _losses() -> Iterator[None]:
    """Turns a collective that failed, as its peers are gone, into RankLostError."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split("]")[-1].split())
        raise RankLostError(f"another rank has ended, so all ranks end ({reason[:120]})") from None


class DividedEmbedding(Embedding):
    """One rank's rows of the embeddings; `look_up` takes any token."""

    def __init__(self, config: TextConfig, exchange: Exchange) -> None:
        self.here = exchange.rank.part(config.vocab_size)
        super().__init__(len(self.here), config.hidden_size)
        self._exchange = exchange

    def look_up(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Token ids (...) -> embeddings (..., C) in this dtype, a new tensor."""
        is_here = (ids >= self.here.start) & (ids < self.here.stop)
        own = looked_up((ids - self.here.start).where(is_here, 0), self.weight, dtype)
        return self._exchange.summed(own.masked_fill_(~is_here[..., None], 0))


class _NoPrograms(Programs):
    """A program computes a layer as a whole, without a sum over ranks in it."""

    def begin(self, config: TextConfig, dtype: torch.dtype, step: Step, x: Tensor) -> bool:
        return False


def divided_model(
    config: TextConfig, attention: str, exchange: Exchange, context: ContextExchange | None = None
) -> Transformer:
    """One rank's model on the meta device, which computes the whole model's logits, the same bits on every rank.

    `config` is the whole model's; `model.config` will be this rank's. In a mesh, `exchange` is with the ranks that have
    the same tokens, `context` with those that have the same part of the model. Raises DivisionError.
    """
    own = divided(config, exchange.rank)
    with torch.device("meta"):
        model = Transformer(own, attention) if context is None else ContextTransformer(own, attention, context)
        model.model.embed_tokens = DividedEmbedding(config, exchange)
        model.lm_head = Linear(config.hidden_size, len(exchange.rank.part(config.vocab_size)), bias=False)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.programs, model.steps = _NoPrograms(), None

    def total(module: nn.Module, arguments: Any, out: Tensor | None) -> Tensor | None:
        return None if out is None else exchange.summed(out)

    for layer in model.model.layers:
        attended: Any = layer.self_attn
        if exchange.rank.number:
            attended.o_proj.bias = None  # added once
        attended.register_forward_hook(total)
        forward: Any = layer.feed_forward
        forward.register_forward_hook(total)
        if isinstance(forward, MoE):  # a token whose experts differed between ranks would be wrong
            forward.router.register_forward_hook(lambda module, arguments, out: exchange.from_first(out))
    model.lm_head.register_forward_hook(lambda module, arguments, out: exchange.gathered(out, config.vocab_size))
    return model
