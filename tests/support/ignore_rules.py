"""Random `.gitignore` files that cover all of git's pattern syntax, with paths to match; and git's own verdicts."""

from __future__ import annotations

import os
import random
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

LITERALS = [
    b"a",
    b"b",
    b"c",
    b"A",
    b"B",
    b".",
    b"x",
    b"-",
    b"^",
    b"!",
    b"#",
    b"]",
    b":",
    b" ",
    b"\t",
    b"\r",
    b"1",
    "é".encode(),
    b"\xff",
    "\u3000".encode(),
]
WILDCARDS = [b"*", b"*", b"**", b"***", b"?", b"[", b"\\", b"/", b"/", b"**/", b"/**", b"/**/"]
ESCAPES = [b"\\ ", b"\\!", b"\\#", b"\\*", b"\\a", b"\\[", b"\\\\"]
CLASSES = [
    b"[a-c]",
    b"[!a]",
    b"[^ab]",
    b"[]a]",
    b"[!]-]",
    b"[a-]",
    b"[-a]",
    b"[z-a]",
    b"[9-0]",
    b"[\\]a]",
    b"[a-\\]]",
    b"[[:digit:]]",
    b"[[:upper:]b]",
    b"[[:space:]]",
    b"[[:foo:]]",
    b"[[:alpha:]",
    b"[[:]a]",
    b"[a",
    b"[]",
    b"[!]",
    b"[\\",
    b"[a-",
    b"[[:punct:]-z]",
    b"[A-Z]",
    b"[/]",
    b"[!/a]",
    b"[a-c-e]",
    b"[\xc3-\xff]",
    b"[[a]",
    b"[:a:]",
    b"[[:a]",
    b"[a[:digit:]-z]",
    b"[+--]",
    b"[^^]",
]
ENDS = [b" ", b"  ", b"\t", b"\r", b" \r", b"\\ ", b"\\  ", b"/ ", b"\\"]


@dataclass(frozen=True)
class RuleSet:
    """The content of a `.gitignore`, and the entries of its folder: (path, whether it is a folder)."""

    rules: bytes
    entries: tuple[tuple[bytes, bool], ...]


def random_pattern(draw: random.Random) -> bytes:
    kinds = [LITERALS, LITERALS[:5], LITERALS[:5], WILDCARDS, CLASSES, ESCAPES]
    pattern = b"".join(draw.choice(draw.choice(kinds)) for _ in range(draw.choice([1, 1, 2, 2, 3, 3, 4, 6])))
    pattern = b"!" * (draw.random() < 0.2) + b"/" * (draw.random() < 0.15) + pattern + b"/" * (draw.random() < 0.2)
    pattern = re.sub(rb"^(!?/?[^*?[\\]*[^*?[\\/!])\*\*+", rb"\1*", pattern)  # versions of git differ on a**/b
    return pattern + (draw.choice(ENDS) if draw.random() < 0.15 else b"")


def random_name(draw: random.Random) -> bytes:
    """A file name that does not begin with a dot."""
    letters = [
        draw.choice(LITERALS[:5] if draw.random() < 0.6 else [*LITERALS, b"[", b"*", b"\\"])
        for _ in range(draw.choice([1, 1, 2, 2, 3, 4]))
    ]
    return b"".join(letters).lstrip(b".") or b"a"


def random_rules(draw: random.Random) -> bytes:
    rules = b"\n".join(random_pattern(draw) for _ in range(draw.choice([1, 1, 2, 3, 5])))
    return b"\xef\xbb\xbf" * (draw.random() < 0.03) + rules + b"\n" * (draw.random() < 0.5)


def random_sets(seed: int, count: int) -> list[RuleSet]:
    draw = random.Random(seed)
    sets = []
    for _ in range(count):
        entries: dict[bytes, bool] = {}
        for _ in range(12):
            parts = [random_name(draw) for _ in range(draw.choice([1, 1, 2, 2, 3]))]
            above = [b"/".join(parts[:n]) for n in range(1, len(parts))]
            if all(entries.get(path, True) for path in above):
                entries |= dict.fromkeys(above, True)
                entries.setdefault(b"/".join(parts), draw.random() < 0.4)
        sets.append(RuleSet(random_rules(draw), tuple(entries.items())))
    return sets


def ignored_by_git(repository: Path, sets: list[RuleSet], *, ignore_case: bool) -> list[list[bool]]:
    """Whether git ignores each entry of each set, itself or through a parent folder. Runs git once for all."""
    subprocess.run(["git", "init", "-q", repository], check=True)
    subprocess.run(["git", "-C", repository, "config", "core.ignoreCase", str(ignore_case).lower()], check=True)
    asked = []
    for number, each in enumerate(sets):
        folder = os.path.join(os.fsencode(repository), b"%d" % number)
        os.mkdir(folder)
        for path, is_folder in each.entries:
            if is_folder:
                os.makedirs(os.path.join(folder, path), exist_ok=True)
            else:
                os.close(os.open(os.path.join(folder, path), os.O_CREAT | os.O_WRONLY))
            asked.append(b"%d/%s" % (number, path))
        with open(os.path.join(folder, b".gitignore"), "wb") as file:
            file.write(each.rules)
    command = ["git", "-C", str(repository), "check-ignore", "-z", "--stdin", "--verbose", "--non-matching"]
    run = subprocess.run(command, input=b"\0".join(asked) + b"\0", capture_output=True, check=False)
    said = run.stdout.split(b"\0")
    assert said[3::4] == asked
    verdicts = iter(
        [bool(file) and not pattern.startswith(b"!") for file, pattern in zip(said[:-1:4], said[2::4], strict=True)]
    )
    return [[next(verdicts) for _ in each.entries] for each in sets]
