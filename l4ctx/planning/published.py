"""The forms in which Llama 4 is published, and how many bytes a model's weights take in each. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cache.layout import KV_DTYPES
from l4ctx.planning.weights import PLAIN, StoredWeights, WeightBytes
from model.config import TextConfig
from model.costs import kv_size, query_size
from model.quantization.choice import CHANNEL, SCALE_BYTES, Quantization
from model.quantization.gguf_types import BY_NAME
from model.weights.owners import Owner


@dataclass(frozen=True)
class Matrix:
    """Weights of one kind in one layer: `count` matrices (rows, columns); vectors have one row."""

    owner: Owner
    name: str  # of its module in the checkpoint, without the layer's
    layer: int | None  # None: outside of the layers
    rows: int
    columns: int
    count: int = 1

    @property
    def parameters(self) -> int:
        return self.rows * self.columns * self.count

    @property
    def is_feed_forward(self) -> bool:
        return self.owner in (Owner.ROUTED, Owner.SHARED, Owner.DENSE)

    @property
    def is_vector(self) -> bool:
        return self.rows == 1


class StoredType:
    """What a matrix is stored as: its name, and bytes a weight, with scales and the like."""

    def __init__(self, name: str, bytes_a_weight: float | None = None, bytes_a_row: int = 0) -> None:
        self.name = name
        self.bytes_a_weight = _bytes_a_weight(name) if bytes_a_weight is None else bytes_a_weight
        self.bytes_a_row = bytes_a_row

    def num_bytes(self, matrix: Matrix) -> int:
        return round(matrix.parameters * self.bytes_a_weight) + matrix.count * matrix.rows * self.bytes_a_row


def _bytes_a_weight(name: str) -> float:
    """Of a dtype of torch or a type of GGUF."""
    if name in KV_DTYPES:
        return KV_DTYPES[name]
    return BY_NAME[name].block_bytes / BY_NAME[name].block_weights


@dataclass(frozen=True)
class Form:
    """How a checkpoint is published: what each of its matrices is stored as."""

    name: str
    type_of: Callable[[Matrix, TextConfig], StoredType]
    is_made: bool = False  # while the weights are loaded

    def weights(self, config: TextConfig) -> StoredWeights:
        """Those of the text model."""
        parts = []
        for matrix in matrices(config):
            stored = self.type_of(matrix, config)
            parts.append(
                WeightBytes(matrix.owner, stored.name, matrix.parameters, stored.num_bytes(matrix), matrix.layer)
            )
        return StoredWeights.of(config, parts, is_made=self.is_made)


def matrices(config: TextConfig) -> Iterator[Matrix]:
    """All of the text model's weights."""
    c, q, kv = config.hidden_size, query_size(config), kv_size(config)
    yield Matrix(Owner.EMBEDDINGS, "embed_tokens", None, config.vocab_size, c)
    if not config.tie_word_embeddings:
        yield Matrix(Owner.HEAD, "lm_head", None, config.vocab_size, c)
    yield Matrix(Owner.SMALL, "norm", None, 1, c)
    for layer in range(config.num_hidden_layers):
        for name, rows, columns in (("q_proj", q, c), ("k_proj", kv, c), ("v_proj", kv, c), ("o_proj", c, q)):
            yield Matrix(Owner.ATTENTION, name, layer, rows, columns)
            if config.attention_bias:
                yield Matrix(Owner.SMALL, name, layer, 1, rows)
        yield Matrix(Owner.SMALL, "norm", layer, 1, c, count=2)
        if config.is_moe(layer):
            yield Matrix(Owner.SMALL, "router", layer, config.num_local_experts, c)
            yield from _gated(Owner.ROUTED, layer, c, config.intermediate_size, config.num_local_experts)
            yield from _gated(Owner.SHARED, layer, c, config.intermediate_size)
        else:
            yield from _gated(Owner.DENSE, layer, c, config.intermediate_size_mlp)


def _gated(owner: Owner, layer: int, c: int, intermediate: int, count: int = 1) -> Iterator[Matrix]:
    for name in ("gate_proj", "up_proj"):
        yield Matrix(owner, name, layer, intermediate, c, count)
    yield Matrix(owner, "down_proj", layer, c, intermediate, count)


def plain(dtype: str) -> Form:
    """All weights in one dtype."""
    return Form(dtype, lambda matrix, config: StoredType(dtype))


