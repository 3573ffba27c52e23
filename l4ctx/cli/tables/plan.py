"""The report of `l4ctx plan` as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from l4ctx.cli.tables.layout import FigureTable, TextTable
from l4ctx.cli.tables.weights import weights_table
from l4ctx.formatting import counted, human_bytes, human_time, without_controls
from l4ctx.planning.memory_plan import MARGIN_BYTES, MemoryPlan
from l4ctx.planning.remedies import remedies
from l4ctx.run.estimate import PlanReport
from l4ctx.run.forms import read_a_token, reading_less
from l4ctx.run.verdict import verdict

if TYPE_CHECKING:
    from rich.console import RenderableType

SHOWN = 20
"""Rows of documents, of folders and of what was left out, unless all are wanted."""


def plan_table(report: PlanReport, *, is_whole: bool = False) -> RenderableType:
    """The verdict; then documents with their tokens, bytes by owner and tier, and what follows from them.

    `is_whole`: however many documents there are, and whatever was left out.
    """
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(verdict(report), style="bold")]
    if report.documents:
        parts += ["", _documents(report, is_whole=is_whole)]
        if len(report.folders) > 1:
            parts += ["", _folders(report, is_whole=is_whole)]
    if report.skipped:
        parts += ["", _left_out(report, is_whole=is_whole)]
    parts += ["", _memory(report)]
    if report.plan.weights_by_owner:
        parts += ["", weights_table(report.plan.weights_by_owner)]
    parts += ["", _facts(report)]
    if any(form.fits for form in report.forms):
        parts += ["", _forms(report)]
    return Group(*parts)


def _documents(report: PlanReport, *, is_whole: bool) -> FigureTable:
    """The largest first."""
    return _shares("documents", sorted(report.documents, key=lambda document: -document[1]), report, is_whole=is_whole)


def _folders(report: PlanReport, *, is_whole: bool) -> FigureTable:
    """Subtotals of the documents that lie in a folder itself, the largest first."""
    rows = [(f"{name} ({counted(number, 'document')})", tokens) for name, number, tokens in report.folders]
    return _shares("folders", rows, report, is_whole=is_whole)


def _shares(title: str, rows: list[tuple[str, int]], report: PlanReport, *, is_whole: bool) -> FigureTable:
    table, total = FigureTable(title, ("tokens", "share")), report.plan.workload.prompt_tokens
    shown = rows if is_whole else rows[:SHOWN]
    for name, tokens in shown:
        table.add_row(without_controls(name), f"{tokens:,}", f"{tokens / total:.0%}")
    if len(shown) < len(rows):
        rest = sum(tokens for _, tokens in rows[len(shown) :])
        table.add_row(f"{len(rows) - len(shown)} smaller ones (--all)", f"{rest:,}", f"{rest / total:.0%}")
    return table


def _left_out(report: PlanReport, *, is_whole: bool) -> TextTable:
    table = TextTable(f"left out: {len(report.skipped):,}")
    shown = report.skipped if is_whole else report.skipped[:SHOWN]
    for entry in shown:
        table.add_row(without_controls(entry.source), without_controls(entry.reason))
    if len(shown) < len(report.skipped):
        table.add_row(f"{len(report.skipped) - len(shown):,} more", "--all lists them")
    return table


def _memory(report: PlanReport) -> FigureTable:
    """Bytes by owner and tier, at the end of the run and at its peak, beside what is free."""
    plan, end, most, capacity = report.plan, report.plan.end, report.plan.peak, report.capacity
    table = FigureTable("memory", ("at the end", "peak", "free"))

    def row(name: str, *values: int | None) -> None:
        if any(values):
            table.add_row(name, *("" if value is None else human_bytes(value) for value in values))

    row("weights, mapped from the checkpoint" if plan.weights_are_mapped else "weights", plan.weights)
    if plan.weight_residency.is_streamed:
        row("  in memory at a time", plan.weight_residency.kept, plan.resident_weights)
    if plan.device_weights is not None:
        buffers = plan.device_weights.residency.buffers
        row(
            "  on the accelerator, with buffers", plan.device_weights.on_device - buffers, plan.device_weights.on_device
        )
    row("RoPE windows", end.rope_windows, most.rope_windows)
    row("NoPE keys and values, accelerator", end.nope_device, most.nope_device)
    row("NoPE keys and values, host memory", end.nope_host, most.nope_host)
    row("NoPE keys and values, disk", end.nope_disk, most.nope_disk)
    row("read buffers", end.buffers, most.buffers)
    row("  pinned beforehand, of both", end.pinned, most.pinned)
    row("token ids", plan.token_ids)
    row("index for drafts", None, plan.draft_index)
    row("activations", None, plan.activations)
    row("images and the vision tower", None, plan.images)
    if capacity.accelerator is not None:
        margin = MARGIN_BYTES * max(1, len(plan.shares))
        free = capacity.accelerator if plan.shares else capacity.with_one(plan.device).accelerator
        row("accelerator, total with margin", None, plan.needed_on_accelerator + margin, free)
    for share in plan.shares:
        row(f"  GPU {share.device}, layers {share.numbers}", None, share.needed, capacity.accelerators[share.device])
    row("host memory, total with margin", None, plan.needed + MARGIN_BYTES, capacity.host)
    if capacity.has_disk:
        row("disk, total", None, plan.needed_on_disk, capacity.disk)
    row("  an unbounded cache would take", plan.unbounded_cache)
    return table


def _facts(report: PlanReport) -> TextTable:
    """What will be done, whether it fits, how long it takes, and what would help."""
    plan, workload = report.plan, report.plan.workload
    table = TextTable("run")
    answer = f" and {workload.max_new_tokens:,} for the answer" if workload.max_new_tokens else ""
    positions = f"the model has {workload.config.max_position_embeddings:,} positions"
    table.add_row("tokens", f"{workload.prompt_tokens:,}{answer}; {positions}")
    table.add_row("prefill chunk", f"{plan.prefill_chunk_size:,} tokens, in {workload.dtype}")
    table.add_row("KV cache", f"{_tiers(plan)}, in {plan.layout.kv_dtype}")
    disk = "" if report.tokens_with_disk is None else f", {report.tokens_with_disk:,} with the disk"
    table.add_row("would fit", f"{report.tokens_in_memory:,} tokens in memory alone{disk}")
    residency = plan.weight_residency
    if residency.is_streamed:
        again, a_token = human_bytes(residency.read_a_step), human_bytes(read_a_token(plan))
        in_all = f", {human_bytes(report.weights_read)} in all" if report.weights_read else ""
        table.add_row(
            "weights read again",
            f"{again} for each prefill chunk{in_all}; up to {a_token} for each token of the answer",
        )
    if report.read_from_disk:
        table.add_row("disk reads", f"{human_bytes(report.read_from_disk)} over the whole prefill")
    if report.seconds is not None:
        table.add_row("prefill takes", f"about {human_time(report.seconds)}")
    elif report.assumed_seconds is not None:
        table.add_row("prefill takes", f"about {human_time(report.assumed_seconds)}{_assumed(report)}")
    table.add_row("fits here", "yes" if report.fits else "no")
    for tier, (needed, there) in report.shortfalls.items():
        table.add_row("", f"{tier}: {human_bytes(needed)} needed, {human_bytes(there)} available")
    if report.exceeds_positions:
        table.add_row("", f"more tokens than the model has positions: {workload.length:,}")
    for number, remedy in enumerate(reading_less(plan, report.capacity, report.forms)):
        table.add_row("what reads less" if number == 0 else "", remedy)
    for number, remedy in enumerate(remedies(plan, report.capacity)):
        table.add_row("what helps" if number == 0 else "", without_controls(remedy))
    return table


def _assumed(report: PlanReport) -> str:
    """What the time is computed from, where it was neither given nor measured."""
    rates = f"{report.capacity.operations / 1e9:,.0f} GFLOP/s"
    if report.plan.weight_residency.is_streamed:
        rates += f" and {report.capacity.reading / 1e9:,.1f} GB/s from the disk"
    return f" at an assumed {rates}; --measure finds out"


def _forms(report: PlanReport) -> FigureTable:
    """What the model's published forms take, and which of them memory holds."""
    on_accelerator = report.capacity.accelerator is not None
    reading = () if on_accelerator else ("read for each chunk",)
    columns = ("weights", "on the accelerator" if on_accelerator else "in memory", *reading, "prefill takes")
    table = FigureTable("published forms", columns)
    for form in report.forms:
        read = () if on_accelerator else ("" if form.is_held else human_bytes(form.read_a_step),)
        table.add_row(
            form.name,
            human_bytes(form.plan.workload.weights),
            "yes" if form.is_held else "in part" if form.fits else "no",
            *read,
            "" if form.seconds is None or not form.fits else human_time(form.seconds),
        )
    return table


def _tiers(plan: MemoryPlan) -> str:
    """Blocks of the NoPE layers by tier, the newest first."""
    split = plan.residency.split(plan.layout.sealed_rows(plan.workload.length))
    names = ("on the accelerator", "in host memory", "on disk")
    tokens = [rows * plan.layout.block_tokens for rows in split]
    parts = [f"{count:,} tokens {name}" for count, name in zip(tokens, names, strict=True) if count]
    return ", ".join(parts) or "all in memory, less than a block"
