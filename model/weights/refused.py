"""Quantized forms that are known but not read, and what to download instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.errors import CheckpointError
from model.weights.checks import damaged
from model.weights.sources import Group, WeightSource

INSTEAD = "of the same model, get compressed-tensors (w4a16 or FP8), GGUF, MLX or bfloat16 weights"

SIGNATURES = {
    "FP-Quant": (".qweight", ".forward_hadamard_matrix"),
    "GPTQ": (".qweight", ".g_idx"),
    "AWQ or GPTQ": (".qweight",),
    "SpQR": (".dense_weights", ".row_offsets"),
    "Marlin": (".B", ".s"),
    "HQQ": (".W_q",),
    "AQLM": (".codebooks",),
    "VPTQ": (".centroids",),
    "QuIP#": (".Qidxs",),
    "HIGGS": (".weight", ".scales", ".tables"),
    "EETQ": (".weight", ".weight_scales"),
    "quanto": (".weight._data",),
    "torchao": (".weight_qdata",),
    "MXFP4 of gpt-oss": ("_blocks", "_scales"),
}
"""Companions by which a form is known: the first whose suffixes are all there."""

METHODS = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "eetq": "EETQ",
    "fp_quant": "FP-Quant",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "mxfp4": "MXFP4 of gpt-oss",
    "quanto": "quanto",
    "quark": "Quark",
    "sinq": "SINQ",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}
"""quant_method in config.json -> the form's name."""


def read(group: Group) -> WeightSource | None:
    """See model.weights.sources.Reader. Raises CheckpointError for a form that is known by its tensors' names."""
    known = next((form for form, needed in SIGNATURES.items() if group.tensors.keys() >= set(needed)), None)
    if known is None:
        return None
    tensor = group.tensors[SIGNATURES[known][0]]
    said = method(group.settings)
    raise damaged(tensor, f"is quantized with {said or known}, which is not read: {INSTEAD}")


def method(settings: Mapping[str, Any]) -> str | None:
    """The form that config.json's quantization_config names, if it is one that is not read."""
    name = settings.get("quant_method")
    return METHODS.get(name) if isinstance(name, str) else None


def unknown(group: Group) -> CheckpointError:
    """The error for a group that no reader knows: it names the last tensor of those that make it strange."""
    tensor = group.tensors[max(group.tensors, key=len)]
    said = group.settings.get("quant_method")
    form = method(group.settings) or (f"quant_method {said!r:.40}" if isinstance(said, str) else "a form")
    return damaged(tensor, f"has dtype {tensor.dtype} and is quantized with {form}, which is not read: {INSTEAD}")
