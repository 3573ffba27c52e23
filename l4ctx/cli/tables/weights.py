"""A run's weights by owner and tier as a table."""

from __future__ import annotations

from collections.abc import Sequence

from l4ctx.cli.tables.layout import FigureTable
from l4ctx.formatting import human_bytes
from l4ctx.planning.placement import PlacedWeights, Tier

COLUMNS = {
    Tier.MAPPED: "mapped",
    Tier.STREAMED: "read again",
    Tier.MEMORY: "in memory",
    Tier.DEVICE: "accelerator",
}
MOST_FORMS = 2


def weights_table(weights: Sequence[PlacedWeights]) -> FigureTable:
    """One row for each owner and the forms that its weights are stored in; only tiers that hold some."""
    tiers = [tier for tier in Tier if any(row.tiers.get(tier) for row in weights)]
    table = FigureTable("weights", [COLUMNS[tier] for tier in tiers])
    for row in weights:
        amounts = [row.tiers.get(tier, 0) for tier in tiers]
        table.add_row(f"{row.owner}: {_forms(row.stored)}", *(human_bytes(n) if n else "" for n in amounts))
    return table


def _forms(stored: Sequence[str]) -> str:
    """Without what is in brackets, and those with the most bytes alone."""
    names = list(dict.fromkeys(name.partition(" (")[0] for name in stored))
    return ", ".join(names[:MOST_FORMS]) + (f" and {len(names) - MOST_FORMS} more" if len(names) > MOST_FORMS else "")
