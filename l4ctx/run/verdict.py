"""Whether a plan fits, how long it takes and what it takes, in one line: what a person wants to know first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from l4ctx.formatting import counted, human_bytes, human_time
from l4ctx.planning.memory_plan import MARGIN_BYTES
from l4ctx.planning.remedies import MAKES_IT_FIT, remedies

if TYPE_CHECKING:
    from l4ctx.planning.workload import Workload
    from l4ctx.run.estimate import PlanReport
    from l4ctx.run.estimate_gpus import GpuReport


def verdict(report: PlanReport) -> str:
    """'fits; about 15 min; 9.5 GiB of memory' or what stands in the way, with the first remedy that suffices."""
    plan, seconds = report.plan, report.seconds if report.seconds is not None else report.assumed_seconds
    if (against := _against(report, plan.workload)) is not None:
        helps = [remedy for remedy in remedies(plan, report.capacity) if MAKES_IT_FIT in remedy]
        return f"{against}; {helps[0]}" if helps and not report.exceeds_positions else against
    parts = ["fits"]
    if seconds is not None:
        parts.append(f"about {human_time(seconds)}")
    needed = f"{human_bytes(plan.needed + MARGIN_BYTES)} of memory"
    if report.capacity.accelerator is not None:
        needed = f"{human_bytes(plan.needed_on_accelerator + MARGIN_BYTES)} on the accelerator and {needed}"
    if plan.needed_on_disk:
        needed += f" and {human_bytes(plan.needed_on_disk)} of disk"
    parts.append(needed)
    if report.weights_read:
        parts.append(f"{human_bytes(report.weights_read)} of weights read from disk again")
    return "; ".join(parts)


def verdict_on_gpus(report: GpuReport) -> str:
    """The same for GPUs that need not be here."""
    if (against := _against(report, report.rank.workload)) is not None:
        return against
    where = f"{human_bytes(report.rank.device)} on each of {counted(report.rank.mesh.ranks, 'GPU')}"
    return f"fits; about {human_time(report.prefill.total)}; {where}"


def _against(report: PlanReport | GpuReport, workload: Workload) -> str | None:
    """Why it does not fit."""
    if report.exceeds_positions:
        return (
            f"does not fit: {workload.length:,} tokens, and the model has "
            f"{workload.config.max_position_embeddings:,} positions"
        )
    lacking = [
        f"{tier}: {human_bytes(needed)} needed, {human_bytes(there)} available"
        for tier, (needed, there) in report.shortfalls.items()
    ]
    return f"does not fit: {', '.join(lacking)}" if lacking else None