def _feed_forward(name: str, quantized: StoredType) -> Form:
    """Experts, shared experts and dense layers quantized, as most uploads have it."""
    return Form(name, lambda matrix, _: quantized if matrix.is_feed_forward else StoredType("bfloat16"))


def _fp8(matrix: Matrix, config: TextConfig) -> StoredType:
    """With a scale a row: Scout's experts and shared experts; Meta's own file of Maverick has its routed experts so."""
    is_meta = 0 < len(config.moe_layers) < config.num_hidden_layers
    is_quantized = matrix.owner is Owner.ROUTED if is_meta else matrix.is_feed_forward
    return StoredType("FP8", 1.0, bytes_a_row=2) if is_quantized else StoredType("bfloat16")


def quantizing(quantization: Quantization, form: Form) -> Form:
    """`form` after --quantize: its weights in 16 or 32 bits that are covered, quantized while they are loaded."""

    def type_of(matrix: Matrix, config: TextConfig) -> StoredType:
        stored, size = form.type_of(matrix, config), quantization.group_size(matrix.columns)
        is_covered = matrix.is_feed_forward or (matrix.owner is Owner.ATTENTION and quantization.with_attention)
        if stored.name not in PLAIN or not is_covered or size is None:
            return stored
        if size == CHANNEL:
            return StoredType({"fp8": "FP8"}.get(quantization.kind, quantization.kind), 1.0, bytes_a_row=SCALE_BYTES)
        return StoredType(f"int4 (groups of {size})", 0.5 + SCALE_BYTES / size)

    return Form(f"{form.name}, --quantize {quantization}", type_of, is_made=True)


def mlx_type(bits: int, group: int) -> StoredType:
    """With a scale and a bias of 16 bits a group."""
    return StoredType(f"MLX {bits} bit", bits / 8 + 4 / group)


def mlx(bits: int, group: int) -> Form:
    """All matrices, the router and the embeddings too."""
    quantized = mlx_type(bits, group)
    return Form(quantized.name, lambda matrix, _: StoredType("bfloat16") if matrix.is_vector else quantized)


def _gguf(name: str, main: str, better: Callable[[Matrix, int], str | None] = lambda matrix, layers: None) -> Form:
    """One type for all matrices, but routers and vectors in float32 and the head, and what `better` says, in more."""

    def type_of(matrix: Matrix, config: TextConfig) -> StoredType:
        if matrix.is_vector or matrix.owner is Owner.SMALL:
            return StoredType("float32")
        if matrix.owner is Owner.HEAD and main != "Q8_0":
            return StoredType("Q6_K")
        return StoredType(better(matrix, config.num_hidden_layers) or main)

    return Form(f"GGUF {name}", type_of)


def _has_more_bits(layer: int, layers: int) -> bool:
    """The layers to which llama.cpp's _M mixtures give more bits: the first and last eighth, and each third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _some_in_q6(matrix: Matrix, layers: int) -> str | None:
    is_important = matrix.name in ("v_proj", "down_proj") and matrix.layer is not None
    return "Q6_K" if is_important and _has_more_bits(matrix.layer or 0, layers) else None


def _q3_k_m(matrix: Matrix, layers: int) -> str | None:
    early = {"v_proj": 2, "down_proj": layers // 16}.get(matrix.name, 0)
    if matrix.layer is not None and matrix.layer < early:
        return "Q5_K"
    return "Q4_K" if matrix.name in ("v_proj", "down_proj", "o_proj") else None


def _q2_k(matrix: Matrix, layers: int) -> str | None:
    return {"v_proj": "Q4_K", "down_proj": "Q3_K", "o_proj": "Q3_K"}.get(matrix.name)


PUBLISHED = (
    plain("bfloat16"),
    _gguf("Q8_0", "Q8_0"),
    mlx(8, 64),
    Form("FP8", _fp8),
    _gguf("Q6_K", "Q6_K"),
    mlx(6, 64),
    _gguf("Q5_K_M", "Q5_K", _some_in_q6),
    _feed_forward("NVFP4", StoredType("NVFP4", 0.5 + 1 / 16)),
    _gguf("Q4_K_M", "Q4_K", _some_in_q6),
    _feed_forward("w4a16", StoredType("w4a16 (int4, groups of 128)", 0.5 + 2 / 128)),
    mlx(4, 64),
    _gguf("Q3_K_M", "Q3_K", _q3_k_m),
    _gguf("Q2_K", "Q2_K", _q2_k),
)
"""GGUF mixtures are as llama.cpp makes them without an importance matrix."""
