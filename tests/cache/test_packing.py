"""Packed segments against float64 formulas of their own, and their bytes against the layout's closed form."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cache import layout as store_layout
from cache import packing
from cache.blocks import Block, empty_block
from cache.layout import StoreLayout
from cache.packing import TORCH_DTYPES, Packed, pack, packed_from_bytes, shapes, unpack
from model.config import TextConfig

HEADS, HEAD_DIM, SEGMENT = 2, 10, 70  # two groups of 35 tokens
CONFIG = TextConfig.from_dict(
    {
        "model_type": "llama4_text",
        "vocab_size": 97,
        "hidden_size": 42,
        "intermediate_size": 22,
        "intermediate_size_mlp": 34,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD_DIM,
        "num_local_experts": 5,
        "attention_chunk_size": 7,
        "max_position_embeddings": 256,
        "no_rope_layers": [1, 0, 1, 1, 0],
    }
)
CPU = torch.device("cpu")
COMPUTE = ("float32", "bfloat16", "float16")
PAIRS = list(itertools.product(COMPUTE, store_layout.KV_DTYPES))
CONVERTED = [(dtype, kv_dtype) for dtype, kv_dtype in PAIRS if dtype != kv_dtype]
QUANTIZED = list(itertools.product(COMPUTE, store_layout.QUANTIZED))
LARGEST = {"int8": 127, "fp8": 448}


def layout_of(dtype: str, kv_dtype: str, *, segment: int = SEGMENT, batch_size: int = 1) -> StoreLayout:
    return StoreLayout(CONFIG, 10_000, dtype, kv_dtype, batch_size, 2 * segment, segment)


def random_block(layout: StoreLayout) -> Block:
    """Channels and tokens of very different sizes; a view of a longer block, as segments of an open block are."""

    def draw() -> Tensor:
        x = torch.randn(layout.batch_size, HEADS, layout.segment_tokens + 5, HEAD_DIM)
        x *= torch.randn(HEADS, 1, HEAD_DIM).exp() * torch.randn(layout.segment_tokens + 5, 1).exp()
        return x.to(TORCH_DTYPES[layout.dtype])[:, :, 3:-2]

    return Block(draw(), draw())


def empty_packed(layout: StoreLayout) -> Packed:
    return Packed(**{name: torch.empty(shape, dtype=dtype) for name, dtype, shape in shapes(layout)})


def filled_block(layout: StoreLayout, value: float) -> Block:
    block = empty_block(layout, layout.segment_tokens, CPU)
    for x in block:
        x.fill_(value)
    return block


def unpacked(packed: Packed, layout: StoreLayout) -> Block:
    return unpack(packed, layout, filled_block(layout, float("nan")))


def same(a: Packed, b: Packed) -> bool:
    """Bit by bit."""
    pairs = zip(a.tensors, b.tensors, strict=True)
    return all(
        n == m
        and x.shape == y.shape
        and x.dtype == y.dtype
        and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for (n, x), (m, y) in pairs
    )


def scales_of_elements(packed: Packed, layout: StoreLayout) -> Block:
    """The scale of each element, float64: for keys that of channel and token group, for values that of the token."""
    assert packed.key_scales is not None and packed.value_scales is not None
    return Block(
        packed.key_scales.double().repeat_interleave(layout.group_tokens, 2),
        packed.value_scales.double().expand_as(packed.values),
    )


def absmax_of_elements(block: Block, layout: StoreLayout) -> Block:
    """The largest of those that share a scale, for each element, by loops."""
    keys, values = block.keys.double().clone(), block.values.double().clone()
    for start in range(0, layout.segment_tokens, layout.group_tokens):
        group = keys[:, :, start : start + layout.group_tokens]
        group.copy_(group.abs().max(2, keepdim=True).values.expand_as(group))
    values.copy_(values.abs().max(3, keepdim=True).values.expand_as(values))
    return Block(keys, values)


def steps(codes: Tensor) -> Tensor:
    """Codes in their order, as integers: int8 as it is, fp8 by sign and magnitude."""
    bits = codes.view(torch.int8).int()
    return bits if codes.dtype == torch.int8 else torch.where(bits < 0, -(bits + 128), bits)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("segment", [7, 14, 67, 70, 128])
@pytest.mark.parametrize(("dtype", "kv_dtype"), PAIRS)
def test_shapes_and_bytes_are_the_layouts(dtype: str, kv_dtype: str, segment: int, batch_size: int) -> None:
    layout = layout_of(dtype, kv_dtype, segment=segment, batch_size=batch_size)
    packed = pack(random_block(layout), layout)
    empty = empty_packed(layout)
    expected = shapes(layout)
    for tensors in (packed.tensors, empty.tensors):
        assert [(name, x.dtype, tuple(x.shape)) for name, x in tensors] == expected
    assert all(x.is_contiguous() for _, x in empty.tensors)
    assert packed.nbytes == empty.nbytes == layout.sealed_segment_bytes
    if layout.is_packed:
        assert all(x.is_contiguous() for _, x in packed.tensors)  # as they are written
    assert [name for name, _, _ in expected] == (
        ["key_scales", "value_scales"] if kv_dtype in store_layout.QUANTIZED else []
    ) + ["keys", "values"]
    if kv_dtype in store_layout.QUANTIZED:
        assert expected[0][2] == (batch_size, HEADS, segment // layout.group_tokens, HEAD_DIM)
        assert expected[1][2] == (batch_size, HEADS, segment, 1)


@pytest.mark.parametrize("dtype", COMPUTE)
def test_what_is_not_packed_is_not_copied(dtype: str) -> None:
    layout = layout_of(dtype, dtype)
    block = random_block(layout)
    block.keys[0, 1, 2, 3] = torch.inf
    before = block.keys.clone()
    packed = pack(block, layout)
    assert torch.equal(packed.keys, before)  # nor clamped
    assert packed.keys is block.keys and packed.values is block.values
    assert packed.key_scales is None and packed.value_scales is None
    into = filled_block(layout, 1)
    shown = unpack(packed, layout, into)
    assert shown.keys is block.keys and shown.values is block.values
    assert (into.keys == 1).all() and (into.values == 1).all()


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("segment", [14, SEGMENT])
@pytest.mark.parametrize(("dtype", "kv_dtype"), CONVERTED)
def test_round_trips_stay_within_a_step(dtype: str, kv_dtype: str, segment: int, batch_size: int) -> None:
    """Half a step of the storage type, and half of one of the compute dtype; exact where the storage type is finer."""
    layout = layout_of(dtype, kv_dtype, segment=segment, batch_size=batch_size)
    block = random_block(layout)
    packed = pack(block, layout)
    into = filled_block(layout, float("nan"))
    result = unpack(packed, layout, into)
    assert result is into
    rounding = torch.finfo(TORCH_DTYPES[dtype])
    if kv_dtype not in store_layout.QUANTIZED:
        stored = torch.finfo(TORCH_DTYPES[kv_dtype])
        for x, y in zip(block, result, strict=True):
            assert torch.equal(y, x.to(TORCH_DTYPES[kv_dtype]).to(y.dtype))
            error = (x.double() - y.double()).abs()
            assert (error <= x.double().abs() * (stored.eps + rounding.eps) / 2 + stored.smallest_normal).all()
            assert not error.any() or stored.eps > rounding.eps or stored.smallest_normal > rounding.smallest_normal
        return
    scales = scales_of_elements(packed, layout)
    for x, y, scale, largest in zip(block, result, scales, absmax_of_elements(block, layout), strict=True):
        assert torch.allclose(scale * LARGEST[kv_dtype], largest, rtol=1e-6, atol=0)
        step = scale / 2 if kv_dtype == "int8" else torch.maximum(x.double().abs() / 2**4, scale / 2**10)
        error = (x.double() - y.double()).abs()
        assert (error <= 1.00001 * step + largest * rounding.eps / 2 + rounding.smallest_normal).all()
        assert error.max() > 0.5 * step.min()  # and it is quantized


@pytest.mark.parametrize(("dtype", "kv_dtype"), QUANTIZED)
def test_codes_are_those_of_float64(dtype: str, kv_dtype: str) -> None:
    """x / scale, rounded half to even, for a handful of ties that float32 sees otherwise; and the product back."""
    layout = layout_of(dtype, kv_dtype, batch_size=2)
    block = random_block(layout)
    packed = pack(block, layout)
    scales = scales_of_elements(packed, layout)
    for x, codes, scale in zip(block, (packed.keys, packed.values), scales, strict=True):
        scaled = (x.double() / scale).clamp(-LARGEST[kv_dtype], LARGEST[kv_dtype])
        expected = (scaled.round() if kv_dtype == "int8" else scaled.float()).to(codes.dtype)
        differences = (steps(codes) - steps(expected)).abs()
        assert differences.max() <= 1 and differences.count_nonzero() <= 2
        assert steps(codes).abs().max() == (127 if kv_dtype == "int8" else 0x7E)  # the whole range is used
    for y, codes, scale in zip(unpacked(packed, layout), (packed.keys, packed.values), scales, strict=True):
        assert torch.equal(y, (codes.double() * scale).float().to(y.dtype))


def test_int8_rounds_half_to_even() -> None:
    """Seen where a scale happens to be 1: largest elements around 127 are tried, one a token."""
    layout = layout_of("float32", "int8")
    block = filled_block(layout, 0)
    block.values[..., :9] = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 125.5, 126.5, 3.5])
    block.values[..., 9] = 127 + 2**-17 * torch.arange(-SEGMENT, SEGMENT).view(1, HEADS, SEGMENT)
    packed = pack(block, layout)
    assert packed.value_scales is not None
    codes = packed.values[packed.value_scales[..., 0] == 1]
    assert len(codes) > 0
    assert torch.equal(codes, torch.tensor([[0, 2, 2, 0, -2, -2, 126, 126, 4, 127]], dtype=torch.int8).expand_as(codes))


@pytest.mark.parametrize("dtype", COMPUTE)
def test_every_fp8_code_is_read_as_torch_reads_it(dtype: str) -> None:
    layout = layout_of(dtype, "fp8")
    packed = empty_packed(layout)
    numbers = torch.arange(packed.keys.numel(), dtype=torch.int32) % 256
    numbers[(numbers == 0x7F) | (numbers == 0xFF)] = 0  # NaN
    for codes in (packed.keys, packed.values):
        codes.view(torch.uint8).copy_(numbers.to(torch.uint8).view(codes.shape))
    assert packed.key_scales is not None and packed.value_scales is not None
    for scale in (1.0, 2.0**-120, 2.0**118, 0.3):
        packed.key_scales.fill_(scale)
        packed.value_scales.fill_(scale)
        for y, codes in zip(unpacked(packed, layout), (packed.keys, packed.values), strict=True):
            expected = (codes.to(torch.float32) * torch.tensor(scale)).to(y.dtype)
            assert torch.equal(y, expected) and torch.equal(y.signbit(), expected.signbit())


@pytest.mark.parametrize(("dtype", "kv_dtype"), CONVERTED)
def test_packing_again_what_was_unpacked(dtype: str, kv_dtype: str) -> None:
    """Float types and fp8 codes stay as they are, int8 codes too, but for one step in bfloat16, which rounds more
    coarsely than 127 steps. Scales change by the compute dtype's rounding."""
    layout = layout_of(dtype, kv_dtype, batch_size=2)
    once = pack(random_block(layout), layout)
    shown = unpacked(once, layout)
    twice = pack(shown, layout)
    if kv_dtype not in store_layout.QUANTIZED:
        assert same(once, twice)
        return
    allowed = 1 if (dtype, kv_dtype) == ("bfloat16", "int8") else 0
    for a, b in ((once.keys, twice.keys), (once.values, twice.values)):
        assert (steps(a) - steps(b)).abs().max() <= allowed
    eps = torch.finfo(TORCH_DTYPES[dtype]).eps
    for a, b in zip(scales_of_elements(once, layout), scales_of_elements(twice, layout), strict=True):
        assert torch.allclose(a, b, rtol=max(eps, 1e-6), atol=0)


