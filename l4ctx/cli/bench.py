"""The `bench` command: its options, what it refuses at once, and its output."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from l4ctx.cli import options
from l4ctx.cli.exits import check_stdout, errors_as_exit_codes, write, write_json
from l4ctx.errors import UsageError
from l4ctx.run.choices import Dtype

if TYPE_CHECKING:
    from rich.console import Console

    from l4ctx.bench.request import BenchRequest

DEFAULT_LENGTHS = "4096,16384"
PEERS = "transformers, llama.cpp, or llama.cpp=/path/to/llama-bench"


def bench(
    model: options.Model = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A config.json or its folder: measure random weights of that size, made in memory.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help=f"Prompt lengths (default: {DEFAULT_LENGTHS}, shortened if the model has fewer positions).",
            show_default=False,
        ),
    ] = None,
    decode: Annotated[
        int,
        typer.Option(
            "--decode",
            parser=options.token_count(0),
            metavar="N",
            help="Tokens to decode after the first one. 0: none.",
        ),
    ] = 32,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="How often everything is measured.")] = 3,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"Another engine to compare with: {PEERS}. Can be repeated.",
            show_default=False,
        ),
    ] = None,
    gguf: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="File for llama.cpp to read instead of one converted from the checkpoint. Can be repeated.",
            show_default=False,
        ),
    ] = None,
    ceilings: Annotated[
        bool,
        typer.Option(
            "--ceilings/--no-ceilings",
            help="Measure the machine's peak rates and compare l4ctx with its roofline.",
        ),
    ] = True,
    dtype: Annotated[
        Dtype,
        typer.Option(
            metavar="auto|float32|bfloat16|float16",
            help="Compute dtype of all engines. auto: the fastest of each.",
        ),
    ] = "auto",
    device: options.Device = "auto",
    attention: options.Attention = None,
    prefill_chunk_size: options.PrefillChunkSize = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure prefill and decode throughput, time to first token and memory, of l4ctx and of other engines.

    l4ctx bench --model DIR --tokens 4096,16384,65536

    l4ctx bench --config config.json --compare transformers --compare llama.cpp=/path/to/llama-bench

    Every measurement is a process of its own; engines take turns, each in its fastest dtype and batch size.
    """

    def request() -> BenchRequest:
        from l4ctx.bench.request import BenchRequest

        check_stdout("to")
        if config is None and model is None:
            raise UsageError(
                "nothing to measure: name a checkpoint with --model DIR (or L4CTX_MODEL), or a configuration "
                "for random weights with --config FILE"
            )
        peers = dict(_peer(text) for text in compare or [])
        if gguf and "llama.cpp" not in peers:
            raise UsageError("--gguf is for --compare llama.cpp")
        for file in gguf or []:
            if not file.is_file():
                raise UsageError(f"--gguf {file}: no such file")
        return BenchRequest(
            _lengths(DEFAULT_LENGTHS if tokens is None else tokens),
            lengths_are_given=tokens is not None,
            model=model if config is None else None,
            config=config,
            decode_tokens=decode,
            rounds=rounds,
            dtype=dtype,
            device=device,
            attention=attention,
            prefill_chunk_size=prefill_chunk_size,
            compares_transformers="transformers" in peers,
            llama_bench=peers.get("llama.cpp"),
            gguf_files=tuple(gguf or ()),
            ceilings=ceilings,
        )

    with errors_as_exit_codes(json=json, checkpoint=model), _termination_as_interruption():
        _bench(request(), json=json, quiet=quiet)


def _bench(request: BenchRequest, *, json: bool, quiet: bool) -> None:
    """Measures, and prints the report."""
    from l4ctx.bench.benchmark import run_benchmark
    from l4ctx.cli.console import notes, rendered, stderr_console

    console = stderr_console()
    with _status(console, quiet=quiet) as working:
        report = run_benchmark(request, notes(console, quiet=quiet), working)
    if json:
        write_json(report.as_dict())
        return
    from l4ctx.cli.tables.bench import bench_table

    write(rendered(bench_table(report)))


@contextmanager
def _status(console: Console, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Shows in a terminal what is being done."""
    from l4ctx.cli.activity import Activity

    with Activity(console, is_shown=not quiet) as activity:
        yield activity.tell


@contextmanager
def _termination_as_interruption() -> Iterator[None]:
    """SIGTERM acts as Ctrl-C does: the process being measured ends too, and no file is left behind."""

    def interrupt(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _lengths(text: str) -> tuple[int, ...]:
    """In ascending order, without duplicates. Raises UsageError."""
    from l4ctx.formatting import parse_tokens

    try:
        lengths = sorted({parse_tokens(part) for part in text.split(",")})
    except ValueError:
        raise UsageError(f"--tokens: {text!r} is not a list of numbers such as {DEFAULT_LENGTHS} or 4k,16k") from None
    if lengths[0] < 2:
        raise UsageError(f"--tokens: {lengths[0]} is too few; the minimum is 2")
    return tuple(lengths)


def _peer(text: str) -> tuple[str, str]:
    """An engine's name, and the path of its program or "". Raises UsageError."""
    from l4ctx.bench.peers.llama_cpp import check_program

    name, is_given, path = text.partition("=")
    if name == "llama.cpp" and not (is_given and not path):
        return name, check_program(path)
    if text != "transformers":
        raise UsageError(f"--compare: {text!r} is not one of {PEERS}")
    return name, ""
