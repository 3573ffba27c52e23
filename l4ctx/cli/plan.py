"""The `plan` command as a person types it, and its output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from l4ctx.cli import options
from l4ctx.cli.compute_options import MemoryFlags
from l4ctx.cli.exits import check_stdout, errors_as_exit_codes, leave, write, write_json
from l4ctx.cli.sources import SourceFlags, spread
from l4ctx.cli.stdin import checkpoint_folder, paths_or_pipe
from l4ctx.errors import MEMORY, TOO_LONG, UsageError

if TYPE_CHECKING:
    from l4ctx.run.request import GpuOptions, PlanRequest


@spread
def plan(
    paths: options.Paths = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            parser=options.token_count(1),
            metavar="N",
            help="Plan for this many tokens, without documents: 128k is 128,000, 10M is 10,000,000, 128Ki is 131,072.",
            show_default=False,
        ),
    ] = None,
    model: options.Model = None,
    *,
    read: SourceFlags,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            parser=options.token_count(0), metavar="N", help="Length of the answer in tokens.", show_default=False
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            metavar="TOKENS/S",
            help="Prefill speed at the start of a text, to predict the time from.",
            show_default=False,
        ),
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine's speed instead.")] = False,
    held: MemoryFlags,
    kv_dir: options.KVDir = None,
    device: options.Device = "auto",
    prefill_chunk_size: options.PrefillChunkSize = None,
    gpu_memory: options.GpuMemory = None,
    one_process: options.GpusOfOneProcess = None,
    tp: options.GpuTensorRanks = None,
    cp: options.GpuContextRanks = None,
    host_memory: options.HostMemory = None,
    link: options.Link = None,
    host_link: options.HostLink = None,
    disk_rate: options.DiskRate = None,
    compute_rate: options.ComputeRate = None,
    gpu_bandwidth: options.GpuBandwidth = None,
    whole: Annotated[
        bool, typer.Option("--all", help="List every document and folder, and everything that was left out.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show what reading documents would take: tokens, memory and disk by owner, time. Loads no weights.

    l4ctx plan docs/ report.md --model DIR

    l4ctx plan --tokens 10000000 --kv-dir /fast/disk --model DIR

    l4ctx plan --tokens 10M --tp 8 --cp 4 --gpu-memory 141GiB --model DIR

    l4ctx plan --tokens 200k --gpus 2 --gpu-memory 48GiB --model DIR

    Ends with exit code 5 when it would not fit.
    """

    def request() -> PlanRequest:
        from l4ctx.run.request import PlanRequest

        check_stdout("to")
        documents, stdin = paths_or_pipe(read.named(paths or []), quiet=quiet, reads_pipe=tokens is None)
        if (tokens is None) == (not documents):
            raise UsageError("l4ctx plan PATH..., or l4ctx plan --tokens N: give one of them")
        if rate is not None and measure:
            raise UsageError("--rate gives the speed, --measure finds it out: give one of them")
        return PlanRequest(
            checkpoint_folder(model),
            read.options(documents, stdin),
            tokens,
            max_new_tokens,
            held.compute(device, prefill_chunk_size),
            held.kv(kv_dir),
            rate,
            measure,
            gpus(),
        )

    def gpus() -> GpuOptions | None:
        from l4ctx.run.request import GpuOptions

        of_ranks = (tp, cp, link, host_link, disk_rate, compute_rate, gpu_bandwidth)
        if gpu_memory is None:
            if any(option is not None for option in (*of_ranks, host_memory, one_process)):
                raise UsageError("a plan for GPUs that need not be here takes --gpu-memory SIZE, the memory of each")
            return None
        if tokens is None:
            raise UsageError("--gpu-memory plans for a number of tokens: give --tokens N instead of documents")
        if rate is not None or measure or held.weights_memory is not None or device != "auto":
            raise UsageError("--rate, --measure, --weights-memory and --device speak of this machine: leave them out")
        if one_process is not None and any(option is not None for option in of_ranks):
            raise UsageError("--gpus is of one process: leave out --tp, --cp and the rates, which are of ranks")
        return GpuOptions(
            gpu_memory,
            host_memory,
            tp or 1,
            cp or 1,
            compute=compute_rate,
            link=link,
            host_link=host_link,
            disk=disk_rate,
            bandwidth=gpu_bandwidth,
            one_process=one_process,
        )

    with errors_as_exit_codes(json=json, checkpoint=model):
        leave(_plan(request(), is_whole=whole, json=json, quiet=quiet))


def _plan(request: PlanRequest, *, is_whole: bool, json: bool, quiet: bool) -> int:
    """Shows the plan; returns the exit code."""
    from l4ctx.cli.console import notes, rendered, stderr_console
    from l4ctx.cli.tables.gpus import gpu_table
    from l4ctx.cli.tables.plan import plan_table
    from l4ctx.run.estimate import PlanReport, make_plan
    from l4ctx.run.estimate_gpus import GpuReport, plan_for_gpus
    from l4ctx.run.verdict import verdict, verdict_on_gpus

    report: PlanReport | GpuReport
    if request.gpus is not None and request.gpus.one_process is None:
        report = plan_for_gpus(request, notes(stderr_console(), quiet=quiet))
        table, told = gpu_table(report), verdict_on_gpus(report)
    else:
        report = make_plan(request, notes(stderr_console(), quiet=quiet))
        table, told = plan_table(report, is_whole=is_whole), verdict(report)
    if json:
        write_json({**report.as_dict(), "verdict": told})
    else:
        write(rendered(table))
    return 0 if report.fits else TOO_LONG if report.exceeds_positions else MEMORY
