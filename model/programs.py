"""Decoder layers and the output matrix as programs of vector code, for a few tokens on a CPU.

A step is then two calls a layer besides attention, instead of some seventy operations. What PyTorch's path rounds to
the model's dtype after every operation stays float32 here, but for queries, keys, values and logits.
Tokens that are computed together do not change each other's results. Where something has no code, PyTorch computes the
layer: see `model.transformer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from model.attention import Attention, Step
from model.config import TextConfig
from model.kernels.attend import KVSegment
from model.layers import Linear, RMSNorm
from model.moe import MLP, FusedExperts, MoE, SplitExperts
from model.quantization.form import StoredMatrix, Weight
from model.simd.products import FEW_ROWS, Operand, has_code, plain_operand
from model.simd.program import Program
from model.simd.recorder import Heads, NoCodeError, Recorder, require
from model.simd.words import OUTPUT, SUMS


class Layer(Protocol):
    """A decoder layer's parts."""

    input_layernorm: RMSNorm
    self_attn: Attention
    post_attention_layernorm: RMSNorm
    feed_forward: nn.Module


class Views(NamedTuple):
    """The buffers as B sequences of T tokens."""

    residual: Tensor  # (B, T, C)
    attended: Tensor  # (B, H, T, D)
    queries: Tensor
    keys: Tensor  # (B, H_kv, T, D)
    values: Tensor

    def hold(self, x: Tensor) -> None:
        """Takes x (B, T, C) as the residual, unless it is."""
        if x is not self.residual:
            self.residual.copy_(x)


class Buffers:
    """What all programs of a model work on: FEW_ROWS rows each, float32 but for what attention gets."""

    def __init__(self, config: TextConfig, dtype: torch.dtype) -> None:
        c, d, pairs = config.hidden_size, config.head_dim, FEW_ROWS * config.num_experts_per_tok
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.residual, self.normed = torch.zeros(FEW_ROWS, c), torch.zeros(FEW_ROWS, c)
        self.projected = torch.zeros(FEW_ROWS, (heads + 2 * kv_heads) * d)
        self.queries = torch.zeros(FEW_ROWS, heads, d, dtype=dtype)
        self.keys = torch.zeros(FEW_ROWS, kv_heads, d, dtype=dtype)
        self.values = torch.zeros(FEW_ROWS, kv_heads, d, dtype=dtype)
        self.rotation, self.temperature = torch.zeros(FEW_ROWS, d), torch.zeros(FEW_ROWS)
        self.attended = torch.zeros(FEW_ROWS, heads * d)
        self.gate_up = torch.zeros(FEW_ROWS, 2 * max(config.intermediate_size, config.intermediate_size_mlp))
        self.logits = torch.zeros(FEW_ROWS, config.num_local_experts)
        self.scores = torch.zeros(pairs)
        self.pairs = torch.zeros(pairs, 2 * config.intermediate_size)
        self.sums = torch.zeros(pairs, c)
        self._views: dict[tuple[int, int], Views] = {}

    def views(self, batch: int, tokens: int) -> Views:
        """Of the first batch * tokens rows."""
        found = self._views.get((batch, tokens))
        if found is None:
            attended = self.attended.view(self.queries.shape)
            heads = (attended, self.queries, self.keys, self.values)
            parts = (x[: batch * tokens].unflatten(0, (batch, tokens)) for x in (self.residual, *heads))
            residual, *others = parts
            found = Views(residual, *(x.transpose(1, 2) for x in others))
            self._views[batch, tokens] = found
        return found


class LayerProgram:
    """One decoder layer. Raises NoCodeError."""

    def __init__(self, layer: Layer, buffers: Buffers) -> None:
        self._attention, self._buffers = layer.self_attn, buffers
        self._before, self._after = _before_attention(layer, buffers), _after_attention(layer, buffers)

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """x (B, T, C) -> (B, step.num_queries, C), float32 in a buffer; otherwise like the layer's forward."""
        batch, tokens, _ = x.shape
        here = self._buffers.views(batch, tokens)
        here.hold(x)
        self._before.run(batch * tokens)
        keys, values = here.keys, here.values
        if batch * tokens > 1:  # of several tokens a cache may hold some until the next layer's come
            keys, values = keys.clone(), values.clone()
        self._attention.store(keys, values, step)
        wanted = step.num_queries
        if not wanted:
            return x[:, :0]
        queries = here.queries if wanted == tokens else here.queries[:, :, step.wanted]
        attended = self._attention.attended(queries, step, KVSegment(keys, values, 0))
        if wanted != tokens:
            x = here.residual[:, step.wanted].clone()
            here = self._buffers.views(batch, wanted)
            here.hold(x)
        here.attended.copy_(attended)
        self._after.run(batch * wanted)
        return here.residual


