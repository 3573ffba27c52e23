"""Errors that a user can cause: files of keys and values that cannot be read or written. Imports no torch."""

from __future__ import annotations

from model.errors import UserError


class DiskError(UserError):
    """A file of keys and values that is missing, damaged or unreadable; the message names it and the reason."""

    exit_code = 7


class UnreadableError(DiskError):
    """A file that the system would not let us read this time; its content may well be intact."""


class DiskFullError(UserError):
    """A write that failed, for lack of space or otherwise; the message names the folder."""

    exit_code = 5