@pytest.mark.parametrize(("dtype", "kv_dtype"), PAIRS)
def test_packing_is_deterministic_and_leaves_the_block_alone(dtype: str, kv_dtype: str) -> None:
    layout = layout_of(dtype, kv_dtype)
    block = random_block(layout)
    before = [x.clone() for x in block]
    packed = pack(block, layout)
    contiguous = pack(Block(block.keys.contiguous(), block.values.contiguous()), layout)
    as_projected = pack(Block(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in block)), layout)
    assert same(packed, pack(block, layout)) and same(packed, contiguous) and same(packed, as_projected)
    assert not layout.is_packed or all(x.is_contiguous() for _, x in as_projected.tensors)
    kept = Packed(*(None if x is None else x.clone() for x in packed))
    first, second = unpacked(packed, layout), unpacked(packed, layout)
    assert torch.equal(first.keys, second.keys) and torch.equal(first.values, second.values)
    assert same(packed, kept)
    assert all(torch.equal(x, y) for x, y in zip(block, before, strict=True))


@pytest.mark.parametrize(("dtype", "kv_dtype"), QUANTIZED)
def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch, dtype: str, kv_dtype: str) -> None:
    layout = layout_of(dtype, kv_dtype, segment=9 * 62, batch_size=2)  # nine groups
    block = random_block(layout)
    packed = pack(block, layout)
    shown = unpacked(packed, layout)
    group_bytes = 4 * 2 * HEADS * 62 * HEAD_DIM
    for groups in (0, 1, 2, 4):
        monkeypatch.setattr(packing, "PIECE_BYTES", groups * group_bytes)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        assert same(pack(block, layout), packed)
        again = unpacked(packed, layout)
        assert torch.equal(again.keys, shown.keys) and torch.equal(again.values, shown.values)


