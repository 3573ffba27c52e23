"""Attention by matrix products at sizes where it is used: as precise as 16 bits allow, whatever the scores look like.

With small blocks it is among the backends of tests/test_backends.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.kernels import matmul as matmul_module
from model.kernels.attend import AttentionState, KVSegment, attend
from model.kernels.masks import AttentionMask
from model.kernels.matmul import KEY_BLOCK, matmul
from model.kernels.sdpa import sdpa

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32
KEYS = 3 * KEY_BLOCK


def exact(q: Tensor, k: Tensor, v: Tensor, positions: range) -> tuple[Tensor, Tensor]:
    """Causal softmax attention in float64; keys start at position 0. Output and log-sum-exp."""
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q.double() @ k.transpose(2, 3) * HEAD_DIM**-0.5
    hidden = torch.arange(positions.start, positions.stop)[:, None] < torch.arange(k.shape[2])
    scores.masked_fill_(hidden, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def tensors(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """bfloat16 queries and keys whose scores are of a certain kind, and values."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, HEADS, 512, HEAD_DIM, generator=generator)
    k, v = torch.randn(2, 1, KV_HEADS, KEYS, HEAD_DIM, generator=generator)
    direction = torch.nn.functional.normalize(torch.ones(HEAD_DIM), dim=0) * HEAD_DIM**0.25
    match kind:
        case "zero":
            q.zero_()
        case "flat" | "normal" | "steep" | "spiky":
            q *= {"flat": 0.1, "normal": 1.0, "steep": 3.0, "spiky": 8.0}[kind]
        case "sink":  # the first key of all has 40 more than any other
            q += 6 * direction
            k[:, :, 0] += 6.5 * direction
        case "needle":  # some key that no sample holds has 18 more
            q += 4 * direction
            k[:, :, 2222] += 4.5 * direction
        case "pit":  # some keys have 200 less: a sample of them must not set the level
            q += 12 * direction
            k[:, :, ::64] -= 17 * direction
        case "step":  # all keys of the last block have 9 more than the others
            q += 3 * direction
            k[:, :, -KEY_BLOCK:] += 3 * direction
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


@pytest.mark.parametrize("kind", ["zero", "flat", "normal", "steep", "spiky", "sink", "needle", "pit", "step"])
@pytest.mark.parametrize("start", [KEYS, KEYS - 512])
def test_precision_in_16_bits(kind: str, start: int) -> None:
    """Beside what the fused kernel in 16 bits is off by: rounded scores cost no more than twice that again."""
    q, k, v = tensors(kind)
    positions = range(start, start + 512)
    expected, expected_lse = exact(q, k, v, positions)
    errors = []
    for backend in (sdpa, matmul):
        out = attend(q, positions, [KVSegment(k, v, 0)], AttentionMask(), backend)
        errors.append(((out - expected).norm() / expected.norm()).item())
    assert 0 < errors[1] < 3 * errors[0] + 2e-3, errors
    if start == KEYS:
        ((_, state),) = matmul(q, positions, KVSegment(k, v, 0), AttentionMask())
        assert (state.lse - expected_lse).abs().max() < 0.05


def test_a_sample_that_misleads_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key with 60 more than the sample promises: the fused kernel computes those queries, in any tile."""
    q, k, v = tensors("normal")
    k[:, :, 1000] = q[:, ::2, 7] * 12  # between sampled keys, seen by all queries
    calls, fused = [], matmul_module._fused

    def counted(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> AttentionState:
        calls.append(is_causal)
        return fused(q, k, v, is_causal)

    monkeypatch.setattr(matmul_module, "_fused", counted)
    for positions in (range(KEYS, KEYS + 512), range(KEYS - 512, KEYS)):
        out = attend(q, positions, [KVSegment(k, v, 0)], AttentionMask(), matmul)
        expected, _ = exact(q, k, v, positions)
        assert ((out - expected).norm() / expected.norm()) < 0.01
    assert len(calls) > 1


@pytest.mark.parametrize(
    ("t", "dtype"),
    [
        (1024, torch.float32),
        (1536, torch.bfloat16),
        (1600, torch.bfloat16),
        (1600, torch.float32),
        (2049, torch.bfloat16),
    ],
)
def test_squares_of_any_length(t: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(t)
    q = torch.randn(2, HEADS, t, HEAD_DIM, generator=generator).to(dtype)
    k, v = torch.randn(2, 2, KV_HEADS, t, HEAD_DIM, generator=generator).to(dtype)
    out = attend(q, range(t), [KVSegment(k, v, 0)], AttentionMask(), matmul)
    expected, _ = exact(q, k, v, range(t))
    assert (out - expected).abs().max() < {torch.float32: 3e-6, torch.bfloat16: 0.03}[dtype]


def test_many_questions_to_one_context() -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(3, HEADS, 200, HEAD_DIM, generator=generator)
    k, v = torch.randn(2, 1, KV_HEADS, 2500, HEAD_DIM, generator=generator)
    out = attend(q, range(2500, 2700), [KVSegment(k, v, 0)], AttentionMask(), matmul)
    assert (out - exact(q, k, v, range(2500, 2700))[0]).abs().max() < 3e-6


class Shapes(TorchDispatchMode):
    """Shapes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm"):
            self.seen.add(tuple(tuple(x.shape) for x in args if isinstance(x, Tensor)))
        return func(*args, **(kwargs or {}))


def test_products_come_in_few_shapes() -> None:
    """However long the segments are: on a CPU each new shape of a 16-bit product costs memory for good."""
    q, k, v = tensors("normal")
    with Shapes() as shapes:
        for keys in range(KEY_BLOCK, KEYS, 97):
            for start in (keys, keys - 300):
                segment = KVSegment(k[:, :, :keys], v[:, :, :keys], 0)
                attend(q, range(start, start + 512), [segment], AttentionMask(), matmul)
    assert 0 < len(shapes.seen) <= 8, shapes.seen


def test_float16_and_short_tiles_are_the_fused_kernels() -> None:
    q, k, v = tensors("normal")
    for queries, dtype in ((q[:, :, :100], torch.bfloat16), (q, torch.float16)):
        made = [x.to(dtype) for x in (queries, k, v)]
        positions = range(KEYS, KEYS + queries.shape[2])
        outs = [
            attend(made[0], positions, [KVSegment(*made[1:], 0)], AttentionMask(), backend)
            for backend in (sdpa, matmul)
        ]
        assert torch.equal(*outs)
