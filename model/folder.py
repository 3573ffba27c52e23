"""File names in a checkpoint folder, and the bounded reader of small files. Imports no torch."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
PICKLED_WEIGHTS = re.compile(r"(pytorch_model|model|consolidated|adapter_model)[\w.-]*\.(bin|pth|pt|ckpt)")
"""Never read: loading such a file can execute arbitrary code."""

MAX_JSON_BYTES = 2**22
"""Of a configuration: one that lists each quantized expert has 0.6 MB. Parsed, it takes up to 24 times its size."""

MAX_INDEX_BYTES = 2**24
"""Of an index: that of 18,000 tensors has 2 MB."""

MAX_FILE_BYTES = 2**28
"""Of a tokenizer.json, the largest small file: Llama 4's has 28 MB."""

PIECE_BYTES = 2**20
UNREADABLE = (OSError, ValueError, RecursionError)
"""What `read_json` raises; RecursionError for lists or objects that are nested too deeply."""


def open_regular(file: str | Path, *, follow: bool = True, is_seen: bool = False) -> FileIO:
    """A regular file, open for reading without a buffer. Raises OSError, whose `strerror` says what is wrong.

    Never waits for a pipe, and opens no device. Follows links unless told otherwise, since the hub's cache consists of
    them. `is_seen`: the caller has just seen a regular file there, and spares another look before it is opened.
    """
    if not is_seen:
        _check_regular(file, os.stat(file, follow_symlinks=follow))
    flags = os.O_RDONLY | (0 if follow else getattr(os, "O_NOFOLLOW", 0))
    for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    stream = open(os.open(file, flags), "rb", buffering=0)  # noqa: SIM115 (the caller closes it)
    mode = os.fstat(stream.fileno()).st_mode
    if not stat.S_ISREG(mode):
        stream.close()
        raise OSError(errno.EINVAL, f"became a {kind(mode)}", str(file))
    return stream


def kind(mode: int) -> str:
    """Describes something that is neither a regular file nor a folder, by its mode."""
    return {stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}.get(stat.S_IFMT(mode), "device or folder")


def _check_regular(file: str | Path, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    if stat.S_ISLNK(status.st_mode):
        raise OSError(errno.ELOOP, "a link, not a regular file", str(file))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(file))


def read_regular(file: str | Path, most: int, *, follow: bool = True) -> bytes:
    """A regular file of at most `most` bytes, as `open_regular` opens it. Raises OSError.

    Allocates no more than is there.
    """
    with open_regular(file, follow=follow) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most:
            raise _too_large(file, most)
        pieces: list[bytes] = []
        left, wanted = most + 1, size + 1
        while left and (piece := stream.read(min(wanted, left))):
            pieces.append(piece)
            left, wanted = left - len(piece), PIECE_BYTES
    if not left:
        raise _too_large(file, most)
    check_whole(file, most + 1 - left, size)
    return b"".join(pieces)


def check_whole(file: str | Path, read: int, size: int) -> None:
    """Raises OSError if fewer bytes were read than are there: a file elsewhere may end early for one read."""
    if read < size:
        raise OSError(errno.EIO, f"only {read:,} of its {size:,} bytes could be read", str(file))


def _too_large(file: str | Path, most: int) -> OSError:
    size = f"{most >> 20} MiB" if most >> 20 else f"{most:,} bytes"
    return OSError(errno.EINVAL, f"larger than {size}", str(file))


def reason_of(error: BaseException) -> str:
    """Why something in UNREADABLE was raised, for a message that names the file itself."""
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def is_listed(file: Path) -> bool:
    """Whether something has that name, a dangling link included. Raises OSError where the system does not say."""
    try:
        os.lstat(file)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def read_json(file: Path, most: int = MAX_JSON_BYTES) -> Any:
    """The content of a JSON file of at most `most` bytes. Raises the errors in UNREADABLE."""
    return json.loads(read_regular(file, most).decode("utf-8"))


def read_object(file: Path, error: Callable[[str], Exception]) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file. Raises `error` with a one-line message."""
    try:
        content = read_json(file)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except UNREADABLE as reason:
        raise error(f"{file}: cannot be read as JSON ({reason_of(reason)})") from None
    if not isinstance(content, dict):
        raise error(f"{file}: the top level is not an object")
    return content
