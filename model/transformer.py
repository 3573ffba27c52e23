"""Llama 4's text model: embeddings, decoder layers, final norm, logits. Parameter names equal the checkpoint's.

For inference only. A forward over the whole sequence without a cache and any split of it into forwards with one agree.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from model.attention import Attention, KVCache, Step
from model.config import TextConfig
from model.gpu.steps import RecordedSteps
from model.kernels.registry import backend
from model.kernels.watch import Observer
from model.layers import Embedding, Linear, RMSNorm
from model.moe import MLP, MoE
from model.programs import Programs
from model.spread import Spread, current
from model.transfers import to_device

Wanted: TypeAlias = Literal["all", "last", "none"]
"""Tokens of each sequence whose logits are wanted."""


class LayerWatcher(Protocol):
    """Is told which layer computes, for how many tokens: weights that memory does not hold are read ahead."""

    @property
    def moves_weights(self) -> bool:
        """Whether weights change their places from layer to layer."""
        ...

    def entering(self, layer: int, tokens: int) -> None: ...

    def leaving(self, layer: int, tokens: int) -> None: ...


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward: nn.Module = (
            MoE(config) if config.is_moe(layer) else MLP(config.hidden_size, config.intermediate_size_mlp)
        )

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x (B, T, C) -> (B, step.num_queries, C). Keys and values are stored for all T tokens."""
        attended = self.self_attn(self.input_layernorm(x), step)
        if attended is None:
            return x[:, :0]
        x = x[:, step.wanted] + attended
        return x.add_(self.feed_forward(self.post_attention_layernorm(x)))


