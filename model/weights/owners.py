"""The parts of the model that weights belong to, and sums by part. Imports no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Owner(StrEnum):
    """In the order of tables."""

    ATTENTION = "attention"
    SHARED = "shared experts"
    ROUTED = "routed experts"
    DENSE = "dense layers"
    SMALL = "routers, norms, biases"
    EMBEDDINGS = "embeddings"
    HEAD = "head"
    VISION = "vision"


_PATTERNS = (  # the first that a name matches
    (Owner.VISION, re.compile(r"(vision_model|multi_modal_projector)\.")),
    (Owner.SMALL, re.compile(r".*(\.bias|norm\.weight|\.feed_forward\.router\.weight)$")),
    (Owner.EMBEDDINGS, re.compile(r"model\.embed_tokens\.")),
    (Owner.HEAD, re.compile(r"lm_head\.")),
    (Owner.ATTENTION, re.compile(r".*\.self_attn\.")),
    (Owner.SHARED, re.compile(r".*\.feed_forward\.shared_expert\.")),
    (Owner.ROUTED, re.compile(r".*\.feed_forward\.experts\.")),
    (Owner.DENSE, re.compile(r".*\.feed_forward\.")),
)


def owner_of(name: str) -> Owner:
    """By a weight's name in Transformer or VisionTower."""
    return next((owner for owner, pattern in _PATTERNS if pattern.match(name)), Owner.SMALL)


def is_router(name: str) -> bool:
    return name.endswith(".feed_forward.router.weight")


@dataclass(frozen=True)
class Share:
    """Weights of one owner that are stored in one form."""

    owner: Owner
    stored: str  # their scheme's label
    parameters: int
    num_bytes: int  # with scales and other companions


def shares(parts: Iterable[Share]) -> tuple[Share, ...]:
    """Sums by owner and stored form, owners in their order and the larger forms of each first."""
    parameters: Counter[tuple[Owner, str]] = Counter()
    num_bytes: Counter[tuple[Owner, str]] = Counter()
    for part in parts:
        parameters[part.owner, part.stored] += part.parameters
        num_bytes[part.owner, part.stored] += part.num_bytes
    order = list(Owner)
    keys = sorted(parameters, key=lambda key: (order.index(key[0]), -num_bytes[key], key[1]))
    return tuple(Share(*key, parameters[key], num_bytes[key]) for key in keys)
