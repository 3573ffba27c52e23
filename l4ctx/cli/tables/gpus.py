"""The report of `l4ctx plan` for GPUs as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from l4ctx.cli.tables.layout import FigureTable, TextTable
from l4ctx.formatting import counted, human_bytes, human_rate, human_time
from l4ctx.planning.mesh import RankPlan
from l4ctx.planning.mesh_time import Seconds
from l4ctx.run.estimate_gpus import GpuReport
from l4ctx.run.verdict import verdict_on_gpus

if TYPE_CHECKING:
    from rich.console import RenderableType


def gpu_table(report: GpuReport) -> RenderableType:
    """Bytes of a rank by owner and tier, what it sends and receives, and what follows from that."""
    from rich.console import Group
    from rich.text import Text

    return Group(
        Text(verdict_on_gpus(report), style="bold"), "", _memory(report), "", _traffic(report), "", _facts(report)
    )


def _memory(report: GpuReport) -> FigureTable:
    """Peaks of one rank."""
    rank, plan, most = report.rank, report.rank.plan, report.rank.plan.peak
    table = FigureTable("memory of each rank", ("GPU", "host memory", "disk"))

    def row(name: str, *values: int | None) -> None:
        if any(values):
            table.add_row(name, *("" if not value else human_bytes(value) for value in values))

    on_device, on_host = plan.weights, 0
    if plan.device_weights is not None:
        on_device = plan.device_weights.on_device - plan.device_weights.residency.buffers
        on_host = plan.device_weights.on_host
    row("weights", on_device, on_host)
    row("  of these on every rank", rank.weights.replicated if rank.mesh.tensor > 1 else None)
    row("weight buffers", plan.device_weights.residency.buffers if plan.device_weights else None)
    row("RoPE windows", most.rope_windows)
    row("NoPE keys and values", most.nope_device, most.nope_host, most.nope_disk)
    row("read buffers", None, most.buffers)
    row("activations and exchange" if rank.mesh.ranks > 1 else "activations", plan.activations)
    row("token ids", None, plan.token_ids)
    row("total, with a margin", rank.device, rank.host, rank.disk)
    row("available", report.capacity.accelerator, report.capacity.host)
    return table


def _traffic(report: GpuReport) -> FigureTable:
    """What one rank sends and receives."""
    chunk, token = report.traffic, report.traffic_of_token
    table = FigureTable("traffic of each rank", ("last prefill chunk", "a token of the answer"))
    for name, both in {
        "sums over tensor ranks": (chunk.sums, token.sums),
        "exchange with context ranks": (chunk.exchange, token.exchange),
        "from host memory to the GPU": (chunk.host, token.host),
        "of these from disk": (chunk.disk, token.disk),
    }.items():
        if any(both):
            table.add_row(name, *(human_bytes(value) if value else "" for value in both))
    if not (chunk.between_ranks or chunk.host or token.host):
        table.add_row("none", "", "")
    return table


def _facts(report: GpuReport) -> TextTable:
    """How the work is divided, how long it takes, and whether it fits."""
    rank, workload, rates = report.rank, report.rank.workload, report.time.rates
    table = TextTable("run")
    positions = f"the model has {workload.config.max_position_embeddings:,} positions"
    table.add_row("tokens", f"{workload.prompt_tokens:,}; {positions}")
    for number, text in enumerate(_division(rank)):
        table.add_row("" if number else "ranks", text)
    table.add_row("prefill chunk", f"{rank.prefill_chunk_size:,} tokens, in {workload.dtype}")
    if (hiding := report.time.hiding_chunk) is not None:
        table.add_row("", f"from {hiding:,} tokens on, computing hides what comes from host memory and disk")
    table.add_row("prefill takes", f"about {human_time(report.prefill.total)}{_waits(report.prefill)}")
    table.add_row("a token takes", f"about {report.token.total:.3g} s{_waits(report.token)}")
    table.add_row(
        "assumed rates",
        f"{rates.compute / 1e12:,.4g} TFLOP/s, {human_rate(rates.memory)} of GPU memory, "
        f"{human_rate(rates.link)} between ranks, {human_rate(rates.host_link)} from host memory, "
        f"{human_rate(rates.disk)} from disk",
    )
    table.add_row("", "an estimate by arithmetic: none of it was measured on a GPU")
    table.add_row("fits there", "yes" if report.fits else "no")
    for tier, (needed, there) in report.shortfalls.items():
        table.add_row("", f"{tier}: {human_bytes(needed)} needed, {human_bytes(there)} available")
    if report.exceeds_positions:
        table.add_row("", f"more tokens than the model has positions: {workload.length:,}")
    return table


def _waits(seconds: Seconds) -> str:
    """What of it is no computing, or no reading of the GPU's own memory."""
    parts = {
        "sums": seconds.sums,
        "exchange": seconds.exchange,
        "host memory or disk": seconds.waiting,
    }
    told = [f"{part / seconds.total:.1%} for {name}" for name, part in parts.items() if part > 0]
    return f"; of it waits {', '.join(told)}" if told else ""


def _division(rank: RankPlan) -> Iterator[str]:
    mesh, exchange = rank.mesh, rank.exchange
    yield f"{counted(mesh.tensor, 'tensor rank')} x {counted(mesh.context, 'context rank')}"
    if rank.weights.kv_copies > 1:
        heads = rank.workload.config.num_key_value_heads
        yield f"{counted(heads, 'KV head')} for {mesh.tensor} tensor ranks: each is held by {rank.weights.kv_copies}"
    if mesh.context > 1:
        yield f"each context rank keeps keys and values of {rank.plan.workload.held:,} tokens"
        last = range(max(0, rank.workload.prompt_tokens - rank.prefill_chunk_size), rank.workload.prompt_tokens)
        travels = "queries" if exchange.nope_layer(last).are_queries else "keys and values"
        yield f"at the end {travels} travel between context ranks, as they are the smaller part"
