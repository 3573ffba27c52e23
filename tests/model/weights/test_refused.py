"""Forms that are not read are refused by name, with what to get instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.errors import CheckpointError
from model.weights import refused
from support.stored_groups import PATH, group, write

ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("suffixes", "settings", "form"),
    [
        ((".qweight", ".qzeros", ".scales"), {}, "AWQ or GPTQ"),
        ((".qweight", ".qzeros", ".scales"), {"quant_method": "awq"}, "AWQ"),
        ((".qweight", ".qzeros", ".scales"), {"quant_method": ["awq"]}, "AWQ or GPTQ"),
        ((".qweight", ".qzeros", ".scales", ".g_idx"), {}, "GPTQ"),
        ((".qweight", ".qzeros", ".scales"), {"quant_method": "auto-round"}, "AutoRound"),
        ((".qweight", ".scales", ".forward_hadamard_matrix"), {}, "FP-Quant"),
        ((".W_q", ".meta"), {}, "HQQ"),
        ((".weight", ".weight_scales"), {}, "EETQ"),
        ((".codes", ".codebooks", ".scales"), {}, "AQLM"),
        ((".centroids", ".indices"), {}, "VPTQ"),
        ((".Qidxs", ".SU"), {}, "QuIP#"),
        ((".weight", ".scales", ".tables"), {}, "HIGGS"),
        ((".weight_qdata", ".weight_scale"), {}, "torchao"),
        ((".weight._data", ".weight._scale"), {}, "quanto"),
        ((".dense_weights", ".row_offsets"), {}, "SpQR"),
        ((".B", ".s"), {}, "Marlin"),
    ],
)
def test_known_forms_are_refused_by_name(
    tmp_path: Path, suffixes: tuple[str, ...], settings: dict[str, object], form: str
) -> None:
    file = write(tmp_path / "a.safetensors", dict.fromkeys(suffixes, ONE))
    with pytest.raises(CheckpointError) as caught:
        refused.read(group(file, (22, 42), settings))
    assert f"{file}: tensor {PATH}" in str(caught.value)
    assert f"is quantized with {form}, which is not read: of the same model, get" in str(caught.value)


def test_what_is_read_is_not_refused(tmp_path: Path) -> None:
    for suffixes in (
        (".weight",),
        (".weight", ".weight_scale"),
        (".weight_packed", ".weight_scale", ".weight_shape"),
        (".weight", ".scales", ".biases"),
        (".weight", ".weight.absmax", ".weight.quant_map"),
    ):
        found = group(
            write(tmp_path / "a.safetensors", dict.fromkeys(suffixes, ONE)), (22, 42), {"quant_method": "awq"}
        )
        assert refused.read(found) is None


def test_unknown_forms_are_refused_by_the_configurations_name(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", {".weight": torch.ones(1, dtype=torch.int64), ".mystery": ONE})
    for settings, form in (
        ({"quant_method": "torchao"}, "torchao"),
        ({"quant_method": "new"}, "quant_method 'new'"),
        ({"quant_method": 3}, "a form"),
    ):
        error = refused.unknown(group(file, (22, 42), settings))
        assert f"tensor {PATH}.mystery has dtype F32 and is quantized with {form}, which is not read" in str(error)
