"""Patterns of `.gitignore` mean what they mean to git, and none makes us wait."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest

import l4ctx.documents.exclusion.gitignore
import l4ctx.documents.exclusion.wildmatch
from l4ctx.documents.exclusion.gitignore import PatternFile
from support.ignore_rules import RuleSet, ignored_by_git, random_sets

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git, the oracle for ignore rules, is missing")
Verdicts = list[tuple[bool, list[RuleSet], list[list[bool]]]]  # without regard to case?, rules, what git says


def ignored(patterns: PatternFile, path: bytes, is_folder: bool) -> bool:
    """Whether a path is ignored, by itself or by a folder that it is in."""
    parts = path.split(b"/")
    return any(
        patterns.ignores(b"/".join(parts[:n]), is_folder=n < len(parts) or is_folder) for n in range(1, len(parts) + 1)
    )


def differences(verdicts: Verdicts) -> list[tuple[bytes, bytes, bool]]:
    """(rules, path, what git says) wherever we say something else."""
    found = []
    for ignore_case, sets, said in verdicts:
        for each, of_git in zip(sets, said, strict=True):
            patterns = PatternFile(each.rules, ignore_case=ignore_case)
            found += [
                (each.rules, path, wanted)
                for (path, is_folder), wanted in zip(each.entries, of_git, strict=True)
                if ignored(patterns, path, is_folder) != wanted
            ]
    return found


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Verdicts:
    """Of 1,000 rule sets."""
    return [
        (ignore_case, sets, ignored_by_git(tmp_path_factory.mktemp("rules"), sets, ignore_case=ignore_case))
        for ignore_case, sets in ((False, random_sets(11, 800)), (True, random_sets(12, 200)))
    ]


@needs_git
def test_random_rules_are_those_of_git(verdicts: Verdicts) -> None:
    said = [verdict for _, _, of_git in verdicts for of_set in of_git for verdict in of_set]
    assert 0.05 < sum(said) / len(said) < 0.5
    assert differences(verdicts) == []


def keep_tabs_out(line: bytes) -> bytes:
    return line.rstrip(b" \t")


def star_is_any(original: Callable[..., int]) -> Callable[..., int]:
    def wrong(tokens: list[int], pattern: bytes, first: int, pathname: bool) -> int:
        return original(tokens, pattern, first, False)

    return wrong


def first_bracket_closes(original: Callable[..., tuple[int, int]]) -> Callable[..., tuple[int, int]]:
    def wrong(pattern: bytes, start: int, ignore_case: bool) -> tuple[int, int]:
        if pattern[start : start + 2] == b"[]":
            return 0, start + 1
        return original(pattern, start, ignore_case)

    return wrong


def caret_is_a_letter(original: Callable[..., tuple[int, int]]) -> Callable[..., tuple[int, int]]:
    def wrong(pattern: bytes, start: int, ignore_case: bool) -> tuple[int, int]:
        return original(pattern.replace(b"[^", b"[\\^"), start, ignore_case)

    return wrong


def slash_for_backslash(original: Callable[[bytes], int]) -> Callable[[bytes], int]:
    return lambda pattern: original(pattern.replace(b"\\", b"a"))


@needs_git
@pytest.mark.parametrize(
    ("module", "name", "wrong"),
    [
        (l4ctx.documents.exclusion.gitignore, "_without_trailing_blanks", lambda _: keep_tabs_out),
        (l4ctx.documents.exclusion.gitignore, "_without_trailing_blanks", lambda _: lambda line: line),
        (l4ctx.documents.exclusion.gitignore, "_without_trailing_blanks", lambda _: lambda line: line.rstrip(b" ")),
        (l4ctx.documents.exclusion.wildmatch, "_add_star", star_is_any),
        (l4ctx.documents.exclusion.wildmatch, "_class", first_bracket_closes),
        (l4ctx.documents.exclusion.wildmatch, "_class", caret_is_a_letter),
        (l4ctx.documents.exclusion.gitignore, "literal_length", slash_for_backslash),
        (l4ctx.documents.exclusion.wildmatch, "_CLASSES", lambda original: original | {b"foo": 1 << ord("a")}),
        (l4ctx.documents.exclusion.wildmatch, "_CLASSES", lambda original: original | {b"punct": 0}),
    ],
)
def test_what_is_wrong_with_the_matcher_is_seen(
    verdicts: Verdicts, monkeypatch: pytest.MonkeyPatch, module: object, name: str, wrong: Callable[..., object]
) -> None:
    monkeypatch.setattr(module, name, wrong(getattr(module, name)))
    assert differences(verdicts)


@pytest.mark.parametrize(
    ("rules", "ignored_paths", "read_paths"),
    [
        (b"[9-0]\n[z-a]x\n[b-\\]]", [b"9", b"zx", b"b"], [b"0", b"5", b"-", b"ax", b"mx", b"]"]),  # the first one alone
        (
            b"s[[:digit:]]\nf[[:space:]]b\n[[:xdigit:]]F",
            [b"s1", b"f b", b"f\tb", b"aF"],
            [b"sx", b"fxb", b"f\vb", b"gF"],
        ),
        (b"foo\t\nbar  \nbaz\\  \nqux\r\n", [b"foo\t", b"bar", b"baz ", b"qux"], [b"foo", b"bar ", b"baz", b"baz  "]),
        (b"\\#a\n\\!b\n!c\n# d\n", [b"#a", b"!b"], [b"a", b"b", b"c", b"# d", b" d"]),
        (
            b"*.log\n!keep.log\n/top\nx/y\n",
            [b"a/b.log", b"top", b"x/y"],
            [b"keep.log", b"a/keep.log", b"a/top", b"a/x/y"],
        ),
        (b"a/**/z\n**/m\nn/**\n", [b"a/z", b"a/b/c/z", b"m", b"x/y/m", b"n/o/p"], [b"az", b"a/bz", b"n"]),
        (b"*\xff\n\xc3?\n[\xc3]x", [b"a\xff", "é".encode(), b"\xc3x"], [b"\xff\xfe", b"\xc3", b"\xa9x"]),
        (b"a\0b\n\0c\n", [b"a"], [b"c", b"a\\0b"]),
        (b"[a\n[!]\n[[:alpha:]\n[[:none:]]\nx\\\n", [], [b"a", b"[a", b"]", b"x", b"x\\", b"b"]),
        (b"\n/\n//\n!\n!/\n   \n\r\n", [], [b"a", b" ", b"!"]),
    ],
)
def test_meanings(rules: bytes, ignored_paths: list[bytes], read_paths: list[bytes]) -> None:
    patterns = PatternFile(rules)
    assert [path for path in [*ignored_paths, *read_paths] if ignored(patterns, path, False)] == ignored_paths


def test_rules_for_folders_and_without_regard_to_case() -> None:
    patterns = PatternFile(b"Build/\n*.LOG\n[A-C]\n[!a]?\n", ignore_case=True)
    assert patterns.ignores(b"BUILD", is_folder=True) and not patterns.ignores(b"build", is_folder=False)
    assert patterns.ignores(b"x.Log", is_folder=False) and patterns.ignores(b"b", is_folder=False)
    assert not PatternFile(b"*.LOG").ignores(b"x.log", is_folder=False)


@pytest.mark.parametrize(
    "rules",
    [
        b"*a" * 14 + b"b",
        b"*a" * 127 + b"b",
        b"**/" * 500 + b"b",
        b"a/" + b"**/a*/" * 300 + b"b",
        b"[!b]*" * 100 + b"b",
        b" " * 120_000 + b"\n" + b"\\ " * 60_000,
        b"*" * 100_000 + b"b",
        b"*?" * 50_000 + b"b",
        b"[" * 100_000,
        b"[[:" * 30_000,
        b"[[:alpha:]" * 10_000,
        b"\n".join(b"f%d" % n for n in range(200_000)),
        b"\n".join(b"*f%d*b" % n for n in range(20_000)),
        b"\n".join(b"a[b-z]%d/*b" % n for n in range(20_000)),
        b"\\" * 100_001,
        b"!" * 100_000,
        b"*a" * 1_000_000,
        b"**/a" * 500_000,
    ],
    ids=range(18),
)
def test_no_pattern_makes_us_wait(rules: bytes) -> None:
    """Backtracking would take years over the first of them."""
    patterns = PatternFile(rules)
    for name in (b"a" * 60, b"a" * 255, b"a/" * 1000 + b"a" * 255):
        assert not patterns.ignores(name, is_folder=True)
