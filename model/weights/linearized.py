"""Per-expert weights in `nn.Linear`'s layout: their names, shapes, and places in the fused weights.

Tools that quantize or fine-tune write Llama 4's experts this way. The published form is one fused tensor for all
experts of a layer, (E, C_in, C_out); a per-expert matrix is (C_out, C_in).
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
    """Which part of the fused weights `fused`, a parameter name in Transformer, a stored per-expert matrix is."""

    fused: str
    expert: int
    kind: str  # gate, up, gate_up, down

    @classmethod
    def of(cls, name: str) -> ExpertPart | None:
        """Parses a tensor's name; None if it is not a per-expert matrix."""
        found = _ONE_BY_ONE.fullmatch(name)
        if found is None:
            return None
        experts, number, kind, later_kind, later_number = found.groups()
        kind = kind or later_kind
        return cls(f"{experts}.{'down' if kind == 'down' else 'gate_up'}_proj", int(number or later_number), kind)

    def shape(self, fused: tuple[int, ...]) -> tuple[int, ...]:
        """This matrix's shape (C_out, C_in), given the fused weights' shape (E, C_in, C_out)."""
        _, c_in, c_out = fused
        return (c_out // 2 if self.kind in ("gate", "up") else c_out, c_in)

    def place(self, fused: Tensor) -> Tensor:
        """A view (C_out, C_in) of this matrix's place in the fused weights (E, C_in, C_out)."""
        matrix = fused[self.expert].t()
        half = len(matrix) // 2
        return {"gate": matrix[:half], "up": matrix[half:]}.get(self.kind, matrix)


def expert_parts(names: Iterable[str]) -> dict[str, dict[str, ExpertPart]]:
    """The per-expert matrices among `names`: fused weight -> stored name -> part."""
    found: dict[str, dict[str, ExpertPart]] = {}
    for name in names:
        part = ExpertPart.of(name)
        if part is not None:
            found.setdefault(part.fused, {})[name] = part
    return found


def missing_part(parts: Mapping[str, ExpertPart], experts: int) -> str | None:
    """The name of a missing part of one fused tensor; None if it is complete for every expert."""
    there = {(part.expert, part.kind) for part in parts.values()}
    kinds = {kind for _, kind in there}
    wanted = ("gate", "up") if kinds <= {"gate", "up"} else sorted(kinds)
    missing = ((expert, kind) for expert in range(experts) for kind in wanted if (expert, kind) not in there)
    return next((_renamed(min(parts), expert, kind) for expert, kind in missing), None)


def surplus_part(parts: Mapping[str, ExpertPart], experts: int) -> tuple[str, str] | None:
    """The name of a surplus part of one fused tensor, and why it is surplus; None if there is none."""
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
    """Uninitialised fused weights (E, C_in, C_out); 16-bit ones on a CPU get the strides of (E, C_out, C_in).

    `model.layers.linear` is faster with those strides.
    """
    e, c_in, c_out = shape
    if torch.device(device).type == "cpu" and dtype != torch.float32:
        return torch.empty(e, c_out, c_in, dtype=dtype).transpose(1, 2)
    return torch.empty(shape, dtype=dtype, device=device)


def _renamed(name: str, expert: int, kind: str) -> str:
    """`name` with its expert and kind replaced, in the same naming scheme."""
    found = _ONE_BY_ONE.fullmatch(name)
    assert found is not None, name
    if found[2] is not None:
        return f"{found[1]}.{expert}.{kind}_proj.weight"
    return f"{found[1]}.{kind}_projs.{expert}.weight"
