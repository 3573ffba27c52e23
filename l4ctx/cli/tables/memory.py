"""The memory report as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from l4ctx.cli.tables.layout import FigureTable
from l4ctx.formatting import counted, human_bytes
from l4ctx.planning.memory_plan import MARGIN_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from l4ctx.run.memory_report import MemoryReport
    from l4ctx.run.rank_report import RankReport


def memory_table(report: MemoryReport) -> FigureTable:
    """One row for each owner of memory: bytes predicted for the end and at most, bytes held, and the measured peak."""
    plan, end, most = report.predicted, report.predicted.end, report.predicted.peak
    table = FigureTable("memory", ("predicted", "at most", "held", "peak"))

    def row(name: str, *values: int | None) -> None:
        if any(values):
            table.add_row(name, *("" if value is None else human_bytes(value) for value in values))

    row(
        "weights, mapped from the checkpoint" if plan.weights_are_mapped else "weights",
        plan.weights,
        None,
        report.weights,
    )
    if plan.device_weights is not None:
        row("weight buffers, accelerator", plan.device_weights.residency.buffers, None, report.weight_buffers)
    row("RoPE windows", end.rope_windows, most.rope_windows, report.rope_windows)
    row("NoPE keys and values, accelerator", end.nope_device, most.nope_device, report.nope_device)
    row("NoPE keys and values, host memory", end.nope_host, most.nope_host, report.nope_host)
    row("NoPE keys and values, disk", end.nope_disk, most.nope_disk, report.nope_disk)
    row("read buffers", end.buffers, most.buffers, report.buffers)
    row("  pinned beforehand, of both", end.pinned, most.pinned, report.pinned)
    if plan.workload.rows is not None:
        row(f"{counted(plan.workload.rows.count, 'answer')} at a time", None, plan.workload.row_bytes)
    row("the state before the last turn", None, plan.workload.kept_state)
    row("token ids", plan.token_ids, None, report.token_ids)
    row("index for drafts", None, plan.draft_index, report.draft_index)
    row("activations", None, plan.activations)
    row("images and the vision tower", None, plan.images)
    if report.process and report.process_peak:
        row("process, anonymous", None, None, report.process.anonymous, report.process_peak.anonymous)
        row("process, file-backed", None, None, report.process.file_backed, report.process_peak.file_backed)
    row("accelerator", None, None, None, report.accelerator_peak)
    for share, there in zip(plan.shares, report.devices, strict=bool(report.devices)):
        keys_values = there.rope_windows + there.nope
        row(
            f"  {there.name}, layers {share.numbers}",
            None,
            share.needed - MARGIN_BYTES,
            there.weights + keys_values,
            there.peak,
        )
    held = report.rope_windows + report.nope_device + report.nope_host + report.buffers
    row("keys and values in memory", end.total, None, held)
    row("  an unbounded cache would take", plan.unbounded_cache)
    return table


def ranks_table(ranks: Iterable[RankReport]) -> FigureTable:
    """One row for each rank: what it read of the weights, what it holds, and how much its process grew."""
    table = FigureTable("ranks", ("read, its share", "read by all", "weights", "keys and values", "process grew by"))
    for rank in ranks:
        grown = rank.peak.anonymous - rank.before.anonymous if rank.peak and rank.before else None
        sizes = (*rank.read, rank.weights, rank.keys_values, grown)
        table.add_row(f"rank {rank.number}", *("" if size is None else human_bytes(size) for size in sizes))
    return table
