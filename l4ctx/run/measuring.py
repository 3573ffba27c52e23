"""The matrix that `plan --measure` multiplies: in the form that the run's weights have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from l4ctx.planning.memory_plan import MemoryPlan
from l4ctx.planning.speed import MEASURED_ELEMENTS
from l4ctx.planning.weights import PLAIN
from model.errors import CheckpointError
from model.quantization.choice import Quantization
from model.weights.owners import Owner

if TYPE_CHECKING:
    from model.quantization.form import Weight

_MADE = {"w4a16": "int4", "int4": "int4", "int8": "int8", "FP8": "fp8"}
"""Stored forms that weights can be quantized to here."""


def feed_forward_weight(model: Path, plan: MemoryPlan) -> Weight | None:
    """A matrix (C_out, C_in) of the checkpoint; where it is not there, or quantized on loading, one that is made in the
    same form. None if it is computed in the dtype that it is stored in, or in a form that cannot be made."""
    from torch import Tensor

    from model.weights.loading import checked_sources, feed_forward_matrix

    workload = plan.workload
    if workload.stored is not None and workload.stored.is_made:
        return _made(plan)
    try:
        weight = feed_forward_matrix(checked_sources(model, workload.config), dtype=workload.dtype)
    except CheckpointError:
        return _made(plan)
    is_copied = not workload.weights_are_mapped and workload.dtype != "float32"
    return weight.contiguous() if is_copied and isinstance(weight, Tensor) else weight


def _made(plan: MemoryPlan) -> Weight | None:
    import torch

    from model.quantization.plain import PlainMatrix
    from model.weights.quantizing import QuantizingScheme

    config, stored = plan.workload.config, plan.workload.stored
    owners = (Owner.ROUTED, Owner.SHARED, Owner.DENSE)
    label = next((share.stored for share in stored.by_owner() if share.owner in owners), "") if stored else ""
    columns = config.hidden_size
    rows = max(1, min(config.intermediate_size, MEASURED_ELEMENTS // columns))
    if label in PLAIN:
        return (
            None
            if label == plan.workload.dtype
            else PlainMatrix(torch.ones(rows, columns, dtype=getattr(torch, label)))
        )
    kind = _MADE.get(label.partition(" (")[0])
    quantization = None if kind is None else Quantization(kind)
    if quantization is None or quantization.group_size(columns) is None:
        return None
    weight = torch.ones(rows, columns, dtype=torch.bfloat16)
    return QuantizingScheme(quantization, False, columns).build({"weight": weight}, (rows, columns))
