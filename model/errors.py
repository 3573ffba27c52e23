"""Errors that a user can cause: the base class, and those for checkpoints and prompt length. Imports no torch."""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can cause and fix. The message is one line: what is wrong, where, and how to fix it.

    Any other exception is a bug and keeps its traceback.
    """

    exit_code: int
    """The command's exit code; `l4ctx.errors` names the codes."""


class ConfigError(UserError):
    """A configuration that cannot be used; the message names the field and the accepted values."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint that cannot be loaded; the message names the file or tensor and what is wrong with it."""

    exit_code = 3


class LengthError(UserError):
    """More tokens than the model's positions allow."""

    exit_code = 4


class DivisionError(UserError):
    """A model that cannot be divided over so many ranks; the message names the size that does not allow it."""

    exit_code = 2


class RankLostError(UserError):
    """One of several processes that compute together has ended, so that none of them can go on."""

    exit_code = 6