class Trunk(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """The text model; `attention` is a backend's name, one of model.config.BACKEND_NAMES."""

    def __init__(self, config: TextConfig, attention: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.backend = backend(attention)
        self.watcher: LayerWatcher | None = None
        self.programs = Programs()
        self.steps: RecordedSteps | None = RecordedSteps()
        self._spread: Spread | None = None
        self.model = Trunk(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def spread(self) -> Spread | None:
        """Where its layers are on several devices; the weights are put there by whoever sets it."""
        return self._spread

    @spread.setter
    def spread(self, spread: Spread | None) -> None:
        self._spread = spread
        self.steps = RecordedSteps() if spread is None else None  # a graph is of one device

    @property
    def device(self) -> torch.device:
        """Of what it is given."""
        return self.model.norm.weight.device if self.spread is None else self.spread.first

    @property
    def last_device(self) -> torch.device:
        """Where a forward ends that wants no logits."""
        return self.device if self.spread is None else self.spread.last

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in their stored forms; tied ones count once."""
        return sum(tensor.nbytes for part in (self.parameters(), self.buffers()) for tensor in part)

    @torch.inference_mode()
    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) -> embeddings (B, T, C), a new tensor that may be modified in place."""
        with contextlib.nullcontext() if self.spread is None else current(self.spread.first):
            return self.model.embed_tokens.look_up(ids, self.dtype)

    @torch.inference_mode()
    def forward(
        self,
        inputs: Tensor,
        cache: KVCache | None = None,
        logits: Wanted = "all",
        observer: Observer | None = None,
    ) -> Tensor | None:
        """Token ids (B, T), or embeddings (B, T, C), -> logits (B, T, V), (B, 1, V), or None.

        Without a cache the sequence starts at position 0. With one, the new tokens start at its `offset` and are
        committed at the end; a forward that fails leaves the cache as it was. In the last layer, queries and the
        feed-forward are computed only for positions whose logits are requested. `observer`, of one row, is told what
        the queries attend to in the NoPE layers. Raises LengthError.
        """
        counts = [inputs.shape[1]]
        if self.steps is not None and observer is None and logits != "none" and not inputs.is_floating_point():
            recorded = self.steps.run(self, inputs, cache)
            if recorded is not None:
                return recorded if logits == "all" else recorded[:, -1:]
        step = Step.at(self.config, counts, self.backend, [cache], self.device, [observer])
        wanted = wanted_tokens(logits, counts)
        found = self._run(inputs, step, wanted)
        step.commit()
        return found

    @torch.inference_mode()
    def forward_ragged(
        self,
        ids: Sequence[Sequence[int]],
        caches: Sequence[KVCache],
        logits: Wanted | Sequence[int] = "all",
        observers: Sequence[Observer | None] | None = None,
    ) -> list[Tensor] | None:
        """New token ids of several sequences, T_i of the i-th, each with a cache of its own and at its own position.

        `logits` may say of how many last tokens of each sequence they are wanted. Returns logits (T_i, V), (1, V) or
        of as many of each, or None if none are. Linear layers and experts see all tokens at once, and keys and values
        that the caches share are read once: a step costs little more than that of one sequence. `observers`: as in
        `forward`, one for each sequence or None. Raises LengthError.
        """
        joined = to_device(torch.tensor([[token for some in ids for token in some]]), self.device)
        counts = [len(some) for some in ids]
        step = Step.at(self.config, counts, self.backend, caches, self.device, observers)
        wanted = wanted_tokens(logits, counts)
        found = self._run(joined, step, wanted)
        step.commit()
        return None if found is None else list(found[0].split(wanted))

    @torch.inference_mode()
    def states(self, inputs: Tensor, cache: KVCache | None = None) -> Tensor:
        """As `forward`, up to what the head multiplies, (B, T, C): `logits_of` a few of these tokens at a time needs no
        memory for the logits of all. Raises LengthError."""
        counts = [inputs.shape[1]]
        step = Step.at(self.config, counts, self.backend, [cache], self.device)
        x, _ = self._through_layers(inputs, step, counts)
        step.commit()
        with self._at_head() as head:
            return self.model.norm(x.to(head, self.dtype))

    @torch.inference_mode()
    def logits_of(self, states: Tensor) -> Tensor:
        """(..., C) -> (..., V)."""
        with self._at_head():
            return self.lm_head(states)

    def _run(self, inputs: Tensor, step: Step, wanted: Sequence[int]) -> Tensor | None:
        x, has_programs = self._through_layers(inputs, step, wanted)
        if not any(wanted):
            return None
        program = self.programs.head(self.model.norm, self.lm_head) if has_programs else None
        if program is not None:
            return program(x)
        with self._at_head() as head:
            return self.lm_head(self.model.norm(x.to(head, self.dtype)))

    def _through_layers(self, inputs: Tensor, step: Step, wanted: Sequence[int]) -> tuple[Tensor, bool]:
        """Token ids (B, T), or embeddings (B, T, C) -> (B, T, C), and whether `programs` computed what they can.

        Ids are looked up here: a caller's stack may keep arguments alive, as it does once torch.compile is in use, and
        each layer is to free its input.
        """
        x = inputs if inputs.is_floating_point() else self.embed(inputs)
        has_programs = self.programs.begin(self.config, self.dtype, step, x)
        last, tokens = len(self.model.layers) - 1, x.shape[0] * x.shape[1]
        for number, layer in enumerate(self.model.layers):
            if self.watcher is not None:
                self.watcher.entering(number, tokens)
            if self.spread is not None and self.spread.begins(number):
                x, step = x.to(self.spread.layers[number]), step.on(self.spread.layers[number])
            here = step.narrowed(wanted) if number == last else step
            program = self.programs.layer(number, layer) if has_programs else None
            with contextlib.nullcontext() if self.spread is None else self.spread.computing(number):
                x = layer(x.to(self.dtype), here) if program is None else program(x, here)
            if self.watcher is not None:
                self.watcher.leaving(number, tokens)
        return x, has_programs

    @contextlib.contextmanager
    def _at_head(self) -> Iterator[torch.device]:
        """The device of norm and output matrix."""
        if self.spread is None:
            yield self.device
            return
        with current(self.spread.head):
            yield self.spread.head


def wanted_tokens(logits: Wanted | Sequence[int], counts: Sequence[int]) -> list[int]:
    """Of how many last tokens of each sequence logits are wanted."""
    if isinstance(logits, str):
        return [{"all": count, "last": 1, "none": 0}[logits] for count in counts]
    return list(logits)
