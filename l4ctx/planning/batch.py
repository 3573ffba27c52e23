"""How many questions about the same documents are answered at a time: as many as fit beside them."""

from __future__ import annotations

from dataclasses import replace

from l4ctx.formatting import human_bytes
from l4ctx.planning.fitting import plan_memory
from l4ctx.planning.memory_plan import MemoryPlan, MemoryPlanError
from l4ctx.planning.workload import Capacity, Rows, Workload

MOST_ROWS = 32
"""Answers at a time unless the user asks for more: what they share is read once for all of them, and beyond that each
step only takes longer."""


def plan_rows(workload: Workload, capacity: Capacity, rows: Rows, *, is_chosen: bool) -> MemoryPlan:
    """The plan with at most `rows.count` answers at a time; fewer if those do not fit, unless the user has chosen.

    Rows that nobody has chosen make no prefill chunk smaller. If not even one row fits, the plan with one, whose
    shortfalls say why. Raises MemoryPlanError for a choice that does not fit where fewer do.
    """

    def plan_of(count: int) -> MemoryPlan:
        return plan_memory(replace(workload, rows=replace(rows, count=count)), capacity)

    def fits(plan: MemoryPlan) -> bool:
        is_slower = not is_chosen and plan.prefill_chunk_size < least.prefill_chunk_size
        return not plan.shortfalls(capacity) and not is_slower

    least, wanted = plan_of(1), rows.count if is_chosen else min(rows.count, MOST_ROWS)
    most = plan_of(wanted)
    if fits(most):
        return most
    if wanted == 1 or not fits(least):
        return least
    best, fitting, too_many = least, 1, wanted
    while too_many - fitting > 1:
        count = (fitting + too_many) // 2
        plan = plan_of(count)
        if fits(plan):
            best, fitting = plan, count
        else:
            too_many = count
    if is_chosen:
        raise MemoryPlanError(
            f"--batch {wanted}: {wanted} answers at a time take {human_bytes(most.workload.row_bytes)} beside what "
            f"they share, more than is free; --batch {fitting} fits"
        )
    return best
