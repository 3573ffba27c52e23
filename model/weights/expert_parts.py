"""The forms in which a layer's experts are stored: fused as published, one by one, or stacked by kind.

Published: `experts.gate_up_proj` (E, C_in, C_out) and `experts.down_proj`, transposed relative to nn.Linear. Tools that
quantize or fine-tune write one matrix (C_out, C_in) an expert, `experts.3.gate_proj.weight`, or stack them by kind,
`experts.gate_proj.weight` (E, C_out, C_in).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_APART = re.compile(
    r"(.*\.experts)\.(?:(\d{1,6})\.(gate|up|gate_up|down)_proj"
    r"|(gate|up|gate_up|down)_projs\.(\d{1,6})"
    r"|(gate|up|gate_up|down)_proj)\.weight"
)
_FUSED = re.compile(r"(.*\.experts)\.(gate_up|down)_proj")


@dataclass(frozen=True)
class ExpertPart:
    """Which part of a layer's experts a stored weight is; `experts` is their module's path in Transformer."""

    experts: str
    expert: int | None  # None: all of them
    kind: str  # gate, up, gate_up, down
    is_fused: bool = False

    @classmethod
    def of(cls, name: str) -> ExpertPart | None:
        """Parses a weight's name; None if it is not of routed experts."""
        if (fused := _FUSED.fullmatch(name)) is not None:
            return cls(fused[1], None, fused[2], is_fused=True)
        found = _APART.fullmatch(name)
        if found is None:
            return None
        experts, number, kind, later_kind, later_number, stacked_kind = found.groups()
        number = number or later_number
        return cls(experts, None if number is None else int(number), kind or later_kind or stacked_kind)

    @property
    def fused(self) -> str:
        """The name of the parameter in Transformer that this is a part of."""
        return f"{self.experts}.{'down' if self.kind == 'down' else 'gate_up'}_proj"

    def shape(self, fused: tuple[int, ...]) -> tuple[int, ...]:
        """This part's shape, given the fused weights' shape (E, C_in, C_out)."""
        if self.is_fused:
            return fused
        e, c_in, c_out = fused
        matrix = (c_out // 2 if self.kind in ("gate", "up") else c_out, c_in)
        return matrix if self.expert is not None else (e, *matrix)


def parts_by_weight(names: Iterable[str]) -> dict[str, dict[str, ExpertPart]]:
    """The experts' parts among `names`: fused weight -> stored name -> part."""
    found: dict[str, dict[str, ExpertPart]] = {}
    for name in names:
        part = ExpertPart.of(name)
        if part is not None:
            found.setdefault(part.fused, {})[name] = part
    return found


def missing_part(parts: Mapping[str, ExpertPart], experts: int) -> str | None:
    """The name of a missing part of one fused weight; None if it is complete for every expert."""
    there = {
        (expert, part.kind)
        for part in parts.values()
        for expert in (range(experts) if part.expert is None else (part.expert,))
    }
    kinds = {kind for _, kind in there}
    wanted = ("gate", "up") if kinds <= {"gate", "up"} else sorted(kinds)
    missing = ((expert, kind) for expert in range(experts) for kind in wanted if (expert, kind) not in there)
    return next((_renamed(min(parts), expert, kind) for expert, kind in missing), None)


def surplus_part(parts: Mapping[str, ExpertPart], experts: int) -> tuple[str, str] | None:
    """The name of a surplus part of one fused weight, and why it is surplus; None if there is none."""
    whole = next((part.fused for part in parts.values() if part.is_fused), None)
    is_joined = any(part.kind == "gate_up" for part in parts.values())
    stacked = {part.kind: name for name, part in parts.items() if part.expert is None and not part.is_fused}
    seen: dict[tuple[int | None, str], str] = {}
    for name, part in sorted(parts.items()):
        if whole is not None and not part.is_fused:
            return name, f"{whole} holds all experts"
        if part.expert is not None and part.expert >= experts:
            return name, f"there are {experts} experts"
        if is_joined and part.kind in ("gate", "up"):
            return name, "gate_up_proj is there, too"
        if part.expert is not None and part.kind in stacked:
            return name, f"{stacked[part.kind]} holds all experts"
        if (part.expert, part.kind) in seen:
            return name, f"{seen[part.expert, part.kind]} is the same"
        seen[part.expert, part.kind] = name
    return None


def _renamed(name: str, expert: int, kind: str) -> str:
    """`name` with its expert and kind replaced, in the same naming scheme."""
    found = _APART.fullmatch(name)
    if found is None or found[6] is not None:
        return f"{found[1] if found else name.rpartition('.')[0]}.{kind}_proj.weight"
    if found[2] is not None:
        return f"{found[1]}.{expert}.{kind}_proj.weight"
    return f"{found[1]}.{kind}_projs.{expert}.weight"
