"""What `l4ctx plan` found out, as tables for people. Finds out nothing itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from l4ctx.cli.tables.layout import FigureTable, TextTable
from l4ctx.formatting import human_bytes
from l4ctx.planning.memory_plan import MARGIN_BYTES, MemoryPlan
from l4ctx.planning.remedies import remedies
from l4ctx.run.estimate import PlanReport

if TYPE_CHECKING:
    from rich.console import RenderableType

SHOWN_DOCUMENTS = 20


def plan_table(report: PlanReport) -> RenderableType:
    """The report for people: documents with their tokens, bytes by owner and tier, and what follows from them."""
    from rich.console import Group

    from l4ctx.formatting import without_controls

    plan, end, most, capacity, workload = (
        report.plan,
        report.plan.end,
        report.plan.peak,
        report.capacity,
        report.plan.workload,
    )

    parts: list[RenderableType] = []
    if report.documents:
        documents = FigureTable("documents", ("tokens", "share"))
        shown = sorted(report.documents, key=lambda document: -document[1])[:SHOWN_DOCUMENTS]
        for source, tokens in [document for document in report.documents if document in shown]:
            documents.add_row(without_controls(source), f"{tokens:,}", f"{tokens / workload.prompt_tokens:.0%}")
        if len(shown) < len(report.documents):
            rest = sum(tokens for _, tokens in report.documents) - sum(tokens for _, tokens in shown)
            documents.add_row(
                f"{len(report.documents) - len(shown)} smaller ones",
                f"{rest:,}",
                f"{rest / workload.prompt_tokens:.0%}",
            )
        parts.append(documents)

    memory = FigureTable("memory", ("at the end", "at most", "free"))

    def row(name: str, *values: int | None) -> None:
        if any(values):
            memory.add_row(name, *("" if value is None else human_bytes(value) for value in values))

    row("weights, mapped from the checkpoint" if plan.weights_are_mapped else "weights", plan.weights)
    row("RoPE windows", end.rope_windows, most.rope_windows)
    row("NoPE keys and values, accelerator", end.nope_device, most.nope_device)
    row("NoPE keys and values, host memory", end.nope_host, most.nope_host)
    row("NoPE keys and values, disk", end.nope_disk, most.nope_disk)
    row("read buffers", end.buffers, most.buffers)
    row("token ids", plan.token_ids)
    row("activations", None, plan.activations)
    row("images and the vision tower", None, plan.images)
    if capacity.accelerator is not None:
        row("accelerator in all, and a margin", None, plan.needed_on_accelerator + MARGIN_BYTES, capacity.accelerator)
    row("host memory in all, and a margin", None, plan.needed + MARGIN_BYTES, capacity.host)
    if capacity.has_disk:
        row("disk in all", None, plan.needed_on_disk, capacity.disk)
    row("  an unbounded cache would take", plan.unbounded_cache)
    parts.append(memory)

    facts = TextTable("run")
    answer = f" and {workload.max_new_tokens:,} of the answer" if workload.max_new_tokens else ""
    positions = f"the model has {workload.config.max_position_embeddings:,} positions"
    facts.add_row("tokens", f"{workload.prompt_tokens:,}{answer}; {positions}")
    facts.add_row("read at a time", f"{plan.prefill_chunk_size:,} tokens, in {workload.dtype}")
    facts.add_row("kept", f"{_tiers(plan)}, in {plan.layout.kv_dtype}")
    disk = "" if report.tokens_with_disk is None else f", {report.tokens_with_disk:,} with the disk"
    facts.add_row("would fit", f"{report.tokens_in_memory:,} tokens in memory alone{disk}")
    if report.read_from_disk:
        facts.add_row("reads from disk", f"{human_bytes(report.read_from_disk)} in all steps together")
    if report.seconds is not None:
        facts.add_row("reading takes", f"about {_human_time(report.seconds)}")
    facts.add_row("fits here", "yes" if report.fits else "no")
    for tier, (needed, there) in report.shortfalls.items():
        facts.add_row("", f"{tier}: {human_bytes(needed)} needed, {human_bytes(there)} there")
    if report.exceeds_positions:
        facts.add_row("", f"more tokens than the model has positions: {workload.length:,}")
    for number, remedy in enumerate(remedies(plan, capacity)):
        facts.add_row("what helps" if number == 0 else "", without_controls(remedy))
    return Group(*(part for each in parts for part in (each, "")), facts)


def _human_time(seconds: float) -> str:
    from l4ctx.formatting import human_seconds

    return human_seconds(seconds) if seconds < 2 * 86400 else f"{seconds / 86400:,.0f} days"


def _tiers(plan: MemoryPlan) -> str:
    """Blocks of the NoPE layers by tier, the newest first."""
    split = plan.residency.split(plan.layout.sealed_rows(plan.workload.length))
    names = ("on the accelerator", "in host memory", "on disk")
    tokens = [rows * plan.layout.block_tokens for rows in split]
    parts = [f"{count:,} tokens {name}" for count, name in zip(tokens, names, strict=True) if count]
    return ", ".join(parts) or "all in memory, less than a block"
