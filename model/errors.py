"""Errors that a user can cause: their root, and those of a checkpoint and of a prompt's length. Imports no torch."""

from __future__ import annotations


class UserError(Exception):
    """What a user can cause and mend. The message is one line: what is wrong, where, and how to mend it.

    Everything else that is raised is a bug and keeps its traceback.
    """

    exit_code: int
    """What the command exits with; `l4ctx.errors` names the codes."""


class ConfigError(UserError):
    """A configuration that cannot be used; the message names the field and what would be accepted."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint that cannot be loaded; the message names the file or tensor and what is wrong with it."""

    exit_code = 3


class LengthError(UserError):
    """More tokens than the model's positions allow."""

    exit_code = 4