class HeadProgram:
    """The last norm and the output matrix. Raises NoCodeError."""

    def __init__(self, norm: RMSNorm, lm_head: Linear, buffers: Buffers) -> None:
        recorder = Recorder()
        recorder.norm(buffers.residual, norm.weight, norm.eps, buffers.normed)
        nothing = torch.empty(1, lm_head.out_features)
        recorder.product(_operand(lm_head.weight), buffers.normed, nothing)
        self._program, self._buffers, self._vocabulary = recorder.program(), buffers, lm_head.out_features

    def __call__(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> logits (B, T, V), a new tensor in the model's dtype."""
        batch, tokens, _ = x.shape
        self._buffers.views(batch, tokens).hold(x)
        out = torch.empty(batch, tokens, self._vocabulary)
        for place in (OUTPUT, SUMS):
            self._program.set_argument(1, place, out.data_ptr())
        self._program.run(batch * tokens)
        return out.to(self._buffers.queries.dtype)


def _before_attention(layer: Layer, buffers: Buffers) -> Program:
    """Norm, projections of queries, keys and values, and what is done to their heads."""
    recorder, attention = Recorder(), layer.self_attn
    norm = layer.input_layernorm
    recorder.norm(buffers.residual, norm.weight, norm.eps, buffers.normed)
    rotation = buffers.rotation if attention.uses_rope else None
    temperature = buffers.temperature if attention.tunes_temperature else None
    parts = (
        (attention.q_proj, buffers.queries, Heads(rotation, attention.qk_norm_eps, temperature)),
        (attention.k_proj, buffers.keys, Heads(rotation, attention.qk_norm_eps)),
        (attention.v_proj, buffers.values, Heads()),
    )
    columns = buffers.projected.split([linear.out_features for linear, _, _ in parts], 1)
    for number, ((linear, _, _), out) in enumerate(zip(parts, columns, strict=True)):
        _linear(recorder, linear, buffers.normed, out, waits=number == 0)
    for number, ((_, heads, what), x) in enumerate(zip(parts, columns, strict=True)):
        recorder.heads(x, heads, what, waits=number == 0)
    return recorder.program()


def _after_attention(layer: Layer, buffers: Buffers) -> Program:
    """The output projection, and the feed-forward layer with its norm."""
    recorder, norm, forward = Recorder(), layer.post_attention_layernorm, layer.feed_forward
    _linear(recorder, layer.self_attn.o_proj, buffers.attended, buffers.residual, sums=buffers.sums)
    recorder.norm(buffers.residual, norm.weight, norm.eps, buffers.normed)
    if isinstance(forward, MLP):
        gate, up = _gate_and_up(recorder, forward, buffers)
        recorder.gated(gate, up)
        _linear(recorder, forward.down_proj, gate, buffers.residual, sums=buffers.sums)
    else:
        require(isinstance(forward, MoE))
        _mixture(recorder, forward, buffers)
    return recorder.program()


def _mixture(recorder: Recorder, moe: Any, buffers: Buffers) -> None:
    """The shared expert runs beside the choice of the routed ones."""
    shared, top_k, size = moe.shared_expert, moe.top_k, moe.shared_expert.gate_proj.out_features
    *inner, down = zip(*_expert_operands(moe), strict=True)
    outs = [buffers.pairs] if len(inner) == 1 else list(buffers.pairs[:, : 2 * size].split(size, 1))
    pairs, gate = len(buffers.scores), buffers.pairs[:, :size]
    first = [recorder.slots(operands, buffers.normed, out, pairs) for operands, out in zip(inner, outs, strict=True)]
    last = recorder.slots(down, gate, buffers.residual, pairs, buffers.sums)

    _linear(recorder, moe.router, buffers.normed, buffers.logits)
    gate_shared, up_shared = _gate_and_up(recorder, shared, buffers, waits=False)
    recorder.choice(buffers.logits, top_k, buffers.scores, [*first, last])
    recorder.gated(gate_shared, up_shared, waits=False)
    for number, slots in enumerate(first):
        recorder.each(slots, top_k, waits=number == 0)
    _linear(recorder, shared.down_proj, gate_shared, buffers.residual, sums=buffers.sums, waits=False)
    recorder.gated(gate, buffers.pairs[:, size : 2 * size], buffers.scores)
    recorder.each(last, top_k)


def _gate_and_up(recorder: Recorder, mlp: MLP, buffers: Buffers, *, waits: bool = True) -> tuple[Tensor, Tensor]:
    """Both products of `normed`."""
    size = mlp.gate_proj.out_features
    gate, up = buffers.gate_up[:, :size], buffers.gate_up[:, size : 2 * size]
    _linear(recorder, mlp.gate_proj, buffers.normed, gate, waits=waits)
    _linear(recorder, mlp.up_proj, buffers.normed, up, waits=False)
    return gate, up


def _linear(recorder: Recorder, linear: Linear, x: Tensor, out: Tensor, **options: Any) -> None:
    recorder.product(_operand(linear.weight), x, out, bias=linear.bias, **options)


def _expert_operands(moe: MoE) -> Iterator[list[Operand]]:
    """Of each expert: gate and up, apart or joined in this order; down."""
    experts = moe.experts
    if isinstance(experts, FusedExperts):
        for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
            yield [_operand(gate_up.t()), _operand(down.t())]
    elif isinstance(experts, SplitExperts):
        for expert in experts.experts:
            names = ("gate_up", "down") if expert.is_joined else ("gate", "up", "down")
            yield [_operand(getattr(expert, name)) for name in names]
    else:
        raise NoCodeError


def _operand(weight: Weight) -> Operand:
    operand = weight.operand() if isinstance(weight, StoredMatrix) else plain_operand(weight)
    if operand is None or operand.shape != weight.shape or not has_code(operand):
        raise NoCodeError
    return operand


class Programs:
    """The programs of one model, each recorded when it is first wanted, and anew where weights have moved.

    A layer without one is asked again only when its weights have moved. They share buffers: a model computes one
    forward at a time.
    """

    def __init__(self) -> None:
        self._buffers: Buffers | None = None
        self._recorded: dict[int, tuple[Any, Any]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Programs:
        return Programs()

    def __reduce__(self) -> tuple[type[Programs], tuple[()]]:
        return Programs, ()

    def begin(self, config: TextConfig, dtype: torch.dtype, step: Step, x: Tensor) -> bool:
        """Whether programs can compute the tokens x (B, T, C); takes what is the same for all layers."""
        batch, tokens, _ = x.shape
        if batch * tokens > FEW_ROWS or x.device.type != "cpu":
            return False
        if self._buffers is None or self._buffers.queries.dtype != dtype:
            self._buffers, self._recorded = Buffers(config, dtype), {}
        buffers, rows = self._buffers, batch * tokens
        rotation = torch.view_as_real(step.rotation).flatten(1)
        buffers.rotation[:rows].view(batch, tokens, -1).copy_(rotation)
        if step.temperature is not None:
            buffers.temperature[:rows].view(batch, tokens).copy_(step.temperature)
        return True

    def layer(self, number: int, layer: Any) -> Callable[[Tensor, Step], Tensor] | None:
        return self._program(number, layer, lambda buffers: LayerProgram(layer, buffers))

    def head(self, norm: RMSNorm, lm_head: Linear) -> Callable[[Tensor], Tensor] | None:
        return self._program(-1, lm_head, lambda buffers: HeadProgram(norm, lm_head, buffers), norm)

    def _program(self, number: int, module: nn.Module, record: Callable[[Buffers], Any], *others: nn.Module) -> Any:
        assert self._buffers is not None
        found = self._recorded.get(number)
        if found is not None and found[0].is_current():
            return found[1]
        weights = Weights.of(module, *others)
        try:
            program = record(self._buffers)
        except NoCodeError:
            program = None
        self._recorded[number] = weights, program
        return program


class Weights(NamedTuple):
    """Where parameters of modules were. Stored matrices count how often their tensors are replaced."""

    places: list[tuple[dict[str, Any], str]]
    addresses: list[int]
    replaced: int

    @classmethod
    def of(cls, *modules: nn.Module) -> Weights:
        places = [
            (part._parameters, name)
            for module in modules
            for part in module.modules()
            for name, tensor in part._parameters.items()
            if tensor is not None
        ]
        return cls(places, _addresses(places), StoredMatrix.replaced)

    def is_current(self) -> bool:
        return self.replaced == StoredMatrix.replaced and self.addresses == _addresses(self.places)


def _addresses(places: list[tuple[dict[str, Any], str]]) -> list[int]:
    try:
        return [tensors[name].data_ptr() for tensors, name in places]
    except (KeyError, AttributeError):  # a parameter that has become something else
        return []
