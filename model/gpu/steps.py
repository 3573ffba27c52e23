"""Steps of a few tokens on a GPU as recorded CUDA graphs: the host launches once instead of eighty times a layer.

What changes from step to step lies in device memory: token ids, the position, and the addresses of keys and values. A
graph is recorded for each number of tokens when it comes up for the second time. Results of a token do not depend on
how many are computed with it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model.gpu.available import has_triton
from model.gpu.layer_forms import LayerForms, form_of, layer_forms
from model.gpu.support import MAX_TOKENS, LayerPages, Pages, has_kernels
from model.rope import phases
from model.transfers import to_device

if TYPE_CHECKING:
    from model.attention import KVCache


class RecordedSteps:
    """Those of one model."""

    def __init__(self) -> None:
        self._steps: Steps | None = None
        self._refused: tuple[int, ...] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> RecordedSteps:
        return RecordedSteps()

    def __reduce__(self) -> tuple[type[RecordedSteps], tuple[()]]:
        return RecordedSteps, ()

    def run(self, model: Any, ids: Tensor, cache: KVCache | None) -> Tensor | None:
        """Token ids (1, T) -> logits (1, T, V), and the tokens are committed to the cache; None if the model's ordinary
        forward has to do it."""
        tokens = ids.shape[1]
        if cache is None or ids.shape[0] > 1 or tokens > MAX_TOKENS or not has_triton(ids.device):
            return None
        if model.watcher is not None and model.watcher.moves_weights:
            return None
        weights = _addresses(model)
        if self._refused == weights:
            return None
        pages = cache.reserve(tokens)  # not before: it takes time at each token
        if pages is None:
            return None
        if self._steps is None or not self._steps.serves(weights, cache.length):
            forms = _forms(model)
            if forms is None:
                self._steps, self._refused = None, weights
                return None
            self._steps = Steps(model, forms, weights, cache.length, pages)
        logits = self._steps.run(ids, cache.offset, pages)
        cache.advance(tokens)
        return logits


def _forms(model: Any) -> list[LayerForms] | None:
    """How the kernels read the layers' weights; None unless they can read all."""
    embeddings = model.model.embed_tokens.weight  # others are looked up by operations that may wait
    if not has_kernels(model) or form_of(model.lm_head.weight) is None or not isinstance(embeddings, Tensor):
        return None
    forms = [layer_forms(layer) for layer in model.model.layers]
    known = [form for form in forms if form is not None]
    return known if len(known) == len(forms) else None


def _addresses(model: Any) -> tuple[int, ...]:
    """Of some weights of every layer: where one has moved, the others may have."""
    trunk = model.model
    others = (trunk.embed_tokens.weight, trunk.norm.weight, model.lm_head.weight)
    return tuple(
        x.data_ptr() if isinstance(x, Tensor) else id(x)
        for x in (*others, *(layer.self_attn.q_proj.weight for layer in trunk.layers))
    )


class Steps:
    """Buffers and graphs for caches of one length."""

    def __init__(
        self, model: Any, forms: list[LayerForms], weights: tuple[int, ...], length: int, pages: Pages
    ) -> None:
        from model.gpu.layers import Buffers  # here: it imports Triton

        self._model, self._forms, self._weights, self._length = model, forms, weights, length
        page_tokens = [layer.page_tokens for layer in pages.layers]
        self._buffers = Buffers(model.config, model.dtype, model.device, page_tokens, length)
        self._buffers.experts = [torch.tensor(form.addresses, device=model.device) for form in forms]
        self._buffers.phases.copy_(_phase_table(model, length))
        self._graphs: dict[int, tuple[Any, Tensor]] = {}
        self._seen: set[int] = set()
        self._pages: weakref.ref[Pages] | None = None  # those of a cache that is given up are freed

    def serves(self, weights: tuple[int, ...], length: int) -> bool:
        return weights == self._weights and length == self._length

    def run(self, ids: Tensor, offset: int, pages: Pages) -> Tensor:
        """Token ids (1, T) of positions from `offset` on -> logits (1, T, V) in the model's dtype, a new tensor."""
        tokens, buffers = ids.shape[1], self._buffers
        if self._pages is None or self._pages() is not pages:
            self._pages = None
            buffers.table.copy_(to_device(_entries(pages.layers, buffers.table.shape), ids.device), non_blocking=True)
            self._pages = weakref.ref(pages)
        buffers.ids[:tokens].copy_(ids[0])
        buffers.position.fill_(offset)
        recorded = self._graphs.get(tokens)
        if recorded is None and ids.device.type == "cuda" and tokens in self._seen:
            recorded = self._graphs[tokens] = self._record(tokens)
        if recorded is None:
            self._seen.add(tokens)
            return self._compute(tokens).clone()
        graph, logits = recorded
        graph.replay()
        return logits.clone()

    def _record(self, tokens: int) -> tuple[Any, Tensor]:
        """Kernels were compiled when the same number of tokens was computed before."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = self._compute(tokens)
        return graph, logits

    def _compute(self, tokens: int) -> Tensor:
        from model.gpu import layers

        embedded = self._model.model.embed_tokens.look_up(self._buffers.ids[:tokens], self._model.dtype)
        return layers.step(self._model, self._forms, self._buffers, embedded)


def _phase_table(model: Any, length: int) -> Tensor:
    """Cosine and sine for each position of an attention chunk, (chunk, D) float32."""
    config = model.config
    rotations = phases(config, 0, min(config.attention_chunk_size, length), length, model.device)
    return torch.view_as_real(rotations).flatten(1)


def _entries(by_layer: Sequence[LayerPages], shape: torch.Size) -> Tensor:
    """The table (layers, pages, ENTRY) int64 of `model.gpu.kernels`, with zeros behind the last page."""
    table = torch.zeros(shape, dtype=torch.int64)
    for row, layer in zip(table, by_layer, strict=True):
        found = [(keys.data_ptr(), values.data_ptr(), keys.stride(1)) for keys, values in layer.pages]
        row[: len(found)] = torch.tensor(found, dtype=torch.int64)
    return table
