"""The command line: what a person types, and the only module that opens the terminal or exits.

The answer goes to stdout, all else to stderr. Every error that a user can cause ends as one line and an exit code.
Heavy modules are imported where they are needed, so that help and argument errors are quick.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from l4ctx.ask import Request

EXIT_CODES = """\
Exit codes: 0 an answer, 1 the answer could not be written, 2 bad arguments or input, 3 the checkpoint cannot be
used, 4 the prompt is too long for the model, 5 it does not fit into memory, 6 the model failed, 130 interrupted,
141 the output was closed.
"""
OUTPUT, INPUT, CHECKPOINT, TOO_LONG, MEMORY, MODEL, INTERRUPTED, CLOSED = 1, 2, 3, 4, 5, 6, 130, 141
CODE_OF_ERROR = {  # those that a user can cause; by name, so that no module is imported for it
    "l4ctx.cli.OutputError": OUTPUT,
    "l4ctx.cli.UsageError": INPUT, "l4ctx.documents.DocumentError": INPUT, "l4ctx.ask.RequestError": INPUT,
    "model.config.ConfigError": CHECKPOINT, "model.checkpoint.CheckpointError": CHECKPOINT,
    "l4ctx.tokenizer.TokenizerError": CHECKPOINT, "l4ctx.prompt.PromptError": CHECKPOINT,
    "l4ctx.prompt.PromptLengthError": TOO_LONG, "model.rope.LengthError": TOO_LONG,
    "l4ctx.memory.MemoryPlanError": MEMORY, "builtins.MemoryError": MEMORY, "torch.OutOfMemoryError": MEMORY,
    "l4ctx.generate.GenerationConfigError": CHECKPOINT, "l4ctx.generate.GenerationError": MODEL,
}

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True,
                  context_settings={"help_option_names": ["-h", "--help"]})


class UsageError(Exception):
    """Arguments that do not go together."""


class OutputError(Exception):
    """An answer that cannot be written, as on a full disk."""


def main() -> NoReturn:
    """Entry point of the `l4ctx` command."""
    if sys.stderr is None:  # closed by the caller
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
    try:
        app(prog_name="l4ctx")
    except KeyboardInterrupt:
        _exit(INTERRUPTED)
    sys.exit(0)


@app.callback(epilog=EXIT_CODES)
def l4ctx(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.",
                                                callback=lambda wanted: _show_version(wanted), is_eager=True)] = False,
          ) -> None:
    """Ask questions over documents of millions of tokens with Llama 4."""


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"l4ctx {version('l4ctx')}")
        raise typer.Exit()


@app.command(epilog=EXIT_CODES)
def ask(
    question: Annotated[str | None, typer.Argument(
        metavar="QUESTION", help="What to ask; - reads the question from standard input.", show_default=False)] = None,
    paths: Annotated[list[str] | None, typer.Argument(
        metavar="PATH", help="Files and folders to read, in this order; - stands for standard input. Without "
        "a path, what is piped in is the document.", show_default=False)] = None,
    model: Annotated[Path | None, typer.Option(
        "--model", "-m", envvar="L4CTX_MODEL", metavar="DIR", help="Checkpoint folder.", show_default=False)] = None,
    question_file: Annotated[Path | None, typer.Option(
        metavar="FILE", help="Read the question from a file; every argument is then a path. - is standard "
        "input.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(
        min=1, help="Length of the answer at most, in tokens; 1024 unless told.")] = None,
    temperature: Annotated[float | None, typer.Option(
        min=0.0, help="0 takes the likeliest token each time, which is the default.", show_default=False)] = None,
    top_p: Annotated[float | None, typer.Option(
        min=0.0, max=1.0, help="Draw from the likeliest tokens of this total probability.")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Draw from that many of the likeliest tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws, for the same answer twice.")] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Draw as the checkpoint's authors recommend.")] = False,
    dtype: Annotated[str, typer.Option(
        metavar="auto|float32|bfloat16|float16", help="Type of weights, keys and values. auto: the checkpoint's own; "
        "on a CPU float32, if those weights take less than a quarter of the free memory.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")] = "auto",
    attention: Annotated[str, typer.Option(
        metavar="sdpa|eager", help="Attention kernels: PyTorch's fused ones, or the slow reference.")] = "sdpa",
    prefill_chunk_size: Annotated[int, typer.Option(
        min=1, help="Tokens read at a time; fewer need less memory for activations.")] = 8192,
    memory_report: Annotated[bool, typer.Option("--memory-report", help="Show where every byte went.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming text.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr.")] = False,
) -> None:
    """Read documents and answer a question about them.

    l4ctx ask "What changed in version 2?" notes/ report.md --model DIR

    git log | l4ctx ask "Who worked on the parser?" --model DIR
    """
    if question_file is not None and question is not None:
        paths = [question, *(paths or [])]
        question = None

    def request() -> Request:
        from l4ctx.ask import Request

        _choice("--dtype", dtype, "auto", "float32", "bfloat16", "float16")
        _choice("--attention", attention, "sdpa", "eager")
        if seed is not None and not 0 <= seed < 2**63:
            raise UsageError(f"--seed: {seed} is not between 0 and {2**63 - 1}")
        if sys.stdout is None:
            raise UsageError("standard output is closed: there is nowhere to write the answer to")
        if model is None:
            raise UsageError("no model: give a checkpoint folder with --model DIR or the variable L4CTX_MODEL")
        text, documents, stdin = _inputs(question, question_file, paths or [])
        return Request(model=model, question=text, paths=documents, stdin=stdin, system=system,
                       max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed,
                       sample=sample, dtype=dtype, device=device, attention=attention,
                       prefill_chunk_size=prefill_chunk_size)

    with _errors_as_exit_codes():
        _answer(request(), json=json, quiet=quiet, memory_report=memory_report)


def _answer(request: Request, *, json: bool, quiet: bool, memory_report: bool) -> None:
    """Runs the request; prints the answer as it comes, then what there is to report."""
    from l4ctx.ask import Run
    from l4ctx.terminal import memory_table, show_reading, show_waiting, stderr_console, without_controls

    console = stderr_console()

    def note(text: str) -> None:
        if not quiet:
            console.print(without_controls(f"l4ctx: {text}"), markup=False, highlight=False, soft_wrap=True)

    run = Run(request, note)
    with run.sampling_memory():
        run.read_documents()
        with nullcontext() if quiet else show_waiting(console):
            run.make_prompt()
            run.plan_memory()
            run.load_model()
        _warn_of_forgotten_pipe(request, note)
        steps = run.prefill()
        for _ in steps if quiet else show_reading(steps, run.config, console):
            pass
        for piece in run.decode():
            if not json:
                _write(without_controls(piece))
    if json:
        import json as json_module

        _write(json_module.dumps(run.as_dict()) + "\n")  # in ASCII: whole in every locale, harmless on a terminal
    elif not run.answer.endswith("\n"):
        _write("\n")
    if run.stop_reason == "length":
        note(f"the answer was cut at {run.max_new_tokens} tokens; --max-new-tokens allows more")
    elif not run.answer.strip():
        note("the model ended its answer at once")
    if memory_report:
        console.print(memory_table(run.memory_report()))


def _inputs(question: str | None, question_file: Path | None, paths: list[str]) -> tuple[str, list[str], Any]:
    """The question, the paths to read, and standard input unless the question was read from it."""
    stdin = sys.stdin.buffer if sys.stdin is not None else None
    if question == "-" or question_file == Path("-"):
        if "-" in paths:
            raise UsageError("- (standard input) cannot be both the question and a document")
        if stdin is None:
            raise UsageError("the question: - stands for standard input, but that is closed")
        return _question_text(stdin.read, "standard input"), paths, None
    if question_file is not None:
        question = _question_text(question_file.read_bytes, str(question_file))
    elif question is None:
        raise UsageError("no question: l4ctx ask QUESTION [PATH]..., or --question-file FILE")
    elif not question.strip():
        raise UsageError("the question is empty")
    if not paths and stdin is not None and _is_piped(stdin.fileno()):
        paths = ["-"]
    return question, paths, stdin


def _question_text(read: Callable[[], bytes], name: str) -> str:
    try:
        text = read().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{name}: the question cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UsageError(f"{name}: the question is not UTF-8 text")
    if not text.strip():
        raise UsageError(f"{name}: the question is empty")
    return text


def _is_piped(descriptor: int) -> bool:
    """Whether standard input is a pipe, a socket or a file: something a person has put there."""
    import stat

    mode = os.fstat(descriptor).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def _warn_of_forgotten_pipe(request: Request, note: Callable[[str], None]) -> None:
    """With paths, standard input is read only where - stands; data that waits there was probably meant to be read."""
    if "-" in request.paths or request.stdin is None or not request.paths:
        return
    descriptor = request.stdin.fileno()
    try:
        waiting = _is_piped(descriptor) and (os.fstat(descriptor).st_size > 0 or _pipe_bytes(descriptor) > 0)
    except OSError:
        return
    if waiting:
        note("standard input holds data that is not read; add - to the paths to read it")


def _pipe_bytes(descriptor: int) -> int:
    """Bytes waiting in a pipe; 0 where the system cannot tell."""
    try:
        import fcntl
        import termios
    except ImportError:
        return 0
    return int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)), sys.byteorder)


def _choice(option: str, value: str, *allowed: str) -> None:
    if value not in allowed:
        raise UsageError(f"{option}: {value!r} is not one of {', '.join(allowed)}")


@contextmanager
def _errors_as_exit_codes() -> Iterator[None]:
    """What a user can cause becomes one line on stderr and an exit code; anything else keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would end in a traceback
        _fail("interrupted; nothing is kept", INTERRUPTED)
    except BrokenPipeError:
        _exit(CLOSED)
    except Exception as error:
        code = CODE_OF_ERROR.get(f"{type(error).__module__}.{type(error).__qualname__}")
        if code is None:
            raise
        _fail(str(error) or "out of memory", code)


def _fail(message: str, code: int) -> NoReturn:
    from l4ctx.terminal import without_controls

    with suppress(OSError):
        sys.stderr.write(f"l4ctx: {without_controls(' '.join(message.splitlines()))}\n")
        sys.stderr.flush()
    _exit(code)


def _exit(code: int) -> NoReturn:
    """Exits without the interpreter's own complaint about a closed stdout."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _write(text: str) -> None:
    """To stdout at once; what the stream's encoding lacks is escaped. Raises BrokenPipeError and OutputError."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"the answer cannot be written: {error.strerror}") from None