@pytest.mark.parametrize(("dtype", "kv_dtype"), CONVERTED)
def test_unpacking_into_a_part_of_a_longer_block(dtype: str, kv_dtype: str) -> None:
    layout = layout_of(dtype, kv_dtype, batch_size=2)
    packed = pack(random_block(layout), layout)
    longer = empty_block(layout, SEGMENT + 9, CPU)
    for x in longer:
        x.fill_(5)
    part = Block(*(x[:, :, 4 : 4 + SEGMENT] for x in longer))
    unpack(packed, layout, part)
    for x, y in zip(longer, unpacked(packed, layout), strict=True):
        assert torch.equal(x[:, :, 4 : 4 + SEGMENT], y)
        assert (x[:, :, :4] == 5).all() and (x[:, :, 4 + SEGMENT :] == 5).all()


@pytest.mark.parametrize(("dtype", "kv_dtype"), PAIRS)
def test_zeros_stay_zeros(dtype: str, kv_dtype: str) -> None:
    """Of a whole segment, and of single groups beside others."""
    layout = layout_of(dtype, kv_dtype)
    for block in (filled_block(layout, 0), random_block(layout)):
        block.keys[:, 1, :35, 3] = 0
        block.values[:, 0, 17] = 0
        packed = pack(block, layout)
        assert all(x.float().isfinite().all() for _, x in packed.tensors)
        result = unpacked(packed, layout)
        assert (result.keys[:, 1, :35, 3] == 0).all() and (result.values[:, 0, 17] == 0).all()
        assert result.keys.isfinite().all() and result.values.isfinite().all()


