"""Exit codes, and the errors that a user can cause. Imports no torch.

An error class says its exit code itself. Those that one module alone raises are beside it, and derive from one of these
or from `UserError`; those of `model` and `cache` are in the `errors.py` there.
"""

from __future__ import annotations

import sys

from model.errors import UserError

OUTPUT, INPUT, CHECKPOINT, TOO_LONG, MEMORY, MODEL, CONTEXT, INTERRUPTED, CLOSED = 1, 2, 3, 4, 5, 6, 7, 130, 141
CODES_OF_ERRORS = frozenset((OUTPUT, INPUT, CHECKPOINT, TOO_LONG, MEMORY, MODEL, CONTEXT))


class OutputError(UserError):
    """An answer that cannot be written, as on a full disk."""

    exit_code = OUTPUT


class InputError(UserError):
    """What was asked for, or given to be read, cannot be used."""

    exit_code = INPUT


class UsageError(InputError):
    """Arguments that do not go together."""


class RequestError(InputError):
    """A request that cannot be carried out: a device that this machine lacks, standard input without text."""


class UnusableCheckpointError(UserError):
    """A file that lies beside a checkpoint's weights, and that is missing, broken or cannot be followed."""

    exit_code = CHECKPOINT


class ModelFailureError(UserError):
    """A model, or a process that runs one, that failed at its work."""

    exit_code = MODEL


class ContextError(UserError):
    """A saved context that cannot be used or changed; the message names it, the reason and how to fix it."""

    exit_code = CONTEXT


def exit_code_of(error: Exception) -> int | None:
    """The exit code of what a user can cause, memory that ran out included; None for anything else."""
    if isinstance(error, UserError):
        return error.exit_code
    torch = sys.modules.get("torch")  # where nothing has imported it, none of its errors was raised
    out_of_memory: tuple[type[Exception], ...] = (MemoryError, *([torch.OutOfMemoryError] if torch else []))
    return MEMORY if isinstance(error, out_of_memory) else None


def one_line(error: Exception) -> str:
    """What an error says."""
    return " ".join(str(error).splitlines()) or "out of memory"
