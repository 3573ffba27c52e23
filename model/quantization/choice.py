"""Which of a model's weights are quantized while they are loaded, and how. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

SCALE_BYTES = 2  # bfloat16
GROUP_SIZES = {"int4": (128, 64, 32), "int4-g32": (32,)}
"""Weights along C_in that share a scale; the first that divides C_in is taken."""

NONE = "none"
"""How options and saved contexts spell that nothing is quantized on loading."""

KINDS = ("int8", "int4", "int4-g32", "fp8")
"""int8 and fp8 (e4m3) have a scale a row, the others one a group."""

CHANNEL = 0
"""Stands for a group that is a whole row."""

_FEED_FORWARD = re.compile(
    r"model\.layers\.\d+\.feed_forward\.(experts\..+|(shared_expert\.)?(gate|up|gate_up|down)_proj\.weight)"
)
_ATTENTION = re.compile(r"model\.layers\.\d+\.self_attn\.[qkvo]_proj\.weight")


@dataclass(frozen=True)
class Quantization:
    """The feed-forward layers' matrices (experts, shared experts, dense layers), and perhaps those of attention.

    Everything else stays as it is stored: routers, norms, biases, embeddings, the head, the vision tower; and matrices
    whose C_in is no multiple of a group size.
    """

    kind: str  # one of KINDS
    with_attention: bool = False

    @classmethod
    def parse(cls, text: str) -> Quantization:
        """From "int4" or "int4+attention". Raises ValueError."""
        kind, plus, rest = text.partition("+")
        if kind not in KINDS or (plus and rest != "attention"):
            raise ValueError(f"{text!r} is not one of {', '.join(KINDS)}, perhaps followed by +attention")
        return cls(kind, bool(plus))

    def covers(self, name: str) -> bool:
        """By a weight's name in Transformer."""
        return bool(_FEED_FORWARD.fullmatch(name) or (self.with_attention and _ATTENTION.fullmatch(name)))

    def group_size(self, columns: int) -> int | None:
        """Weights of a row of `columns` that share a scale, CHANNEL for all of them; None: it is not quantized."""
        if self.kind not in GROUP_SIZES:
            return CHANNEL
        return next((size for size in GROUP_SIZES[self.kind] if columns % size == 0), None)

    def num_bytes(self, rows: int, columns: int) -> int | None:
        """Bytes of a matrix (C_out, C_in) of these sizes, scales included; None if it is not quantized."""
        size = self.group_size(columns)
        if size is None:
            return None
        if size == CHANNEL:
            return rows * (columns + SCALE_BYTES)
        return rows * (columns // 2 + columns // size * SCALE_BYTES)

    def __str__(self) -> str:
        """As the command line and saved contexts have it."""
        return f"{self.kind}+attention" if self.with_attention else self.kind