@pytest.mark.parametrize(("dtype", "kv_dtype"), PAIRS)
def test_extreme_values_stay_finite(dtype: str, kv_dtype: str) -> None:
    """The largest of the compute dtype, those that float16 or bfloat16 cannot hold, and subnormal ones: beside each
    other, and each in groups of its own. What can be held comes back."""
    layout = layout_of(dtype, kv_dtype)
    compute = TORCH_DTYPES[dtype]
    largest = torch.finfo(compute).max
    extremes = torch.tensor([largest, -largest, 3e38, -1e38, 65504, 65519, 65520, 7e4, 448, 1e-7, 1e-40, 1e-45, -1e-38])
    extremes = extremes.clamp(-largest, largest).to(compute)
    held = min(largest, torch.finfo(TORCH_DTYPES[kv_dtype]).max if kv_dtype not in store_layout.QUANTIZED else largest)
    for x in extremes:
        block = filled_block(layout, 0)
        for tensor in block:
            tensor.copy_(x)
        for y in unpacked(pack(block, layout), layout):
            expected = x.double().clamp(-held, held)
            assert torch.allclose(y.double(), expected.expand_as(y), rtol=2**-7, atol=1.2e-38 if held > 1e5 else 3e-8)
    mixed = extremes.repeat(SEGMENT * HEADS * HEAD_DIM)[: SEGMENT * HEADS * HEAD_DIM].view(1, HEADS, SEGMENT, HEAD_DIM)
    for y in unpacked(pack(Block(mixed, -mixed), layout), layout):
        assert y.isfinite().all()


def test_the_largest_scales_never_overflow() -> None:
    """The largest float32 / 127 * 127 is infinite; it and the numbers next to it come back finite."""
    largest = torch.tensor(torch.finfo(torch.float32).max).view(torch.int32).item()
    numbers = (largest - torch.arange(SEGMENT * HEADS * HEAD_DIM, dtype=torch.int32)).view(torch.float32)
    for kv_dtype in store_layout.QUANTIZED:
        layout = layout_of("float32", kv_dtype)
        block = filled_block(layout, 0)
        block.values[..., 4] = numbers[: SEGMENT * HEADS].view(1, HEADS, SEGMENT)
        block.keys[:, :, ::35] = numbers[: 2 * HEADS * HEAD_DIM].view(1, HEADS, 2, HEAD_DIM)
        result = unpacked(pack(block, layout), layout)
        assert result.keys.isfinite().all() and result.values.isfinite().all()
        assert torch.allclose(result.values[..., 4], block.values[..., 4])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("dtype", "kv_dtype"), PAIRS)
