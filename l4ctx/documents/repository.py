"""A git repository: the files of a commit, and what differs between two.

Asks git in a way that lets no repository run programs, filters or hooks, fetch anything, or lead out of itself.
"""

from __future__ import annotations

import os
import select
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from l4ctx.documents.document import DocumentError
from l4ctx.documents.exclusion.git import OPTIONS, GitError, end_group, git_environment, git_output, git_program
from l4ctx.formatting import printable
from l4ctx.machine.files import SAMPLE_BYTES

SECONDS = 60.0  # for git to answer
MOST_DIFF = 256 << 20  # bytes
FILES, LINK, SUBMODULE = ("100644", "100755", "100664"), "120000", "160000"

_DIFF = (
    "-c",
    "core.quotePath=false",
    "diff",
    "-O/dev/null",  # no order of files
    "--no-ext-diff",
    "--no-textconv",
    "--no-color",
    "--no-relative",
    "--find-renames",
    "--submodule=short",
    "--src-prefix=a/",
    "--dst-prefix=b/",
)


class TreeFile(NamedTuple):
    """A file, link or submodule of a commit."""

    mode: str
    identifier: str  # of its object
    path: str  # from the top of the tree; undecodable bytes as surrogates


class MissingObjectError(Exception):
    """The repository does not have an object, as a partial clone."""


class Repository:
    """The repository of a work tree. Close it."""

    def __init__(self, git: str, root: str) -> None:
        self.root = root
        self._git = git
        self._reading: subprocess.Popen[bytes] | None = None

    @classmethod
    def around(cls, path: str) -> tuple[Repository, str]:
        """The repository whose work tree `path` lies in, whether or not it is there now, and its path from the top.

        Raises DocumentError where there is none, or no git.
        """
        git = git_program()
        if git is None:
            raise DocumentError("git is not installed, and commits are read by git")
        folder, name = os.path.split(os.path.abspath(path))
        here = os.path.join(os.path.realpath(folder), name).rstrip(os.sep) or os.sep
        root = next((str(each) for each in (Path(here), *Path(here).parents) if _has_repository(each)), None)
        if root is None or os.pathsep in root:
            why = "in no git work tree" if root is None else f"in a folder with {os.pathsep} in its name"
            raise DocumentError(f"{printable(path)}: is {why}, so that no commit of it can be read")
        within = os.path.relpath(here, root).replace(os.sep, "/")
        return cls(git, root), "" if within == "." else within

    def commit(self, name: str, option: str) -> str:
        """The id of a commit. Raises DocumentError for an unknown one, naming the `option` that it was given by."""
        try:
            found = self._output("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        except GitError as error:
            why = "no such commit" if "exit code" in str(error) else str(error)
            raise DocumentError(f"{option} {printable(name)}: {why} in {printable(self.root)}") from None
        return found.decode("ascii", "replace").strip()

    def merge_base(self, one: str, other: str) -> str:
        """The best common ancestor of two commits. Raises DocumentError."""
        try:
            found = self._output("merge-base", one, other)
        except GitError:
            raise DocumentError(f"--diff: {one[:12]} and {other[:12]} have no commit in common") from None
        return found.decode("ascii", "replace").split("\n")[0]

    def files(self, commit: str) -> dict[str, TreeFile]:
        """All that a commit holds, by path, in the order of their bytes. Raises DocumentError."""
        try:
            listed = self._output("ls-tree", "-r", "-z", "--full-tree", commit)
        except GitError as error:
            raise DocumentError(f"the files of commit {commit[:12]} cannot be listed: {error}") from None
        found: dict[str, TreeFile] = {}
        for entry in listed.split(b"\0"):
            head, _, path = entry.partition(b"\t")
            if path:
                mode, _, identifier = head.decode("ascii", "replace").split(" ")
                name = os.fsdecode(path)
                found[name] = TreeFile(mode, identifier, name)
        return found

    def diff(self, old: str, new: str, within: str) -> bytes:
        """What differs between two commits in a file or folder, as a patch. Raises DocumentError."""
        try:
            return self._output(*_DIFF, old, new, "--", *([within] if within else []), most=MOST_DIFF, what="diff")
        except GitError as error:
            raise DocumentError(f"--diff: git cannot tell what differs: {error}") from None

    def read(self, file: TreeFile, check: Callable[[bytes, int], None]) -> bytes:
        """The bytes of a file as they were committed: no filter is applied.

        `check` gets the first SAMPLE_BYTES and the size before the rest is read; it can raise to prevent that. Raises
        MissingObjectError, and DocumentError where git fails.
        """
        process = self._process()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(f"{file.identifier}\n".encode())
            process.stdin.flush()
        except OSError:
            raise self._failed(file) from None
        if not select.select([process.stdout], [], [], SECONDS)[0]:
            raise self._failed(file)
        header = process.stdout.readline(1024).split()
        if header[1:] == [b"missing"]:
            raise MissingObjectError
        if len(header) != 3 or header[1] != b"blob" or not header[2].isdigit():
            raise self._failed(file)
        size = int(header[2])
        raw = process.stdout.read(min(size, SAMPLE_BYTES))
        try:
            check(raw, size)
        except BaseException:
            self.close()  # what is left to be read goes with the process
            raise
        raw += process.stdout.read(size - len(raw))
        if len(raw) != size or process.stdout.read(1) != b"\n":
            raise self._failed(file)
        return raw

    def close(self) -> None:
        process, self._reading = self._reading, None
        if process is not None:
            end_group(process)
            process.communicate()

    def _failed(self, file: TreeFile) -> DocumentError:
        self.close()
        return DocumentError(f"{printable(file.path)}: git cannot read it (object {file.identifier[:12]})")

    def _process(self) -> subprocess.Popen[bytes]:
        if self._reading is None:
            try:
                self._reading = subprocess.Popen(
                    [*self._command(), "cat-file", "--batch"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=git_environment(self.root),
                    start_new_session=True,
                )
            except OSError as error:
                raise DocumentError(f"git cannot be started: {error.strerror}") from None
        return self._reading

    def _command(self) -> list[str]:
        return [self._git, "-C", self.root, *OPTIONS]

    def _output(self, *arguments: str, most: int | None = None, what: str = "names") -> bytes:
        return git_output([*self._command(), *arguments], git_environment(self.root), SECONDS, most, what)


def _has_repository(folder: Path) -> bool:
    return os.path.lexists(folder / ".git")
