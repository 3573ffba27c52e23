"""Weights as bitsandbytes stores them: NF4 and FP4, whose shape is in a JSON text in a tensor, and LLM.int8.

Matrices stand alone, or a layer's experts are stacked in one tensor.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from io import BufferedReader
from typing import Any

from model.errors import CheckpointError
from model.folder import open_regular
from model.quantization.int8_rows import Int8Rows
from model.quantization.table4 import DoubleQuantization, Table4
from model.weights.checks import damaged, no_others, require
from model.weights.sources import Group, StoredTensor, WeightSource

STATE = ".weight.quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
DTYPES = ("bfloat16", "float16", "float32")
MAX_STATE_BYTES = 4096
BLOCK_SIZES = tuple(2**n for n in range(5, 13))
_DAMAGED_JSON = (OSError, ValueError, RecursionError)


def read(group: Group) -> WeightSource | None:
    """See model.weights.sources.Reader. Reads the JSON texts, which are a few hundred bytes each."""
    if ".SCB" in group.tensors:
        return _read_int8(group)
    kind = next((kind for kind in KINDS if f"{STATE}{kind}" in group.tensors), None)
    if kind is None:
        if ".weight.absmax" in group.tensors:
            require(group, f"{STATE}nf4", ("U8",))
        return None
    return _read_table4(group, kind)


def _read_int8(group: Group) -> WeightSource:
    weight = require(group, ".weight", ("I8",), group.shape)
    absmax = require(group, ".SCB", ("F32", "F16", "BF16"), group.shape[:1])
    no_others(group, (".weight", ".SCB", ".weight_format"))
    tensors = {"weight": weight, "absmax": absmax}
    if ".weight_format" in group.tensors:
        order = require(group, ".weight_format", ("U8",))
        if order.num_bytes != 1 or _read_bytes(order) != b"\0":
            raise damaged(order, "says that the weights are not in the order of rows; save them with a newer version")
        tensors["weight_format"] = order
    return WeightSource(group.shape, Int8Rows(), tensors)


def _read_table4(group: Group, kind: str) -> WeightSource:
    state_tensor = require(group, f"{STATE}{kind}", ("U8",))
    scheme = _scheme(state_tensor, kind, group.shape)
    names = ("weight", "weight.absmax", "weight.quant_map", f"weight.quant_state.bitsandbytes__{kind}")
    nested = ("weight.nested_absmax", "weight.nested_quant_map") if scheme.double else ()
    no_others(group, [f".{name}" for name in (*names, *nested)])
    *stack, c_out, c_in = group.shape
    parts, size = math.prod(stack), c_out * c_in
    blocks = -(-size // scheme.block_size)
    weight = require(group, ".weight", ("U8", "I8", "BF16", "F16", "F32"))  # whatever the bytes are called
    if weight.num_bytes != -(-parts * size // 2):
        raise damaged(
            weight, f"has {weight.num_bytes} bytes instead of the {-(-parts * size // 2)} of {list(group.shape)}"
        )
    if stack:
        whole = scheme.block_size * (scheme.double.block_size if scheme.double else 1)
        if size % whole:
            raise damaged(
                weight, f"stacks matrices of {size} weights whose scales go over their ends; {whole} would do"
            )
    absmax = require(group, ".weight.absmax", ("U8",) if scheme.double else ("F32",), (parts * blocks,))
    tensors = {
        "weight": replace(weight, dtype="U8", shape=(parts, weight.num_bytes // parts)),
        "absmax": replace(absmax, shape=(parts, blocks)),
        "quant_map": _shared(require(group, ".weight.quant_map", ("F32",), (16,))),
        "quant_state": _shared(state_tensor),
    }
    if scheme.double:
        outer = -(-parts * blocks // scheme.double.block_size)
        nested_absmax = require(group, ".weight.nested_absmax", ("F32",), (outer,))
        tensors["nested_absmax"] = replace(nested_absmax, shape=(parts, outer // parts))
        tensors["nested_quant_map"] = _shared(require(group, ".weight.nested_quant_map", ("F32",), (256,)))
    return WeightSource(group.shape, scheme, tensors)


def _shared(tensor: StoredTensor) -> StoredTensor:
    """What all matrices of a stack have in common, with a first axis of 1: nothing takes it for one of theirs."""
    return replace(tensor, shape=(1, *tensor.shape))


def _scheme(tensor: StoredTensor, kind: str, shape: tuple[int, ...]) -> Table4:
    """What a quant_state says, checked. Raises CheckpointError."""
    if not 0 < tensor.num_bytes <= MAX_STATE_BYTES or len(tensor.shape) != 1:
        raise damaged(tensor, f"has {tensor.num_bytes:,} bytes; a quant_state is JSON of at most {MAX_STATE_BYTES:,}")
    try:
        state = json.loads(_read_bytes(tensor))
    except _DAMAGED_JSON as error:
        raise damaged(tensor, f"is not the JSON of a quant_state ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise damaged(tensor, "is not the JSON of a quant_state: not an object")
    if state.get("quant_type") != kind:
        raise damaged(tensor, f"says quant_type {state.get('quant_type')!r:.40} instead of {kind}")
    if state.get("shape") != list(shape) or any(isinstance(n, bool) for n in state["shape"]):
        raise damaged(tensor, f"says shape {state.get('shape')!r:.60} instead of {list(shape)}")
    if state.get("dtype") not in DTYPES:
        raise damaged(tensor, f"says dtype {state.get('dtype')!r:.40}, which is none of {', '.join(DTYPES)}")
    block_size = _block_size(tensor, state, "blocksize")
    if state.get("nested_blocksize") is None:
        return Table4(kind, block_size)
    offset = state.get("nested_offset")
    if not isinstance(offset, float) or not math.isfinite(offset):
        raise damaged(tensor, f"says nested_offset {offset!r:.40}, which is not a finite number")
    if state.get("nested_dtype", "float32") != "float32":
        raise damaged(tensor, f"says nested_dtype {state['nested_dtype']!r:.40} instead of float32")
    return Table4(kind, block_size, DoubleQuantization(_block_size(tensor, state, "nested_blocksize"), offset))


def _block_size(tensor: StoredTensor, state: dict[str, Any], name: str) -> int:
    size = state.get(name)
    if isinstance(size, bool) or not isinstance(size, int) or size not in BLOCK_SIZES:
        raise damaged(tensor, f"says {name} {size!r:.40} instead of a power of two from 32 to 4096")
    return size


def _read_bytes(tensor: StoredTensor) -> bytes:
    """Raises CheckpointError if the file is shorter than its header says."""
    try:
        with BufferedReader(open_regular(tensor.file)) as stream:
            stream.seek(tensor.offset)
            data = stream.read(tensor.num_bytes)
    except OSError as error:
        raise damaged(tensor, f"cannot be read ({error.strerror})") from None
    if len(data) < tensor.num_bytes:
        raise CheckpointError(f"{tensor.file}: truncated inside tensor {tensor.name}; download it again")
    return data
