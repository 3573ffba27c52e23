"""Every error class of the packages either has an exit code, because a user can cause it, or is caught internally."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cache.errors import UnreadableError
from l4ctx.errors import (
    CHECKPOINT,
    CODES_OF_ERRORS,
    CONTEXT,
    INPUT,
    MEMORY,
    MODEL,
    OUTPUT,
    REMEDIES,
    TOO_LONG,
    ContextError,
    OutputError,
    UsageError,
    exit_code_of,
    one_line,
)
from model.errors import UserError
from support.places import ROOT
from test_architecture import MODULES

CODES = {
    "l4ctx.errors.OutputError": OUTPUT,
    "l4ctx.errors.InputError": INPUT,
    "l4ctx.errors.UsageError": INPUT,
    "l4ctx.errors.RequestError": INPUT,
    "l4ctx.run.questions.QuestionsError": INPUT,
    "l4ctx.run.answers_file.AnswersFileError": INPUT,
    "l4ctx.evaluation.haystack.HaystackError": INPUT,
    "l4ctx.run.transcript.InUseError": INPUT,
    "l4ctx.run.transcript.TranscriptError": INPUT,
    "l4ctx.documents.images.ImageError": INPUT,
    "l4ctx.documents.images.ImageMemoryError": MEMORY,
    "l4ctx.documents.document.DocumentError": INPUT,
    "l4ctx.documents.document.DocumentLengthError": TOO_LONG,
    "l4ctx.documents.document.DocumentMemoryError": MEMORY,
    "model.errors.ConfigError": CHECKPOINT,
    "model.errors.CheckpointError": CHECKPOINT,
    "l4ctx.errors.UnusableCheckpointError": CHECKPOINT,
    "l4ctx.checkpoint.image_processor.ImageProcessingError": CHECKPOINT,
    "l4ctx.checkpoint.tokenizer.TokenizerError": CHECKPOINT,
    "l4ctx.checkpoint.chat_template.PromptError": CHECKPOINT,
    "l4ctx.checkpoint.chat_template.TemplateLimitError": CHECKPOINT,
    "l4ctx.checkpoint.generation_config.GenerationConfigError": CHECKPOINT,
    "l4ctx.prompt.builder.PromptLengthError": TOO_LONG,
    "l4ctx.run.response_format.IncompleteAnswerError": MODEL,
    "l4ctx.prompt.wrapping.PromptTemplateError": INPUT,
    "l4ctx.documents.lines.LinesError": INPUT,
    "model.errors.DivisionError": INPUT,
    "model.errors.RankLostError": MODEL,
    "model.errors.LengthError": TOO_LONG,
    "l4ctx.errors.ContextError": CONTEXT,
    "l4ctx.errors.LimitError": MEMORY,
    "cache.errors.DiskError": CONTEXT,
    "cache.errors.UnreadableError": CONTEXT,
    "cache.errors.DiskFullError": MEMORY,
    "l4ctx.planning.memory_plan.MemoryPlanError": MEMORY,
    "l4ctx.errors.ModelFailureError": MODEL,
    "l4ctx.engine.choose.GenerationError": MODEL,
    "l4ctx.bench.process.WorkerError": MODEL,
}
WITHOUT_OWN_CODE = {"model.errors.UserError", "l4ctx.bench.process.ReportedError"}  # root class; has its worker's code
INTERNAL = {  # each is caught and translated by the package that raises it
    "l4ctx.checkpoint.chat_environment.TemplateFailure",
    "model.simd.recorder.NoCodeError",
    "l4ctx.bench.peers.gguf.GGUFError",
    "l4ctx.confinement.process.ChildFailedError",
    "l4ctx.confinement.process.ConfinementError",
    "l4ctx.confinement.process.LibraryMissingError",
    "l4ctx.confinement.process.NoChildError",
    "l4ctx.confinement.process.RefusedError",
    "l4ctx.confinement.work.Refusal",
    "l4ctx.contexts.journal.JournalError",
    "l4ctx.documents.commits._LongLinkError",
    "l4ctx.documents.repository.MissingObjectError",
    "l4ctx.documents.content.FileSizeError",
    "l4ctx.documents.content.LeftOutError",
    "l4ctx.documents.exclusion.git.GitError",
    "l4ctx.documents.exclusion.git.GitSlowError",
    "l4ctx.documents.exclusion.gitignore.PatternFileError",
    "l4ctx.documents.office.convert.OfficeError",
    "l4ctx.documents.office.convert.OfficeSupportMissing",
    "l4ctx.documents.pdf.PdfError",
    "l4ctx.documents.pdf.PdfSupportMissing",
    "l4ctx.documents.pdf_process.PdfiumError",
    "l4ctx.documents.pdf_worker._PageError",
    "l4ctx.documents.text.UndecodableError",
}


WITH_TRITON = {f"model.gpu.{name}" for name in ("kernels", "expand_kernel", "expanding", "layers", "merging", "probe")}


def errors() -> dict[str, type[BaseException]]:
    """Every exception class defined in the packages, by dotted name."""
    found = {}
    for name in MODULES.keys() - {"l4ctx.__main__"}:
        if name in WITH_TRITON and importlib.util.find_spec("triton") is None:
            continue
        for value in vars(importlib.import_module(name)).values():
            if isinstance(value, type) and issubclass(value, BaseException) and value.__module__ == name:
                found[f"{name}.{value.__qualname__}"] = value
    return found


def test_every_error_has_an_exit_code_or_is_internal() -> None:
    found = errors()
    users = {name: error for name, error in found.items() if issubclass(error, UserError)}
    assert found.keys() - users.keys() == INTERNAL
    assert users.keys() - WITHOUT_OWN_CODE == CODES.keys()
    assert {name: error.exit_code for name, error in users.items() if name not in WITHOUT_OWN_CODE} == CODES
    assert {error.exit_code for name, error in users.items() if name not in WITHOUT_OWN_CODE} == CODES_OF_ERRORS


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("--a goes without --b"), INPUT),
        (MemoryError(), MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory"), MEMORY),
        (RuntimeError("a bug"), None),
        (ValueError("a bug"), None),
        (OSError(5, "Input/output error"), INPUT),
        (PermissionError(13, "Permission denied", "notes"), INPUT),
        (OSError(28, "No space left on device", "notes"), MEMORY),
        (OSError(24, "Too many open files"), MEMORY),
        (OSError(12, "Cannot allocate memory"), MEMORY),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), MEMORY),
        (RuntimeError("unable to mmap 99 bytes from file <w>: Cannot allocate memory (12)"), MEMORY),
        (RuntimeError("std::bad_alloc"), MEMORY),
        (RuntimeError("can't start new thread"), MEMORY),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), MEMORY),
        (ImportError("No module named 'torch'"), None),
        (Exception("Cannot allocate memory (os error 12)"), MEMORY),
        (Exception("No such file or directory (os error 2)"), INPUT),
        (KeyError("out of memory"), None),
        (ValueError("embedded null byte"), INPUT),
    ],
)
def test_what_a_user_or_the_system_can_cause_has_an_exit_code(error: Exception, code: int | None) -> None:
    assert exit_code_of(error) == code
    if code is not None:
        assert one_line(error) and "\n" not in one_line(error)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UsageError("--a goes\nwithout --b"), "--a goes without --b"),
        (MemoryError(), "out of memory; free some memory, or raise its limit (ulimit -v)"),
        (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
        (
            PermissionError(13, "Permission denied", "notes/a.md"),
            "notes/a.md: Permission denied; change its permissions, or name another path",
        ),
        (
            OSError(28, "No space left on device", b"a", None, b"b"),
            "a (to b): No space left on device; free some space on that disk",
        ),
        (OSError(24, "Too many open files"), "Too many open files; raise the limit, as with ulimit -n 1024"),
        (OSError(0, "became a socket", "a"), "a: became a socket"),
        (
            RuntimeError("can't start new thread"),
            "Resource temporarily unavailable (can't start new thread); a limit of processes and threads: raise it "
            "(ulimit -u), or end other programs",
        ),
    ],
)
def test_the_line_names_the_file_and_what_to_do(error: Exception, line: str) -> None:
    assert one_line(error) == line


def raised_for(cause: Exception, error: UserError, *, twice: bool = False) -> UserError:
    """As the packages translate errors of the system."""
    try:
        try:
            raise cause
        except type(cause):
            raise error from None
    except UserError as found:
        return raised_for(found, ContextError(str(found))) if twice else found


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EFBIG, errno.ENOSPC])
def test_a_shortage_is_told_as_one(number: int) -> None:
    cause = OSError(number, os.strerror(number))
    for error in (ContextError("c: unread"), UsageError("q: unread"), UnreadableError("b: unread")):
        found = raised_for(cause, error, twice=isinstance(error, UnreadableError))
        assert exit_code_of(found) == MEMORY
        assert one_line(found) == f"{error}; {REMEDIES[number]}"
    unwritten = raised_for(cause, OutputError("the answer cannot be written"))
    assert (exit_code_of(unwritten), one_line(unwritten)) == (OUTPUT, str(unwritten))


def test_other_causes_change_nothing() -> None:
    for cause in (BlockingIOError(errno.EAGAIN, "locked"), PermissionError(errno.EACCES, "no"), KeyError("no memory")):
        found = raised_for(cause, ContextError("c: being written"))
        assert (exit_code_of(found), one_line(found)) == (CONTEXT, "c: being written")


def test_a_file_in_a_folder_has_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    owners = {Path("model"): CHECKPOINT, tmp_path / "context": CONTEXT}
    for file, code in {
        "model/config.json": CHECKPOINT,
        tmp_path / "model": CHECKPOINT,
        "context/blocks/0": CONTEXT,
        "models": INPUT,
        "model/../text": INPUT,
    }.items():
        assert exit_code_of(OSError(5, "Input/output error", str(file)), owners) == code, file
    assert exit_code_of(OSError(28, "No space left on device", "context/journal"), owners) == MEMORY


def test_an_exit_code_needs_no_torch() -> None:
    code = """
import sys
from l4ctx.errors import exit_code_of
print(exit_code_of(MemoryError()), exit_code_of(ValueError()), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == [str(MEMORY), "None", "False"]
