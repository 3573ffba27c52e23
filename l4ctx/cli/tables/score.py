"""A score as a person reads it: the figures, and a bar for each range of positions."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

from l4ctx.evaluation.positions import with_enough_tokens
from l4ctx.formatting import human_seconds, short_count

if TYPE_CHECKING:
    from typing import Any

    from l4ctx.evaluation.positions import Sums

COLUMNS_BEFORE_BARS = 31
WIDEST_BAR = 40


def score_lines(report: dict[str, Any], ranges: list[tuple[int, Sums]], columns: int) -> str:
    """Lines of at most `columns` columns, for as few as 40."""
    bits, seconds = report["bits_per_byte"], report["timings"]["prefill"]["seconds"]
    figures = [
        f"perplexity      {report['perplexity']:.4f}",
        f"nats a token    {report['nats_per_token']:.5f}",
        f"bits a byte     {bits:.5f}" if bits is not None else "",
        f"nats in all     {report['nats']:,.1f}",
        f"tokens          {report['predicted_tokens']:,}",
        f"time            {human_seconds(seconds)}",
    ]
    most = max(sums.mean for _, sums in with_enough_tokens(ranges)) or 1.0
    room = max(4, min(WIDEST_BAR, columns - COLUMNS_BEFORE_BARS))
    rows = [f"{'tokens before':13} {'perplexity':>10}  95 %"]
    for start, sums in ranges:
        bar = _bar(min(1.0, sums.mean / most), room)
        error = f"±{100 * math.expm1(sums.error):.0f} %" if sums.error < math.log(10) else ""
        rows.append(f"{_range(start, sums):13} {_perplexity(sums):>10} {error:>6} {bar}".rstrip())
    return "\n".join([*filter(None, figures), "", *rows]) + "\n"


def _range(start: int, sums: Sums) -> str:
    return str(start) if sums.tokens == 1 else f"{short_count(start)} to {short_count(start + sums.tokens)}"


def _perplexity(sums: Sums) -> str:
    return f"{sums.perplexity:,.2f}" if sums.perplexity < 10_000 else f"{sums.perplexity:.2g}"


def _bar(share: float, room: int) -> str:
    """As long as the logarithm of the perplexity says."""
    block, halves = ("█", "▌") if _writes("█▌") else ("#", "")
    whole, rest = divmod(round(2 * room * share), 2)
    return block * whole + halves * rest


def _writes(text: str) -> bool:
    """Whether standard output has these characters."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