def test_what_is_not_finite_reaches_only_its_group(dtype: str, kv_dtype: str, bad: float) -> None:
    layout = layout_of(dtype, kv_dtype)
    block = random_block(layout)
    clean = unpacked(pack(block, layout), layout)
    clean = Block(clean.keys.clone(), clean.values.clone())
    block.keys[0, 1, 36, 3] = block.values[0, 0, 17, 2] = bad
    result = unpacked(pack(block, layout), layout)
    if kv_dtype in store_layout.QUANTIZED:
        keys, values = result.keys[0, 1, 35:, 3], result.values[0, 0, 17]
        assert not keys.isfinite().any() and not values.isfinite().any()  # the model's failure stays visible
        keys.copy_(clean.keys[0, 1, 35:, 3])
        values.copy_(clean.values[0, 0, 17])
    else:
        if bad != bad:
            assert result.keys[0, 1, 36, 3].isnan() and result.values[0, 0, 17, 2].isnan()
        result.keys[0, 1, 36, 3], result.values[0, 0, 17, 2] = clean.keys[0, 1, 36, 3], clean.values[0, 0, 17, 2]
    assert torch.equal(result.keys, clean.keys) and torch.equal(result.values, clean.values)


@pytest.mark.parametrize("spare", [0, 1, 1000])
@pytest.mark.parametrize(("dtype", "kv_dtype"), PAIRS)
def test_a_segment_is_seen_in_its_bytes(dtype: str, kv_dtype: str, spare: int) -> None:
    """Written one tensor after another, as a file holds them; views of the buffer, and what they show is the same."""
    layout = layout_of(dtype, kv_dtype, batch_size=2)
    packed = pack(random_block(layout), layout)
    content = torch.cat([x.contiguous().view(torch.uint8).flatten() for _, x in packed.tensors])
    assert content.shape == (layout.sealed_segment_bytes,)
    buffer = torch.full((layout.sealed_segment_bytes + spare,), 255, dtype=torch.uint8)
    views = packed_from_bytes(buffer, layout)
    buffer[: len(content)] = content  # written afterwards: the views show it
    assert same(views, packed)
    addresses = {x.untyped_storage().data_ptr() for _, x in views.tensors}
    assert addresses == {buffer.untyped_storage().data_ptr()}
    for x, y in zip(unpacked(views, layout), unpacked(packed, layout), strict=True):
        assert torch.equal(x, y)


def test_buffers_that_do_not_fit_are_refused() -> None:
    layout = layout_of("float32", "int8")
    size = layout.sealed_segment_bytes
    for buffer in (
        torch.zeros(size - 1, dtype=torch.uint8),
        torch.zeros(size, dtype=torch.int8),
        torch.zeros(1, size, dtype=torch.uint8),
        torch.zeros(2 * size, dtype=torch.uint8)[::2],
    ):
        with pytest.raises(AssertionError):
            packed_from_bytes(buffer, layout)
    shorter = layout_of("float32", "int8", segment=14)
    with pytest.raises(AssertionError):
        pack(random_block(shorter), layout)
    with pytest.raises(AssertionError):
        unpack(empty_packed(layout), layout, filled_block(shorter, 0))


class Allocations(TorchDispatchMode):
    """Bytes of each storage that an operation returns and was not given."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        self.sizes += [
            x.untyped_storage().nbytes()
            for x in tree_leaves(result)
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given
        ]
        return result


@pytest.mark.parametrize(("dtype", "kv_dtype"), CONVERTED)
def test_working_memory_is_a_piece(monkeypatch: pytest.MonkeyPatch, dtype: str, kv_dtype: str) -> None:
    """Nothing larger than a piece in float32 is allocated but what is packed; to unpack, nothing else at all."""
    layout = layout_of(dtype, kv_dtype, segment=64 * 20)
    block, into = random_block(layout), filled_block(layout, 0)
    piece = 4 * HEADS * 64 * HEAD_DIM
    monkeypatch.setattr(packing, "PIECE_BYTES", piece)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with Allocations() as while_packing:
        packed = pack(block, layout)
    large = sorted(size for size in while_packing.sizes if size > piece)
    assert large == sorted(x.nbytes for _, x in packed.tensors if x.nbytes > piece)
    with Allocations() as while_unpacking:
        unpack(packed, layout, into)
    assert max(while_unpacking.sizes, default=0) <= piece
