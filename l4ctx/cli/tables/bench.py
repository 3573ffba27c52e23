"""The benchmark's report: a table for each length with a column an engine; the machine's ceilings; rooflines."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from l4ctx.bench.report import OWN, BenchReport, Figures
from l4ctx.cli.tables.layout import FigureTable
from l4ctx.formatting import human_bytes, human_seconds, without_controls

if TYPE_CHECKING:
    from rich.console import RenderableType

Row = tuple[str, Callable[[Figures], str]]


def bench_table(report: BenchReport) -> RenderableType:
    """The whole report, for a terminal of any width."""
    parts: list[RenderableType] = [_about(report)]
    for tokens in report.lengths:
        parts += _engines(report, tokens)
    if report.median_ceilings is not None:
        parts += [*_ceilings(report.median_ceilings), Text(), *(_shares(report, tokens) for tokens in report.lengths)]
    parts += [_line(text) for text in report.left_out]
    parts += [_line(f"failed: {text}") for text in report.failures]
    return Group(*parts)


def _about(report: BenchReport) -> Text:
    machine, model = report.machine, report.model
    weights = "random weights of" if model["random_weights"] else "checkpoint"
    threads = machine["threads"]
    return _line(
        f"{weights} {model['path']} ({model['parameters']:,} weights); "
        f"{machine['accelerator'] or machine['cpu']}, {threads} thread{'s' * (threads != 1)}, "
        f"torch {machine['torch']}, {machine['date']}"
    )


def _engines(report: BenchReport, tokens: int) -> list[RenderableType]:
    """One row a figure, so that the table fits a narrow terminal."""
    figures = report.figures(tokens)
    if not figures:
        return []
    rounds = max(len(column.prefill_rates) for column in figures)
    title = f"{tokens:,} tokens, median of {rounds} round{'s' * (rounds != 1)}"
    table = FigureTable("", [without_controls(column.candidate.engine) for column in figures])
    decoded = f"decode {report.decode_tokens}, tokens/s"
    rows: list[Row] = [
        ("version", lambda column: column.version or ""),
        ("dtype", lambda column: column.candidate.dtype),
        ("attention", lambda column: column.candidate.attention or ""),
        ("batch size, tokens", lambda column: f"{column.candidate.batch_size:,}"),
        ("time to first token", lambda column: _seconds(column.first_token_seconds)),
        ("prefill, tokens/s", lambda column: _rate(statistics.median(column.prefill_rates))),
        ("  range", lambda column: _range(column.prefill_rates)),
        (decoded, lambda column: _rate(statistics.median(column.decode_rates)) if column.decode_rates else ""),
        ("  range", lambda column: _range(column.decode_rates)),
        ("peak memory", lambda column: _bytes(column.peak)),
        ("  anonymous, beyond weights", lambda column: _bytes(column.peak_above_weights)),
        ("KV cache", lambda column: _bytes(column.keys_values)),
    ]
    if len(figures) > 1:
        rows += [
            ("speedup of l4ctx, prefill", lambda column: _times(column, column.prefill_ratios)),
            ("speedup of l4ctx, decode", lambda column: _times(column, column.decode_ratios)),
        ]
    for name, cell in rows:
        cells = [without_controls(cell(column)) for column in figures]
        if any(cells):
            table.add_row(name, *cells)
    return [*_title(title), table]


def _ceilings(ceilings: dict[str, Any]) -> list[RenderableType]:
    """One column a dtype; rates without a dtype are in the first."""
    dtypes = list(ceilings["product"])
    table = FigureTable("", dtypes)
    table.add_row("matrix product, GFLOP/s", *(_giga(ceilings["product"][dtype]) for dtype in dtypes))
    for name, rates in ceilings["attention"].items():
        table.add_row(f"attention ({name}), GFLOP/s", *(_giga(rates.get(dtype)) for dtype in dtypes))
    table.add_row("reading weights, GB/s", *(_giga(ceilings["read"].get(dtype)) for dtype in dtypes))
    table.add_row("copying memory, GB/s", _giga(ceilings["copy"]))
    cached = ", from the system's cache" if ceilings["disk_is_cached"] else ""
    table.add_row(f"reading a file, MB/s{cached}", f"{ceilings['disk'] / 1e6:,.0f}")
    slow = [
        _line(f"{dtype} is measured no further: its matrix products reach {rate / 1e9:,.2g} GFLOP/s")
        for dtype, rate in (ceilings.get("slow_product") or {}).items()
    ]
    return [*_title("ceilings of this machine"), table, *slow]


def _shares(report: BenchReport, tokens: int) -> Text:
    shares = report.shares(tokens)
    parts = []
    if (prefill := shares.get("prefill")) is not None:
        parts.append(f"prefill takes {prefill['times_predicted']:.2f} times its roofline (the kernels alone)")
    if (decode := shares.get("decode")) is not None:
        parts.append(
            f"decode takes {decode['times_predicted']:.2f} times its roofline, "
            f"{1000 * decode['predicted_seconds'] / report.decode_tokens:.3g} ms a token "
            f"({human_bytes(decode['bytes'] / report.decode_tokens)} at full memory bandwidth)"
        )
    return _line(
        f"l4ctx, {tokens:,} tokens: {'; '.join(parts)}"
        if parts
        else f"l4ctx, {tokens:,} tokens: no roofline (the ceilings of its kernels are not known)"
    )


def _title(text: str) -> list[RenderableType]:
    """Not the table's own title, which rich would wrap to the width of the table."""
    return [Text(), Text(text, style="bold")]


def _line(text: str) -> Text:
    return Text(without_controls(text))


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _range(rates: Sequence[float]) -> str:
    return f"{_rate(min(rates))} to {_rate(max(rates))}" if len(rates) > 1 else ""


def _bytes(count: int | None) -> str:
    return "" if count is None else human_bytes(count)


def _giga(rate: float | None) -> str:
    return "" if rate is None else f"{rate / 1e9:,.1f}"


def _times(column: Figures, ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f}" if ratios and column.candidate.engine != OWN else ""


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else human_seconds(seconds)
