"""Vector code against what the forms expand to by PyTorch's operations: the same numbers, and products of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.layers import linear
from model.quantization import form
from model.quantization.affine import AffineMatrix, AffineScheme
from model.quantization.float4 import Float4Matrix, Float4Scheme
from model.quantization.float8 import Float8Matrix
from model.quantization.form import StoredMatrix
from model.quantization.gguf_blocks import GgufMatrix
from model.quantization.gguf_types import NATIVE
from model.quantization.int8_rows import Int8RowsMatrix
from model.quantization.mlx_affine import MlxAffineMatrix
from model.quantization.plain import PlainMatrix
from model.quantization.scaled import PER_CHANNEL, PER_TENSOR, Grain
from model.simd import products

pytest.importorskip("llvmlite")

C_OUT, C_IN = 80, 768
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALVES_AT = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2)}
HALVES_AT |= {"Q5_K": (0, 2), "MXFP4": ()}
"""Where a block's float16 numbers are; at 0 in the types that are not named."""


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SMALLEST", 0)
    torch.manual_seed(3)


def uint8(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def scales(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).mul_(0.1).to(dtype)


def plain(dtype: torch.dtype) -> StoredMatrix:
    return PlainMatrix(torch.randn(C_OUT, C_IN).to(dtype))


def affine(bits: int, grain: Grain, zero: str = "", dtype: torch.dtype = torch.bfloat16) -> StoredMatrix:
    """`zero`: "packed", "int8" (and then codes are not packed either), or none."""
    is_packed = zero != "int8"
    groups = C_IN // grain.columns if grain.columns else 1
    codes = uint8(C_OUT, C_IN * bits // 8)
    codes = codes.view(torch.int32) if is_packed else codes.view(torch.int8)
    words = torch.randint(-(2**31), 2**31, (C_OUT * bits // 32, groups), dtype=torch.int32)
    points = {"": None, "packed": words, "int8": uint8(C_OUT, groups).view(torch.int8)}[zero]
    scheme = AffineScheme(bits, grain, is_packed, bool(zero))
    rows = 1 if grain == PER_TENSOR else C_OUT
    return AffineMatrix(codes, scales(rows, groups, dtype=dtype), (C_OUT, C_IN), scheme, points)


def float8(grain: Grain, shape: tuple[int, ...], *, is_transposed: bool = False) -> StoredMatrix:
    numbers = torch.randn(C_OUT, C_IN).mul_(20).to(torch.float8_e4m3fn)
    codes = numbers.t().contiguous() if is_transposed else numbers
    return Float8Matrix(codes, scales(*shape, dtype=torch.float32), grain, is_transposed)


def float4(group: int, *, has_global: bool, divides: bool = False) -> StoredMatrix:
    codes, rows = uint8(C_OUT, C_IN // 2), (C_OUT, C_IN // group)
    if not has_global:
        return Float4Matrix(codes, uint8(*rows) % 7 + 120, Float4Scheme(group, has_global=False))
    scale = torch.rand(rows).mul_(400).to(torch.float8_e4m3fn)
    return Float4Matrix(codes, scale, Float4Scheme(group, divides), torch.tensor([0.037]))


def mlx(bits: int, group: int, dtype: torch.dtype) -> StoredMatrix:
    groups = (C_OUT, C_IN // group)
    return MlxAffineMatrix(
        uint8(C_OUT, C_IN * bits // 8), scales(*groups, dtype=dtype), scales(*groups, dtype=dtype), bits
    )


def gguf(name: str) -> StoredMatrix:
    kind = next(kind for kind in NATIVE if kind.name == name)
    blocks = uint8(C_OUT, C_IN // kind.block_weights, kind.block_bytes)
    for place in HALVES_AT.get(name, (0,)):
        blocks[..., place : place + 2] = scales(*blocks.shape[:2], 1, dtype=torch.float16).view(torch.uint8)
    if name == "MXFP4":
        blocks[..., 0] %= 30
    return GgufMatrix(blocks.flatten(1), kind, (C_OUT, C_IN))


FORMS: dict[str, Callable[[], StoredMatrix]] = {
    "float32": lambda: plain(torch.float32),
    "bfloat16": lambda: plain(torch.bfloat16),
    "float16": lambda: plain(torch.float16),
    "int4 groups": lambda: affine(4, Grain(1, 128)),
    "int4 small groups": lambda: affine(4, Grain(1, 16), dtype=torch.float16),
    "int4 groups of 96": lambda: affine(4, Grain(1, 96), dtype=torch.float32),
    "int4 zero points": lambda: affine(4, Grain(1, 32), "packed", torch.float32),
    "int4 per channel": lambda: affine(4, PER_CHANNEL, "packed"),
    "int8 groups": lambda: affine(8, Grain(1, 128)),
    "int8 packed zero points": lambda: affine(8, Grain(1, 64), "packed"),
    "int8 zero points": lambda: affine(8, PER_CHANNEL, "int8", torch.float32),
    "int8 per tensor": lambda: affine(8, PER_TENSOR),
    "int8 rows": lambda: Int8RowsMatrix(uint8(C_OUT, C_IN).view(torch.int8), scales(C_OUT, dtype=torch.float32)),
    "FP8 per tensor": lambda: float8(PER_TENSOR, ()),
    "FP8 per channel": lambda: float8(PER_CHANNEL, (C_OUT, 1)),
    "FP8 blocks": lambda: float8(Grain(16, 128), (C_OUT // 16, C_IN // 128)),
    "NVFP4": lambda: float4(16, has_global=True),
    "NVFP4 divided": lambda: float4(16, has_global=True, divides=True),
    "MXFP4": lambda: float4(32, has_global=False),
    "MLX 4 bit": lambda: mlx(4, 64, torch.float16),
    "MLX 8 bit": lambda: mlx(8, 32, torch.bfloat16),
    **{kind.name: (lambda name=kind.name: gguf(name)) for kind in NATIVE},
}
BY_COLUMNS: dict[str, Callable[[], StoredMatrix]] = {
    "bfloat16": lambda: PlainMatrix(torch.randn(C_IN, C_OUT).bfloat16().t()),
    "float16": lambda: PlainMatrix(torch.randn(C_IN, C_OUT).half().t()),
    "FP8 per tensor": lambda: float8(PER_TENSOR, (1,), is_transposed=True),
    "FP8 per channel": lambda: float8(PER_CHANNEL, (C_OUT,), is_transposed=True),
}
ALL = FORMS | {f"{name} by columns": make for name, make in BY_COLUMNS.items()}


def by_torch(matrix: StoredMatrix, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (C_IN, C_OUT) if matrix.is_transposed else (C_OUT, C_IN)
    out = torch.empty(shape, dtype=dtype)
    out = out.t() if matrix.is_transposed else out
    matrix.expand(slice(0, C_OUT), out)
    return out


@pytest.mark.parametrize("name", FORMS)
def test_it_expands_to_the_same_numbers(name: str) -> None:
    matrix = FORMS[name]()
    operand = matrix.operand()
    assert operand is not None and products.is_readable(operand)
    for dtype in DTYPES:
        for rows in (slice(0, C_OUT), slice(17, 50)):
            guarded = torch.full((rows.stop - rows.start + 2, C_IN), 7.0, dtype=dtype)
            assert products.expand(operand, rows, guarded[1:-1])
            assert torch.equal(guarded[1:-1], by_torch(matrix, dtype)[rows])
            assert bool((guarded[[0, -1]] == 7).all())


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize(
    "matrix", [*FORMS.values(), *BY_COLUMNS.values()], ids=[*FORMS, *(f"{n} by columns" for n in BY_COLUMNS)]
)
def test_products_are_those_of_the_numbers(matrix: Callable[[], StoredMatrix], count: int) -> None:
    stored = matrix()
    operand, x = stored.operand(), torch.randn(count, C_IN)
    assert operand is not None and products.is_readable(operand)
    expected = x.double() @ by_torch(stored).double().t()
    error = (products.product(operand, x).double() - expected).abs().max() / expected.abs().max()
    assert error < 2e-6
    assert torch.equal(stored.product(x), products.product(operand, x))
    halves = x.bfloat16()
    assert torch.equal(stored.product(halves), products.product(operand, halves.float()).bfloat16())


@pytest.mark.parametrize("count", [products.FEW_ROWS + 1, 40])
def test_more_rows_go_by_tiles(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form, "TILE_ELEMENTS", 32 * C_IN)
    for matrix in (FORMS["Q4_K"](), BY_COLUMNS["bfloat16"]()):
        x = torch.randn(1, count, C_IN)
        torch.testing.assert_close(matrix.product(x), x @ by_torch(matrix).t(), rtol=1e-4, atol=1e-3)


def test_no_rows_have_no_results() -> None:
    for weight in (FORMS["Q8_0"](), torch.randn(C_OUT, C_IN), torch.randn(C_IN, C_OUT).bfloat16().t()):
        assert linear(torch.randn(1, 0, C_IN), weight).shape == (1, 0, C_OUT)


def test_linear_takes_several_rows_of_float32() -> None:
    weight, x = torch.randn(C_OUT, C_IN), torch.randn(2, C_IN)
    operand = products.plain_operand(weight)
    assert operand is not None and torch.equal(linear(x, weight), products.product(operand, x))


def test_linear_takes_plain_weights_of_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for weight in (torch.randn(C_OUT, C_IN).bfloat16(), torch.randn(C_IN, C_OUT).bfloat16().t()):
        x, bias = torch.randn(1, 2, C_IN).bfloat16(), torch.randn(C_OUT).bfloat16()
        expected = (x.float() @ weight.float().t()).bfloat16() + bias
        assert torch.equal(linear(x, weight, bias), expected)
        with monkeypatch.context() as patch:
            patch.setattr(products, "find_engine", lambda: None)
            torch.testing.assert_close(linear(x, weight, bias), expected)


def test_what_it_has_no_code_for_is_left_to_pytorch() -> None:
    for matrix in (
        affine(4, Grain(1, 8)),  # groups smaller than a vector
        float8(Grain(16, 8), (C_OUT // 16, C_IN // 8)),
        PlainMatrix(torch.randn(C_OUT, 40).bfloat16()),  # no whole number of steps
        PlainMatrix(torch.randn(C_IN, 20).bfloat16().t()),
        mlx(2, 64, torch.float16),
    ):
        operand, x = matrix.operand(), torch.randn(1, matrix.in_features)
        assert operand is None or not products.is_readable(operand)
        expected = x.double() @ matrix.expanded().double().t()
        assert (matrix.product(x) - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_threads_of_our_own_do_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from model.simd import engine

    monkeypatch.setattr(engine, "find_openmp", lambda: None)
    other = engine.Engine()
    operand, x = FORMS["Q8_0"]().operand(), torch.randn(2, C_IN)
    assert operand is not None
    expected = products.product(operand, x)
    monkeypatch.setattr(products, "find_engine", lambda: other)
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(products.product(operand, x), expected)


def test_a_compiler_that_cannot_be_had_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("no memory that may be executed")

    products.find_engine.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr("model.simd.engine.engine", refuse)
            assert products.find_engine() is None
        products.find_engine.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(products.platform, "machine", lambda: "riscv64")
            assert products.find_engine() is None
    finally:
        products.find_engine.cache_clear()


def test_a_matrix_that_moves_is_looked_at_anew() -> None:
    matrix, x = FORMS["Q8_0"](), torch.randn(1, C_IN)
    before = matrix.product(x)
    matrix.blocks.view(-1, 34)[:, 2:] = 0
    assert before.any() and not matrix.product(x).any()
    assert matrix.to("meta").product(x.to("meta")).device.type == "meta"
