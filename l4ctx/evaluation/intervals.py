"""Shares with their uncertainty."""

from __future__ import annotations

import math

from l4ctx.evaluation.positions import Z95


def wilson(right: int, asked: int) -> tuple[float, float]:
    """The interval of 95 % of a share of which `right` of `asked` trials came out right.

    Wilson's (https://doi.org/10.1080/01621459.1927.10502953), which holds for few trials and near 0 and 1, too. Without
    trials it is all of 0 to 1.
    """
    if not asked:
        return 0.0, 1.0
    share, square = right / asked, Z95**2 / asked
    middle = (share + square / 2) / (1 + square)
    half = Z95 / (1 + square) * math.sqrt(share * (1 - share) / asked + square / (4 * asked))
    return max(0.0, middle - half) if right else 0.0, min(1.0, middle + half) if right < asked else 1.0
