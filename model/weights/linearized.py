"""Experts that are stored one by one, as `nn.Linear` has them: names, shapes, and their places in the fused weights.

Tools that quantize or fine-tune write Llama 4's experts so. The published form is one tensor for all experts of a
layer, (E, C_in, C_out); a single one is (C_out, C_in). Knows nothing of files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_ONE_BY_ONE = re.compile(
    r"(.*\.experts)\.(?:(\d{1,6})\.(gate|up|gate_up|down)_proj"
    r"|(gate|up|gate_up|down)_projs\.(\d{1,6}))\.weight"
)


@dataclass(frozen=True)
class ExpertPart:
    """What one stored matrix is of the fused weights `fused`, a name in Transformer."""

    fused: str
    expert: int
    kind: str  # gate, up, gate_up, down

    @classmethod
    def of(cls, name: str) -> ExpertPart | None:
        """By a tensor's name; None for all that is no single expert's matrix."""
        found = _ONE_BY_ONE.fullmatch(name)
        if found is None:
            return None
        experts, number, kind, later_kind, later_number = found.groups()
        kind = kind or later_kind
        return cls(f"{experts}.{'down' if kind == 'down' else 'gate_up'}_proj", int(number or later_number), kind)

    def shape(self, fused: tuple[int, ...]) -> tuple[int, ...]:
        """(C_out, C_in) of this matrix, where the fused weights are (E, C_in, C_out)."""
        _, c_in, c_out = fused
        return (c_out // 2 if self.kind in ("gate", "up") else c_out, c_in)

    def place(self, fused: Tensor) -> Tensor:
        """Where this matrix lies in the fused weights (E, C_in, C_out): a view (C_out, C_in)."""
        matrix = fused[self.expert].t()
        half = len(matrix) // 2
        return {"gate": matrix[:half], "up": matrix[half:]}.get(self.kind, matrix)


def expert_parts(names: Iterable[str]) -> dict[str, dict[str, ExpertPart]]:
    """Of the fused weights of which single matrices are among `names`: those by their names."""
    found: dict[str, dict[str, ExpertPart]] = {}
    for name in names:
        part = ExpertPart.of(name)
        if part is not None:
            found.setdefault(part.fused, {})[name] = part
    return found


def missing_part(parts: Mapping[str, ExpertPart], experts: int) -> str | None:
    """A name that is missing among the parts of one fused tensor; None if every expert's are there."""
    there = {(part.expert, part.kind) for part in parts.values()}
    kinds = {kind for _, kind in there}
    wanted = ("gate", "up") if kinds <= {"gate", "up"} else sorted(kinds)
    lacking = ((expert, kind) for expert in range(experts) for kind in wanted if (expert, kind) not in there)
    return next((_renamed(min(parts), expert, kind) for expert, kind in lacking), None)


def surplus_part(parts: Mapping[str, ExpertPart], experts: int) -> tuple[str, str] | None:
    """A name among the parts of one fused tensor that has no place of its own, and why; None if there is none."""
    is_joined = any(part.kind == "gate_up" for part in parts.values())
    seen: dict[tuple[int, str], str] = {}
    for name, part in sorted(parts.items()):
        if part.expert >= experts:
            return name, f"there are {experts} experts"
        if is_joined and part.kind in ("gate", "up"):
            return name, "gate_up_proj is there, too"
        if (part.expert, part.kind) in seen:
            return name, f"{seen[part.expert, part.kind]} is the same"
        seen[part.expert, part.kind] = name
    return None


def empty_fused(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Room for fused weights (E, C_in, C_out). On a CPU 16-bit ones lie as (E, C_out, C_in), for layers.linear."""
    e, c_in, c_out = shape
    if torch.device(device).type == "cpu" and dtype != torch.float32:
        return torch.empty(e, c_out, c_in, dtype=dtype).transpose(1, 2)
    return torch.empty(shape, dtype=dtype, device=device)


def _renamed(name: str, expert: int, kind: str) -> str:
    """The name that another matrix has beside the one called `name`."""
    found = _ONE_BY_ONE.fullmatch(name)
    assert found is not None, name
    if found[2] is not None:
        return f"{found[1]}.{expert}.{kind}_proj.weight"
    return f"{found[1]}.{kind}_projs.{expert}.weight"
