"""Errors that a user can cause: files of keys and values that cannot be read or written. Imports no torch."""

from __future__ import annotations

from model.errors import UserError


class DiskError(UserError):
    """A file of ours that is missing, damaged or cannot be read; the message names it and what is wrong."""

    exit_code = 7


class UnreadableError(DiskError):
    """A file of ours that the system did not let us read this time; nothing is known of what is in it."""


class DiskFullError(UserError):
    """A write for which there is no room, or that failed; the message names the folder."""

    exit_code = 5
