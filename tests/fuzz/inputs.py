"""Readers of files that others made, with valid files for each, and what counts as a failure of a reader."""

from __future__ import annotations

import contextlib
import random
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from l4ctx.errors import exit_code_of
from support.places import ROOT

Files = dict[str, bytes]
"""The files of one input by name. A name that ends with "/" is a folder."""

Mutate = Callable[[random.Random, Files], Files]


class Failure(Exception):
    """A reader did with an input what it must not do; `kind` is the same for the same fault."""

    def __init__(self, kind: str, details: str) -> None:
        super().__init__(kind)
        self.kind, self.details = kind, details


@dataclass(frozen=True)
class Reader:
    """How one kind of input is made and read.

    `read` gets the folder with the files. It may raise errors of users with an exit code in `codes`, and `expected`.
    `seeds`: valid inputs. `share`: how many of a thousand inputs are this reader's.
    """

    name: str
    seeds: Callable[[], Mapping[str, Files]]
    mutate: Mutate
    read: Callable[[Path], object]
    codes: frozenset[int]
    expected: tuple[type[Exception], ...] = ()
    share: int = 40


def mutated(reader: Reader, seed: Files, draws: Iterable[random.Random]) -> Files:
    """A change for each source of chance."""
    files = dict(seed)
    for draw in draws:
        files = reader.mutate(draw, files)
    return files


def one_of(*choices: tuple[str, Callable[[random.Random, bytes], bytes]]) -> Mutate:
    """Changes one of the files with these endings, by chance; a file occurs as often as its ending is listed."""

    def mutate(draw: random.Random, files: Files) -> Files:
        places = [(name, change) for end, change in choices for name in sorted(files) if name.endswith(end)]
        if not places:
            return files
        name, change = draw.choice(places)
        if draw.randrange(100) == 0 and len(files) > 1:
            return {other: content for other, content in files.items() if other != name}
        return files | {name: change(draw, files[name])}

    return mutate


class Folder:
    """A folder that holds one input after another; what did not change is not written again."""

    def __init__(self, path: Path) -> None:
        self.path, self._held = path, Files()

    def hold(self, files: Files) -> Path:
        for name in self._held.keys() - files.keys():
            self._remove(self.path / name)
        for name, content in files.items():
            if self._held.get(name) is not content:
                file = self.path / name
                file.unlink(missing_ok=True)  # readers that keep what they read go by the time and size of a new file
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
        self._held = dict(files)
        return self.path

    def _remove(self, file: Path) -> None:
        """With the folders that are empty then: a reader may have put something of its own into them."""
        file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for folder in file.relative_to(self.path).parents[:-1]:
                (self.path / folder).rmdir()


def check(reader: Reader, folder: Path) -> str:
    """Reads an input. Returns how that ended: "read", or the error's name. Raises Failure."""
    try:
        reader.read(folder)
    except Failure:
        raise
    except reader.expected as error:
        return type(error).__name__
    except Exception as error:
        if exit_code_of(error) not in reader.codes:
            raise Failure(kind_of(error), "".join(traceback.format_exception(error))) from None
        return type(error).__name__
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of code in Rust
            raise
        raise Failure(kind_of(error), "".join(traceback.format_exception(error))) from None
    return "read"


def kind_of(error: BaseException) -> str:
    """What went wrong and where in our code: the same for the same fault."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_ours(frame.filename)]
    where = f"{_short(ours[-1].filename)}:{ours[-1].name}" if ours else "?"
    return f"{type(error).__name__} in {where}"


def _is_ours(file: str) -> bool:
    return file.startswith(str(ROOT)) and Path(file).relative_to(ROOT).parts[0] in ("l4ctx", "model", "cache")


def _short(file: str) -> str:
    return Path(file).relative_to(ROOT).as_posix()
