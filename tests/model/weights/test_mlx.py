"""MLX's tensors of one module are recognised, checked and expanded; damage is refused by one line that names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.errors import CheckpointError
from model.weights import mlx
from support.stored_groups import PATH, group, matrices, relabel, write

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

from support.mlx_arrays import from_torch, to_torch  # noqa: E402

NAME = f"language_model.{PATH}"
SHAPE, STACK = (22, 192), (5, 22, 192)
SETTINGS = {"group_size": 64, "bits": 4}


def saved(file: Path, shape: tuple[int, ...] = SHAPE, **how: Any) -> tuple[Path, torch.Tensor]:
    """A file written by MLX, and its dequantization in float32."""
    weight = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    arrays = mx.quantize(from_torch(weight.bfloat16()), **how)
    mx.save_safetensors(
        str(file), {f"{NAME}.{part}": array for part, array in zip(("weight", "scales", "biases"), arrays, strict=True)}
    )
    wide = [array if array.dtype == mx.uint32 else array.astype(mx.float32) for array in arrays]
    return file, to_torch(mx.dequantize(*wide, **how))


@pytest.mark.parametrize("settings", [{}, {"group_size": 64, "bits": 8}, {"quant_method": "other", "bits": 4}])
@pytest.mark.parametrize("shape", [SHAPE, STACK])
def test_matrices_and_stacks_are_read(tmp_path: Path, shape: tuple[int, ...], settings: dict[str, Any]) -> None:
    file, expected = saved(tmp_path / "a.safetensors", shape, bits=8, group_size=64)
    source = mlx.read(group(file, shape, settings))
    assert source is not None and source.shape == shape and source.scheme.label == "int8 (affine, groups of 64)"
    assert source.num_bytes == sum(tensor.num_bytes for tensor in group(file, shape).tensors.values())
    found = torch.stack([matrix.expanded() for matrix in matrices(source)])
    assert torch.equal(found.view(shape), expected)


def test_a_module_may_differ_from_the_others(tmp_path: Path) -> None:
    file, _ = saved(tmp_path / "a.safetensors", bits=6, group_size=32)
    for own in ({"group_size": 32, "bits": 6}, {"group_size": 32, "bits": 6, "mode": "affine"}):
        source = mlx.read(group(file, SHAPE, SETTINGS | {NAME: own}))
        assert source is not None and source.scheme.label == "int6 (affine, groups of 32)"
    for own, what in (
        ({"group_size": 64, "bits": 6}, "has group_size 32 by its shape, though config.json says 64"),
        ({"group_size": 32, "bits": "six"}, "has bits 6 by its shape, though config.json says 'six'"),
        ({"group_size": 32, "bits": 6, "mode": "mxfp4"}, "has mode affine"),
        (False, "is quantized (int6 (affine, groups of 32)), though config.json says that it is not"),
        ([1], "[1] of it, which is not an object"),
    ):
        with pytest.raises(CheckpointError) as caught:
            mlx.read(group(file, SHAPE, SETTINGS | {NAME: own}))
        assert f"tensor {NAME}.weight" in str(caught.value) and what in str(caught.value)


def test_other_forms_are_left_to_other_readers(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", {".weight": torch.ones(SHAPE)})
    assert mlx.read(group(file, SHAPE)) is None
    file = write(tmp_path / "b.safetensors", {".qweight": torch.ones(SHAPE), ".scales": torch.ones(SHAPE)})
    assert mlx.read(group(file, SHAPE)) is None


Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], object]


def without(suffix: str) -> Change:
    return lambda tensors: tensors.pop(suffix)


def changed(suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: tensors.update({suffix: change(tensors[suffix])})


@pytest.mark.parametrize(
    ("change", "tensor", "what"),
    [
        (without(".scales"), ".weight", f"is there, but {PATH}.scales is missing"),
        (without(".biases"), ".weight", f"is there, but {PATH}.biases is missing"),
        (changed(".weight", lambda t: t[:, :-1]), ".weight", "has 23 words for 192 weights a row"),
        (changed(".weight", lambda t: t[:, :12]), ".weight", "has bits 2 by its shape, though config.json says 4"),
        (changed(".weight", lambda t: t[:-1]), ".weight", "has shape [21, 24], which does not fit weights [22, 192]"),
        (changed(".weight", lambda t: t.view(1, *t.shape)), ".weight", "does not fit weights [22, 192]"),
        (changed(".weight", lambda t: t[:, :0]), ".weight", "does not fit weights [22, 192]"),
        (changed(".weight", lambda t: t.view(torch.int32)), ".weight", "has dtype I32 instead of U32"),
        (changed(".weight", lambda t: t.view(torch.uint8)), ".weight", "has dtype U8 instead of U32"),
        (changed(".scales", lambda t: t[:, :2]), ".scales", "has shape [22, 2], groups of 96; MLX has 32, 64 and 128"),
        (changed(".scales", lambda t: t.repeat(1, 2)), ".biases", "has shape [22, 3] instead of [22, 6]"),
        (changed(".scales", lambda t: t[:, :0]), ".scales", "has shape [22, 0], which does not fit"),
        (changed(".scales", lambda t: t.repeat(1, 3)[:, :7]), ".scales", "7 groups a row, which do not divide 192"),
        (changed(".scales", lambda t: t.t().contiguous()), ".scales", "has shape [3, 22], which does not fit"),
        (changed(".scales", lambda t: t.float()), ".biases", "has dtype BF16 instead of F32"),
        (changed(".scales", lambda t: t.view(torch.int16)), ".scales", "has dtype I16 instead of F32 or F16 or BF16"),
        (changed(".biases", lambda t: t[:-1]), ".biases", "has shape [21, 3] instead of [22, 3]"),
        (changed(".biases", lambda t: t.half()), ".biases", "has dtype F16 instead of BF16"),
        (lambda t: t.update({".g_idx": torch.ones(3)}), ".g_idx", "has no meaning"),
    ],
)
def test_damage_is_named(tmp_path: Path, change: Change, tensor: str, what: str) -> None:
    """By its tensor, whatever the configuration says."""
    file, _ = saved(tmp_path / "a.safetensors", bits=4, group_size=64)
    tensors = {name.removeprefix(NAME): tensor for name, tensor in load_file(file).items()}
    change(tensors)
    with pytest.raises(CheckpointError) as caught:
        mlx.read(group(write(file, tensors), SHAPE, SETTINGS))
    assert f"{file}: tensor {PATH}{tensor} " in str(caught.value) and what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mislabelled_tensors_are_refused(tmp_path: Path) -> None:
    """The bytes of the scales, called something else of the same size, or of another shape."""
    for changes, what in (
        ({"dtype": "U16"}, "has dtype U16"),
        ({"dtype": "F16"}, "has dtype BF16 instead of F16"),
        ({"shape": [3, 22]}, "does not fit"),
        ({"shape": [22, 1, 3]}, "does not fit"),
    ):
        file, _ = saved(tmp_path / "a.safetensors", bits=4, group_size=64)
        relabel(file, f"{NAME}.scales", **changes)
        with pytest.raises(CheckpointError, match=f"tensor {NAME}") as caught:
            mlx.read(group(file, SHAPE, SETTINGS))
        assert what in str(caught.value)


def test_another_shape_than_the_models_is_refused(tmp_path: Path) -> None:
    file, _ = saved(tmp_path / "a.safetensors", bits=4, group_size=64)
    for shape in ((22, 384), (44, 192), (22,), STACK):
        with pytest.raises(CheckpointError, match="tensor"):
            mlx.read(group(file, shape, SETTINGS))
