"""How the text model is divided over ranks: tensor parallelism in closed form.

Each rank holds whole attention heads, with the KV heads that they read, and an equal part of the inner dimension of
every feed-forward layer and expert (https://arxiv.org/abs/1909.08053); embeddings and output matrix are divided by
vocabulary; norms and routers are held by all. So a rank computes with a configuration of its own, and nothing in it
knows its rank. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from model.config import TextConfig
from model.errors import DivisionError
from model.weights.expert_parts import ExpertPart

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
_ROWS, _COLUMNS = ("gate_proj", "up_proj"), ("down_proj",)


@dataclass(frozen=True)
class TensorRank:
    """One of the ranks that share every layer. In a mesh of tensor and context ranks this is the inner axis."""

    number: int
    count: int

    def part(self, total: int) -> range:
        """This rank's part of 0 .. total - 1; parts differ by at most one."""
        return range(total * self.number // self.count, total * (self.number + 1) // self.count)


@dataclass(frozen=True)
class Division:
    """The rows (C_out) or columns (C_in) of a matrix that a rank holds, in this order."""

    is_rows: bool
    parts: tuple[range, ...]

    @property
    def size(self) -> int:
        return sum(map(len, self.parts))


def divided(config: TextConfig, rank: TensorRank) -> TextConfig:
    """The configuration of one rank's part; the vocabulary is still the whole one. Raises DivisionError."""
    count = rank.count
    _check(config, count)
    return replace(
        config,
        num_attention_heads=config.num_attention_heads // count,
        num_key_value_heads=max(1, config.num_key_value_heads // count),
        intermediate_size=max(1, config.intermediate_size // count),
        intermediate_size_mlp=max(1, config.intermediate_size_mlp // count),
    )


def copies_of_kv_heads(config: TextConfig, count: int) -> int:
    """How many of `count` ranks hold the same keys and values: 1 unless there are fewer KV heads than ranks."""
    return max(1, count // config.num_key_value_heads)


def exchange_bytes(config: TextConfig, tokens: int, itemsize: int, count: int) -> int:
    """Peak memory of one of `count` ranks in a forward of `tokens` tokens where it does not follow from its part of the
    inner sizes, in bytes, beside weights and KV cache.

    A norm and a sum over the ranks take the whole hidden size: the residual stream, its norm, this rank's part of a
    layer and the sum, and up to three copies in float32. Gathering the logits of one token takes this rank's part,
    every rank's as they come, and all of them joined, in float32.
    """
    part = -(-config.vocab_size // count)
    logits = 4 * (2 * part + count * part + config.vocab_size)
    return max(tokens * config.hidden_size * (4 * itemsize + 3 * 4), logits)


def kv_heads(config: TextConfig, rank: TensorRank) -> range:
    """Those that a rank holds; `config` is the whole model's."""
    copies = copies_of_kv_heads(config, rank.count)
    return TensorRank(rank.number // copies, rank.count // copies).part(config.num_key_value_heads)


def division_of(name: str, config: TextConfig, rank: TensorRank) -> Division | None:
    """What a rank holds of a weight, by its name in Transformer; None: all of it. Biases count as rows.

    The bias of o_proj is no exception: it is held by all, and `model.parallel` adds it on one rank alone.
    """
    if name in VOCABULARY:
        return Division(True, (rank.part(config.vocab_size),))
    path, _, parameter = name.rpartition(".")
    module = path.rpartition(".")[2]
    if ".self_attn." in name:
        if module == "o_proj":
            return Division(False, (_heads(config, rank),)) if parameter == "weight" else None
        return Division(True, (_heads(config, rank) if module == "q_proj" else _kv_heads(config, rank),))
    part = ExpertPart.of(name)
    if part is not None:
        return _of_experts(part.kind, config.intermediate_size, rank)
    size = config.intermediate_size if ".shared_expert." in name else config.intermediate_size_mlp
    if module in (*_ROWS, *_COLUMNS) and ".feed_forward." in name:
        return Division(module in _ROWS, (rank.part(size),))
    return None


def _of_experts(kind: str, size: int, rank: TensorRank) -> Division:
    here = rank.part(size)
    if kind == "gate_up":
        return Division(True, (here, range(size + here.start, size + here.stop)))
    return Division(kind != "down", (here,))


def _heads(config: TextConfig, rank: TensorRank) -> range:
    """Rows of the queries."""
    return rank.part(config.num_attention_heads * config.head_dim)


def _kv_heads(config: TextConfig, rank: TensorRank) -> range:
    """Rows of the keys and values that this rank's queries read."""
    heads = kv_heads(config, rank)
    return range(heads.start * config.head_dim, heads.stop * config.head_dim)


def _check(config: TextConfig, count: int) -> None:
    is_dense = len(config.moe_layers) < config.num_hidden_layers
    for name, is_used in (
        ("num_attention_heads", True),
        ("intermediate_size", bool(config.moe_layers)),
        ("intermediate_size_mlp", is_dense),
    ):
        size = getattr(config, name)
        if is_used and size % count:
            raise DivisionError(f"{count} ranks: {name} {size} cannot be divided by {count}; start another number")
    kv_heads = config.num_key_value_heads
    if kv_heads % count and count % kv_heads:
        raise DivisionError(
            f"{count} ranks: num_key_value_heads {kv_heads} is neither a multiple nor a divisor of {count}; "
            "start another number"
        )
