"""Asks git which files of a work tree it ignores, in a way that lets no repository run programs or block us."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from dataclasses import dataclass

from l4ctx.formatting import printable

SECONDS = 20.0
MOST_OUTPUT = 64 << 20  # bytes of names

OPTIONS = (
    "--no-pager",
    "--literal-pathspecs",
    "-c",
    "core.fsmonitor=false",
    "-c",
    "core.hooksPath=/dev/null",
    "-c",
    "core.untrackedCache=false",
    "-c",
    "core.sshCommand=false",
    "-c",
    "core.gitProxy=",
    "-c",
    "submodule.recurse=false",
)
_LIST = ("ls-files", "-z", "--others", "--ignored", "--exclude-standard", "--directory")


class GitError(Exception):
    """git gives no answer; the message says why in one line."""


class GitSlowError(GitError):
    """git did not finish in time."""


@dataclass(frozen=True)
class GitRules:
    """What git ignores below a folder."""

    folder: str
    ignored: frozenset[bytes]  # relative paths; of a folder that is ignored, its own alone

    def reason(self, path: str, *, is_folder: bool) -> str | None:
        """Why the entry at `path`, below a folder that is not ignored itself, is left out; None where it is not."""
        within = os.fsencode(path[len(self.folder.rstrip(os.sep)) + 1 :].replace(os.sep, "/"))
        return "ignored by git" if within in self.ignored else None


def git_program() -> str | None:
    """The path of git; None where it is not installed."""
    found = shutil.which("git")
    return found and os.path.abspath(found)


def ask_git(git: str, folder: str, root: str) -> GitRules:
    """What git ignores below `folder`, in the work tree whose top folder is `root`; both are absolute real paths.

    The user's own configuration holds, and what is tracked is never ignored. Raises GitError.
    """
    if os.pathsep in root:  # git could not be kept from going further up
        raise GitError(f"a path with {os.pathsep} in it")
    names = git_output([git, "-C", folder, *OPTIONS, *_LIST], git_environment(root)).split(b"\0")
    pairs = zip(names, [*names[1:], b""], strict=True)
    # A folder that is listed before its own entries is not ignored itself, only all that is in it.
    alone = (name for name, following in pairs if not (name.endswith(b"/") and following.startswith(name)))
    return GitRules(folder, frozenset(name.rstrip(b"/") for name in alone if name not in (b"", b"./")))


def git_environment(root: str) -> dict[str, str]:
    """Without what other git processes pass on; the user's configuration may be named there, and stays."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("GIT_") or name.startswith("GIT_CONFIG")
    }
    return kept | {
        "GIT_WORK_TREE": root,  # whatever core.worktree says
        "GIT_CEILING_DIRECTORIES": os.path.dirname(root),
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_ALLOW_PROTOCOL": "none",  # objects that are missing stay so
        "LC_ALL": "C",
    }


def git_output(
    command: list[str],
    environment: dict[str, str],
    seconds: float | None = None,
    most: int | None = None,
    what: str = "names",
) -> bytes:
    """Standard output of a process that ends well within `seconds`, or SECONDS, and says no more than there can be:
    `most` bytes, or MOST_OUTPUT. Raises GitError."""
    most, seconds = MOST_OUTPUT if most is None else most, SECONDS if seconds is None else seconds
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise GitError(f"it cannot be started: {error.strerror}") from None
        late = threading.Event()

        def stop() -> None:
            late.set()
            end_group(process)

        timer = threading.Timer(seconds, stop)
        timer.daemon = True
        timer.start()
        assert process.stdout is not None
        try:
            output = process.stdout.read(most + 1)
            if len(output) <= most:
                process.wait()
        finally:
            timer.cancel()
            end_group(process)
            process.wait()
            process.stdout.close()
        if late.is_set():
            raise GitSlowError(f"no answer within {seconds:.0f} s")
        if len(output) > most:
            raise GitError(f"more than {most >> 20} MiB of {what}")
        if process.returncode:
            errors.seek(0)
            lines = errors.read(4096).decode(errors="replace").splitlines()
            said = next((line for line in lines if line.startswith("fatal:")), lines[0] if lines else "")
            raise GitError(printable(said.removeprefix("fatal: "))[:200] or f"exit code {process.returncode}")
    return output


def end_group(process: subprocess.Popen[bytes]) -> None:
    """The process and what it started, if it has not been waited for."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
