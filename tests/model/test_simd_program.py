"""Operations of programs against PyTorch's, for any number of rows, and in lists that wait for each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.rope import rotate
from model.simd import products
from model.simd.products import FEW_ROWS, Operand, plain_operand

pytest.importorskip("llvmlite")

from model.simd.recorder import Heads, NoCodeError, Recorder

C, WIDE = 192, 128


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(7)


@pytest.fixture(params=["OpenMP", "pool of 1", "pool of 3"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs on PyTorch's threads, or on some of our own as where a process has no such library."""
    from model.simd import engine

    if request.param != "OpenMP":
        monkeypatch.setattr(engine, "find_openmp", lambda: None)
        other = engine.Engine()
        monkeypatch.setattr(products, "find_engine", lambda: other)
        monkeypatch.setattr(torch, "get_num_threads", lambda: int(request.param[-1]))


def operand(c_out: int, c_in: int, *, by_columns: bool = False, dtype: torch.dtype = torch.bfloat16) -> Operand:
    weight = torch.randn(c_in, c_out).to(dtype).t() if by_columns else torch.randn(c_out, c_in).to(dtype)
    found = plain_operand(weight)
    assert found is not None
    return found


def dense(operand: Operand) -> Tensor:
    """(C_out, C_in) in float32."""
    (weight,) = operand.tensors
    return (weight if weight.shape == operand.shape else weight.t()).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm(dtype: torch.dtype) -> None:
    x, out, weight = torch.randn(FEW_ROWS, C), torch.zeros(FEW_ROWS, C), torch.randn(C).to(dtype)
    recorder = Recorder()
    recorder.norm(x, weight, 1e-2, out)
    recorder.program().run(5)
    torch.testing.assert_close(out[:5], F.rms_norm(x[:5], (C,), weight.float(), 1e-2))
    assert not out[5:].any()


@pytest.mark.parametrize("by_columns", [False, True])
def test_product_with_bias_and_sum(by_columns: bool) -> None:
    """Into columns of a wider buffer."""
    matrix, bias = operand(WIDE, C, by_columns=by_columns), torch.randn(WIDE).bfloat16()
    x, outs = torch.randn(FEW_ROWS, C), torch.randn(FEW_ROWS, 2 * WIDE)
    before, sums = outs.clone(), torch.zeros(FEW_ROWS, WIDE)
    recorder = Recorder()
    recorder.product(matrix, x, outs[:, :WIDE])
    recorder.product(matrix, x, outs[:, WIDE:], bias=bias, sums=sums, waits=False)
    recorder.program().run(3)
    expected = x @ dense(matrix).t()
    torch.testing.assert_close(outs[:3, :WIDE], expected[:3])
    torch.testing.assert_close(outs[:3, WIDE:], (before[:, WIDE:] + expected + bias.float())[:3])
    assert torch.equal(outs[3:], before[3:])


