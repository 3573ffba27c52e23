"""What comes in by the command line and standard input: the question, the paths, and a pipe's content.

Part of the command line; reads the question, leaves documents to `l4ctx.documents.reader`.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from l4ctx.cli.exits import tell
from l4ctx.cli.named_paths import NamedPaths, listed_paths, meant_paths
from l4ctx.errors import UsageError
from l4ctx.machine.files import open_named

if TYPE_CHECKING:
    from l4ctx.run.questions import Question
    from l4ctx.run.request import Request


STDIN = Path("-")
MAX_LIST_BYTES = 2**28
MAX_QUESTION_BYTES = 2**26
"""More than ten million tokens, which is what the model has positions for."""


def inputs(
    question: str | None, question_file: Path | None, paths: NamedPaths, *, quiet: bool, reads_pipe: bool
) -> tuple[str, list[str], BinaryIO | None]:
    """The question, the paths to read, and standard input unless the question was read from it."""
    stdin = standard_input()
    if question == "-" or question_file == STDIN:
        documents = _paths_beside(stdin, "the question", paths, quiet=quiet)
        assert stdin is not None
        return _question_text(lambda: nullcontext(stdin), "standard input"), documents, None
    typed = None
    if question_file is not None:
        question = _question_text(partial(open_named, question_file), str(question_file))
    elif question is None:
        raise UsageError("no question: l4ctx ask QUESTION [PATH]..., or --question-file FILE")
    elif not question.strip():
        raise UsageError("the question is empty")
    else:
        typed = question
    return question, *paths_or_pipe(paths, quiet=quiet, reads_pipe=reads_pipe, question=typed)


def _paths_beside(stdin: BinaryIO | None, what: str, paths: NamedPaths, *, quiet: bool) -> list[str]:
    """The paths to read where standard input is `what` is asked. Raises UsageError where it cannot be."""
    if "-" in paths.paths or paths.files_from == STDIN:
        other = "a document" if "-" in paths.paths else "the list of files"
        raise UsageError(f"- (standard input) cannot be both {what} and {other}")
    if stdin is None:
        raise UsageError(f"{what}: - stands for standard input, but that is closed")
    documents, _ = paths_or_pipe(paths, quiet=quiet, reads_pipe=False)
    _say_how_to_end(what, quiet=quiet)
    return documents


def many_inputs(
    file: Path, paths: NamedPaths, *, quiet: bool, reads_pipe: bool
) -> tuple[list[Question], list[str], BinaryIO | None]:
    """The questions of a file, the paths to read, and standard input unless the questions were read from it."""
    from l4ctx.run.questions import read_questions

    stdin = standard_input()
    if file == STDIN:
        documents = _paths_beside(stdin, "the questions", paths, quiet=quiet)
        assert stdin is not None
        return read_questions(stdin, named(file)), documents, None
    try:
        with open_named(file) as opened:
            questions = read_questions(opened, named(file))
    except OSError as error:
        raise _unreadable("the questions", str(file), error) from None
    return questions, *paths_or_pipe(paths, quiet=quiet, reads_pipe=reads_pipe)


def named(file: Path) -> str:
    """A file of questions in messages."""
    from l4ctx.formatting import printable

    return "standard input" if file == STDIN else printable(str(file))


def paths_or_pipe(
    named: NamedPaths, *, quiet: bool, reads_pipe: bool = True, question: str | None = None
) -> tuple[list[str], BinaryIO | None]:
    """The paths to read, and standard input unless they were listed in it; without a path, standard input if something
    is piped in.

    `question` is the argument before them, if it is the question. Raises UsageError for paths that are not there.
    """
    stdin = standard_input()
    if named.are_in_git and "-" in named.paths:
        raise UsageError("- (standard input) is in no commit: leave it out, or --git-ref and --diff")
    looked_for = () if named.are_in_git else named.paths
    paths = meant_paths(looked_for, (lambda text: None) if quiet else tell, question=question)
    paths += named.paths if named.are_in_git else []
    if "-" in paths:
        _say_how_to_end("documents", quiet=quiet)
    if named.files_from is not None:
        paths += _listed(named, stdin)
        return paths, None if named.files_from == STDIN else stdin
    if named.null:
        raise UsageError("--null (-0) is for --files-from")
    if named.are_in_git:
        return paths or ["."], stdin
    if not paths and reads_pipe and stdin is not None and is_piped(stdin.fileno()):
        paths = ["-"]
    return paths, stdin


def _listed(named: NamedPaths, stdin: BinaryIO | None) -> list[str]:
    """The paths that a file lists. Raises UsageError."""
    from l4ctx.formatting import printable

    file = named.files_from
    assert file is not None
    name = "standard input" if file == STDIN else printable(str(file))
    if file == STDIN and ("-" in named.paths or stdin is None):
        problem = "cannot be both a document and the list of files" if stdin is not None else "is closed"
        raise UsageError(f"--files-from: - (standard input) {problem}")
    try:
        with nullcontext(stdin) if file == STDIN else open_named(file) as opened:
            assert opened is not None
            content = opened.read(MAX_LIST_BYTES + 1)
    except OSError as error:
        raise _unreadable("the list of files", name, error) from None
    if len(content) > MAX_LIST_BYTES:
        raise UsageError(f"{name}: the list of files is larger than {MAX_LIST_BYTES >> 20} MiB")
    if b"\0" in content and not named.null:
        raise UsageError(f"{name}: NUL characters in the list of files; -0 says that they end the names")
    if not (paths := listed_paths(content, null=named.null)):
        raise UsageError(f"{name}: the list of files is empty")
    return paths


def standard_input() -> BinaryIO | None:
    """Its bytes; None where it is closed."""
    return sys.stdin.buffer if sys.stdin is not None else None


def _say_how_to_end(what: str, *, quiet: bool) -> None:
    if not quiet and sys.stdin is not None and sys.stdin.isatty():
        tell(f"reading {what} from the terminal; end with Ctrl-D on a line of its own")


def _question_text(opened: Callable[[], AbstractContextManager[BinaryIO]], name: str) -> str:
    try:
        with opened() as file:
            content = file.read(MAX_QUESTION_BYTES + 1)
        if len(content) > MAX_QUESTION_BYTES:
            raise UsageError(
                f"{name}: the question is larger than {MAX_QUESTION_BYTES >> 20} MiB; give it as a document"
            )
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise _unreadable("the question", name, error) from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UsageError(f"{name}: the question is not UTF-8 text")
    if not text.strip():
        raise UsageError(f"{name}: the question is empty")
    return text


def _unreadable(what: str, name: str, error: OSError) -> UsageError:
    from l4ctx.formatting import printable
    from l4ctx.machine.suggestions import did_you_mean

    hint = did_you_mean(name) if isinstance(error, FileNotFoundError) else ""
    return UsageError(f"{printable(name)}: {what} cannot be read: {error.strerror}{hint}")


def is_piped(descriptor: int) -> bool:
    """Whether standard input is a pipe, a socket or a file: something a person has put there."""
    mode = os.fstat(descriptor).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def warn_of_forgotten_pipe(request: Request, note: Callable[[str], None]) -> None:
    """With paths or a context, standard input is read only where - stands; data that waits was probably meant."""
    sources = request.sources
    if "-" in sources.paths or sources.stdin is None or not (sources.paths or request.context.answer_from):
        return
    if holds_data(sources.stdin):
        note("standard input holds data that is not read; add - to the paths to read it")


def holds_data(stdin: BinaryIO) -> bool:
    """Whether something was put into standard input that can be read at once."""
    descriptor = stdin.fileno()
    try:
        return is_piped(descriptor) and (os.fstat(descriptor).st_size > 0 or _pipe_bytes(descriptor) > 0)
    except OSError:
        return False


def _pipe_bytes(descriptor: int) -> int:
    """Bytes waiting in a pipe; 0 where the system cannot tell."""
    try:
        import fcntl
        import termios
    except ImportError:
        return 0
    return int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)), sys.byteorder)


def checkpoint_folder(given: Path | None, context: Path | None = None, *, may_be_new: bool = False) -> Path:
    """The checkpoint that is named, else the one that the context was made with.

    Raises UsageError, ContextError, and ConfigError for what is no checkpoint folder.
    """
    from l4ctx.contexts.folder import FILE
    from l4ctx.contexts.manifest import saved_checkpoint
    from l4ctx.formatting import printable
    from l4ctx.inspection.model_folder import check_model_folder
    from model.gguf.header import is_gguf

    if given is not None:
        check_model_folder(given)
        return given
    is_there = context is not None and (not may_be_new or os.path.exists(context / FILE))
    known = saved_checkpoint(context) if context is not None and is_there else None
    if known is None:
        raise UsageError(
            "no model: give a checkpoint folder with --model DIR or the variable L4CTX_MODEL, or set one in the file "
            "that l4ctx config path names (l4ctx list shows models that are here)"
        )
    if not known.is_dir() and not is_gguf(known):
        raise UsageError(
            f"no model: {context} was made with {printable(str(known))}, and no such folder is there now; "
            "give the checkpoint with --model DIR"
        )
    return known
