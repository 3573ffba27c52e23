"""bitsandbytes' tensors of one module are recognised, checked and expanded; damage is refused by one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.errors import CheckpointError
from model.weights import bitsandbytes
from support.stored_groups import PATH, group, matrices, relabel, write

functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")

STATE = ".weight.quant_state.bitsandbytes__nf4"
SHAPE, STACK, DOUBLE_STACK = (22, 192), (16, 22, 192), (3, 128, 256)
SHAPES = (SHAPE, (22, 42), (5, 33), DOUBLE_STACK)


def tensors_of(shape: tuple[int, ...], kind: str = "nf4", is_double: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """By suffix, as bitsandbytes writes them; and its dequantization in float32."""
    weight = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=is_double, quant_type=kind)
    packed = {f".weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return {".weight": codes, **packed}, functional.dequantize_4bit(codes, state)


@pytest.mark.parametrize(
    ("shape", "is_double"),
    [(STACK, False), *((shape, is_double) for shape in SHAPES for is_double in (False, True))],
)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_matrices_and_stacks_are_read(tmp_path: Path, kind: str, shape: tuple[int, ...], is_double: bool) -> None:
    """Sixteen experts are as many as the table has entries."""
    tensors, expected = tensors_of(shape, kind, is_double)
    file = write(tmp_path / "a.safetensors", tensors)
    source = bitsandbytes.read(group(file, shape))
    assert source is not None and source.shape == shape
    assert source.scheme.label == f"{kind.upper()} (blocks of 64{', double quantization' * is_double})"
    assert source.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    found = torch.stack([matrix.expanded() for matrix in matrices(source)])
    assert torch.equal(found.view(shape), expected)


def test_bytes_may_be_called_another_dtype(tmp_path: Path) -> None:
    tensors, expected = tensors_of(SHAPE)
    tensors[".weight"] = tensors[".weight"].flatten().view(torch.bfloat16)
    source = bitsandbytes.read(group(write(tmp_path / "a.safetensors", tensors), SHAPE))
    assert torch.equal(matrices(source)[0].expanded(), expected)


@pytest.mark.parametrize("order", [None, 0])
def test_llm_int8_is_read(tmp_path: Path, order: int | None) -> None:
    codes, absmax, _ = functional.int8_vectorwise_quant(torch.randn(SHAPE).half())
    tensors = {".weight": codes, ".SCB": absmax}
    if order is not None:
        tensors[".weight_format"] = torch.tensor(order, dtype=torch.uint8)
    source = bitsandbytes.read(group(write(tmp_path / "a.safetensors", tensors), SHAPE))
    assert source is not None and source.scheme.label == "int8 (per channel)"
    assert torch.equal(matrices(source)[0].expanded(), functional.int8_vectorwise_dequant(codes, absmax))


def test_other_forms_are_left_to_other_readers(tmp_path: Path) -> None:
    for tensors in ({".weight": torch.ones(SHAPE)}, {".weight": torch.ones(SHAPE), ".weight_scale": torch.ones(22)}):
        assert bitsandbytes.read(group(write(tmp_path / "a.safetensors", tensors), SHAPE)) is None


Change = Callable[[dict[str, Tensor]], object]


def changed(suffix: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: tensors.update({suffix: change(tensors[suffix])})


def text(content: str) -> Change:
    return lambda tensors: tensors.update({STATE: torch.tensor(list(content.encode()), dtype=torch.uint8)})


def said(**fields: Any) -> Change:
    """Fields of the JSON text replaced; None removes one."""

    def change(tensors: dict[str, Tensor]) -> None:
        state = json.loads(bytes(tensors[STATE].tolist())) | fields
        text(json.dumps({name: value for name, value in state.items() if value is not None}))(tensors)

    return change


@pytest.mark.parametrize(
    ("change", "tensor", "what"),
    [
        (changed(".weight", lambda t: t[:-1]), ".weight", "has 2111 bytes instead of the 2112 of [22, 192]"),
        (changed(".weight", lambda t: t.long()), ".weight", "has dtype I64"),
        (changed(".weight.absmax", lambda t: t[:-1]), ".weight.absmax", "has shape [65] instead of [66]"),
        (changed(".weight.absmax", lambda t: t.float()), ".weight.absmax", "has dtype F32 instead of U8"),
        (changed(".weight.absmax", lambda t: t.view(2, -1)), ".weight.absmax", "has shape [2, 33] instead of [66]"),
        (changed(".weight.quant_map", lambda t: t[:8]), ".weight.quant_map", "has shape [8] instead of [16]"),
        (changed(".weight.quant_map", lambda t: t.half()), ".weight.quant_map", "has dtype F16 instead of F32"),
        (changed(".weight.nested_quant_map", lambda t: t[:255]), ".weight.nested_quant_map", "[255] instead of [256]"),
        (changed(".weight.nested_absmax", lambda t: t.repeat(2)), ".weight.nested_absmax", "has shape [2] instead of"),
        (lambda t: t.pop(".weight.nested_absmax"), ".weight", "weight.nested_absmax is missing"),
        (lambda t: t.pop(".weight.absmax"), ".weight", "weight.absmax is missing"),
        (lambda t: t.pop(".weight.quant_map"), ".weight", "weight.quant_map is missing"),
        (lambda t: t.pop(STATE), ".weight", "quant_state.bitsandbytes__nf4 is missing"),
        (lambda t: t.update({".weight.g": torch.ones(1)}), ".weight.g", "has no meaning"),
        (text(""), STATE, "has 0 bytes; a quant_state is JSON of at most 4,096"),
        (text(" " * 10_000_000), STATE, "has 10,000,000 bytes; a quant_state is JSON of at most 4,096"),
        (text("[" * 4000), STATE, "is not the JSON of a quant_state"),
        (text("{'quant_type'"), STATE, "is not the JSON of a quant_state (JSONDecodeError)"),
        (text('{"blocksize": 1' + "0" * 4000 + "}"), STATE, "says quant_type None instead of nf4"),
        (text("\ud800".encode("utf-8", "surrogatepass").decode("latin-1")), STATE, "is not the JSON"),
        (text("[1]"), STATE, "not an object"),
        (changed(STATE, lambda t: t.view(1, -1)), STATE, "bytes; a quant_state is"),
        (said(quant_type="fp4"), STATE, "says quant_type 'fp4' instead of nf4"),
        (said(quant_type=["nf4"] * 99), STATE, "says quant_type ['nf4', 'nf4'"),
        (said(shape=[2**40, 2**40]), STATE, "says shape [1099511627776, 1099511627776] instead of [22, 192]"),
        (said(shape=[192, 22]), STATE, "says shape [192, 22] instead of [22, 192]"),
        (said(shape=[-22, -192]), STATE, "says shape [-22, -192]"),
        (said(shape="22, 192"), STATE, "says shape '22, 192'"),
        (said(shape=[1] * 900), STATE, "says shape [1, 1, 1"),
        (said(shape=None), STATE, "says shape None"),
        (said(blocksize=0), STATE, "says blocksize 0 instead of a power of two from 32 to 4096"),
        (said(blocksize=48), STATE, "says blocksize 48"),
        (said(blocksize=32), ".weight.absmax", "has shape [66] instead of [132]"),
        (said(blocksize=True), STATE, "says blocksize True"),
        (said(blocksize=64.0), STATE, "says blocksize 64.0"),
        (said(nested_blocksize=10**30), STATE, "says nested_blocksize 1000000000"),
        (said(nested_blocksize=32), ".weight.nested_absmax", "has shape [1] instead of [3]"),
        (said(nested_offset="0"), STATE, "says nested_offset '0', which is not a finite number"),
        (said(nested_offset=float("nan")), STATE, "says nested_offset nan"),
        (said(nested_dtype="float16"), STATE, "says nested_dtype 'float16'"),
        (said(dtype="complex64"), STATE, "says dtype 'complex64'"),
        (said(nested_blocksize=None), ".weight.nested_absmax", "has no meaning"),
    ],
)
def test_damage_is_named(tmp_path: Path, change: Change, tensor: str, what: str) -> None:
    tensors, _ = tensors_of(SHAPE, is_double=True)
    change(tensors)
    file = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(CheckpointError) as caught:
        bitsandbytes.read(group(file, SHAPE))
    assert f"{file}: tensor {PATH}{tensor} " in str(caught.value) and what in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_stack_whose_scales_go_over_an_experts_end_is_refused(tmp_path: Path) -> None:
    for shape, is_double in (((5, 22, 42), False), (STACK, True)):
        tensors, _ = tensors_of(shape, is_double=is_double)
        with pytest.raises(CheckpointError, match="whose scales go over their ends"):
            bitsandbytes.read(group(write(tmp_path / "a.safetensors", tensors), shape))


def test_a_text_behind_the_end_of_the_file_is_refused(tmp_path: Path) -> None:
    tensors, _ = tensors_of(SHAPE)
    file = write(tmp_path / "a.safetensors", tensors)
    found = group(file, SHAPE)
    file.write_bytes(file.read_bytes()[:-8000])
    with pytest.raises(CheckpointError, match="truncated inside tensor"):
        bitsandbytes.read(found)


def test_damaged_int8_is_refused(tmp_path: Path) -> None:
    codes, absmax, _ = functional.int8_vectorwise_quant(torch.randn(SHAPE).half())
    sound = {".weight": codes, ".SCB": absmax}
    for change, what in (
        ({".weight": codes.t()}, "has shape [192, 22] instead of [22, 192]"),
        ({".weight": codes.view(torch.uint8)}, "has dtype U8 instead of I8"),
        ({".SCB": absmax[:-1]}, "has shape [21] instead of [22]"),
        ({".SCB": absmax.long()}, "has dtype I64"),
        ({".weight_format": torch.tensor(1, dtype=torch.uint8)}, "not in the order of rows"),
        ({".weight_format": torch.tensor([0, 0], dtype=torch.uint8)}, "not in the order of rows"),
    ):
        with pytest.raises(CheckpointError) as caught:
            bitsandbytes.read(group(write(tmp_path / "a.safetensors", sound | change), SHAPE))
        assert what in str(caught.value)


def test_a_mislabelled_text_is_refused(tmp_path: Path) -> None:
    tensors, _ = tensors_of(SHAPE)
    file = write(tmp_path / "a.safetensors", tensors)
    relabel(file, f"{PATH}{STATE}", dtype="I8")
    with pytest.raises(CheckpointError, match="has dtype I8 instead of U8"):
        bitsandbytes.read(group(file, SHAPE))