@pytest.mark.parametrize("by_columns", [False, True])
def test_rows_do_not_depend_on_how_many_there_are(by_columns: bool) -> None:
    matrix, x = operand(WIDE, C, by_columns=by_columns), torch.randn(FEW_ROWS, C)
    found = []
    for rows in range(1, FEW_ROWS + 1):
        out = torch.zeros(FEW_ROWS, WIDE)
        recorder = Recorder()
        recorder.product(matrix, x, out)
        recorder.program().run(rows)
        found.append(out)
    for rows, out in enumerate(found, 1):
        assert torch.equal(out[:rows], found[-1][:rows]) and not out[rows:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("scales", [False, True])
def test_heads(dtype: torch.dtype, rotates: bool, norms: bool, scales: bool) -> None:
    heads, d, rows = 3, 48, 4
    x, out = torch.randn(FEW_ROWS, heads * d), torch.zeros(FEW_ROWS, heads, d, dtype=dtype)
    phases, temperature = torch.randn(FEW_ROWS, d // 2, dtype=torch.complex64), torch.rand(FEW_ROWS)
    rotation = torch.view_as_real(phases).flatten(1)
    recorder = Recorder()
    what = Heads(rotation if rotates else None, 1e-2 if norms else None, temperature if scales else None)
    recorder.heads(x, out, what)
    recorder.program().run(rows)
    expected = x.unflatten(1, (heads, d))
    if rotates:
        expected = rotate(expected[None], phases)[0]
    if norms:
        expected = F.rms_norm(expected, (d,), None, 1e-2)
    if scales:
        expected = expected * temperature[:, None, None]
    torch.testing.assert_close(out[:rows], expected[:rows].to(dtype))
    assert not out[rows:].any()


def test_gate() -> None:
    gate_up = torch.randn(FEW_ROWS, 2 * WIDE) * 30
    gate_up[0, :5] = torch.tensor([-1e4, 1e30, 0.0, -100.0, torch.nan])
    gate, up = gate_up.clone().split(WIDE, 1)
    recorder = Recorder()
    recorder.gated(gate_up[:, :WIDE], gate_up[:, WIDE:])
    recorder.program().run(FEW_ROWS - 1)
    torch.testing.assert_close(gate_up[:-1, :WIDE], (F.silu(gate) * up)[:-1], equal_nan=True, atol=1e-30, rtol=1e-6)
    assert torch.equal(gate_up[-1, :WIDE], gate[-1])


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.usefixtures("threads")
def test_experts(top_k: int, by_columns: bool) -> None:
    """Gate and up joined, the choice and the sum; each token's result is that which it has alone."""
    experts, pairs = 5, FEW_ROWS * top_k
    gate_up = [operand(2 * WIDE, C, by_columns=by_columns) for _ in range(experts)]
    down = [operand(C, WIDE, by_columns=by_columns) for _ in range(experts)]
    x, router = torch.randn(FEW_ROWS, C), operand(experts, C, dtype=torch.float32)
    residual, wide, sums = torch.zeros(FEW_ROWS, C), torch.zeros(pairs, 2 * WIDE), torch.zeros(pairs, C)
    logits, scores = torch.zeros(FEW_ROWS, experts), torch.zeros(pairs)
    x /= C
    recorder = Recorder()
    first = recorder.slots(gate_up, x, wide, pairs)
    last = recorder.slots(down, wide[:, :WIDE], residual, pairs, sums)
    recorder.product(router, x, logits)
    recorder.choice(logits, top_k, scores, [first, last])
    recorder.each(first, top_k)
    recorder.gated(wide[:, :WIDE], wide[:, WIDE:], scores)
    recorder.each(last, top_k)
    program = recorder.program()

    weights, chosen = (x @ dense(router).t()).topk(top_k)
    expected = torch.zeros(FEW_ROWS, C)
    for token in range(FEW_ROWS):
        for expert, logit in zip(chosen[token].tolist(), weights[token], strict=True):
            gate, up = (dense(gate_up[expert]) @ (x[token] * logit.sigmoid())).split(WIDE)
            expected[token] += dense(down[expert]) @ (F.silu(gate) * up)
    for rows in (1, 3, FEW_ROWS):
        residual.zero_()
        program.run(rows)
        torch.testing.assert_close(residual[:rows], expected[:rows], rtol=1e-4, atol=1e-4)
        assert not residual[rows:].any()
        if rows == 1:
            alone = residual[0].clone()
    assert torch.equal(residual[0], alone)


def test_equal_and_odd_logits_choose_an_expert() -> None:
    """The first of equal ones; numbers that are not finite do not lead out of the table."""
    experts, out, wide, sums = 3, torch.zeros(FEW_ROWS, C), torch.ones(2 * FEW_ROWS, C), torch.zeros(2 * FEW_ROWS, C)
    matrices = [operand(C, C) for _ in range(experts)]
    logits, scores = torch.zeros(FEW_ROWS, experts), torch.zeros(2 * FEW_ROWS)
    logits[1:] = torch.tensor([[torch.nan] * 3, [-torch.inf] * 3, [1.0, torch.inf, torch.nan]])[[0, 1, 2, 0, 1, 2, 0]]
    recorder = Recorder()
    slots = recorder.slots(matrices, wide, out, 2 * FEW_ROWS, sums)
    recorder.choice(logits, 2, scores, [slots])
    recorder.each(slots, 2)
    recorder.program().run(FEW_ROWS)
    sums_of = [dense(matrix).sum(1) for matrix in matrices]
    torch.testing.assert_close(out[0], sums_of[0] + sums_of[1], rtol=1e-4, atol=1e-4)
    assert out.isfinite().all()


@pytest.mark.usefixtures("threads")
def test_operations_wait_for_each_other() -> None:
    """A chain of products, run often: whoever read too early would see an older row."""
    matrices = [operand(C, C, dtype=torch.float32) for _ in range(6)]
    buffers = [torch.zeros(FEW_ROWS, C) for _ in range(7)]
    recorder = Recorder()
    for matrix, x, out in zip(matrices, buffers, buffers[1:], strict=False):
        matrix.tensors[0].mul_(C**-0.5)
        recorder.product(matrix, x, out)
    program = recorder.program()
    for rows in [1, 2, FEW_ROWS] * 5:
        buffers[0].copy_(torch.randn(FEW_ROWS, C))
        expected = buffers[0]
        for matrix in matrices:
            expected = expected @ dense(matrix).t()
        program.run(rows)
        torch.testing.assert_close(buffers[-1][:rows], expected[:rows], rtol=1e-4, atol=1e-5)


def test_sizes_without_code_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(FEW_ROWS, 40)
    with pytest.raises(NoCodeError):
        Recorder().norm(x, torch.ones(40), 1e-5, x)
    with pytest.raises(NoCodeError):
        Recorder().gated(x, x)
    with pytest.raises(NoCodeError):
        Recorder().heads(x, torch.zeros(FEW_ROWS, 1, 40), Heads())
    with pytest.raises(NoCodeError):
        Recorder().slots([operand(C, C), operand(C, C, dtype=torch.float16)], x, x, 1)
    monkeypatch.setattr(products, "find_engine", lambda: None)
    with pytest.raises(NoCodeError):
        Recorder()
