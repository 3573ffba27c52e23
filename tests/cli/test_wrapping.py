"""Lines broken at words: whole texts and pieces, wide characters, what is preformatted, and that nothing is lost."""

from __future__ import annotations

import random
import re

import pytest

from l4ctx.cli.wrapping import WordWrap, cells, wrapped

TEXT = (
    "The old wall by the harbor was painted again in the third week of spring, and nobody knew why. "
    "A second sentence (with parentheses, and a dash - here) follows.\n\nA new paragraph, 1,234,567 words long.\n"
)


def broken(text: str, width: int, pieces: int = 1) -> str:
    wrap = WordWrap(lambda: width)
    return "".join(wrap.push(text[i : i + pieces]) for i in range(0, len(text), pieces)) + wrap.finish()


@pytest.mark.parametrize("width", [12, 20, 40, 41, 80, 200])
@pytest.mark.parametrize("pieces", [1, 3, 7, 10_000])
def test_words_stay_whole_and_lines_within_the_width(width: int, pieces: int) -> None:
    shown = broken(TEXT, width, pieces)
    assert shown.split() == TEXT.split() and shown == broken(TEXT, width)
    longest = max(map(len, TEXT.split()))
    assert all(len(line) <= max(width, longest) for line in shown.splitlines())
    assert shown.count("\n\n") == 1 and shown.endswith("long.\n")
    if width == 200:
        assert shown == TEXT


def test_lines_are_filled() -> None:
    assert broken("aaa bbb ccc dddd", 7) == "aaa bbb\nccc\ndddd"
    assert broken("aaa bbb ccc\n", 11) == "aaa bbb ccc\n"
    assert broken("aaa  bbb", 6) == "aaa\nbbb"


def test_only_the_present_word_is_held_back() -> None:
    wrap = WordWrap(lambda: 40)
    assert wrap.push("The code is 48") == "The code is"
    assert wrap.push("213.") == "" and wrap.push(" ") == " 48213."
    assert not wrap.is_at_line_start and wrap.push("\n") == " \n" and wrap.is_at_line_start
    assert wrap.push("x" * 41) == "x" * 41 and wrap.push("x") == "x"  # on no line: as it comes
    assert wrap.finish() == ""


def test_a_word_wider_than_the_line_is_not_cut() -> None:
    url = "https://example.org/" + "a" * 60
    assert broken(f"See {url} for more words\n", 30) == f"See\n{url} for more\nwords\n"
    assert broken(f"{url}\n{url}", 30) == f"{url}\n{url}"


def test_lists_hang() -> None:
    assert broken("- one two three four\n- five\n", 11) == "- one two\n  three\n  four\n- five\n"
    assert broken("12. one two three\n", 11) == "12. one two\n    three\n"
    assert broken("  * one two three\n", 11) == "  * one two\n    three\n"
    assert broken("- outer\n    - inner word word word\n", 20) == "- outer\n    - inner word\n      word word\n"


@pytest.mark.parametrize(
    "block",
    [
        "```python\nvalue = function(argument, another) + something_else\n```\n",
        "    value = function(argument, another) + something_else\n",
        "\tvalue = function(argument, another) + 1234567\n",
        "| name | value | another column | and one more |\n|---|---|---|---|\n",
    ],
)
def test_what_is_preformatted_is_left_alone(block: str) -> None:
    for pieces in (1, 4, 100):
        assert broken(block + "Words after it are broken again.\n", 20, pieces) == (
            block + "Words after it are\nbroken again.\n"
        )


def test_wide_characters() -> None:
    text = "代碼是四八二一三。舊牆在港口旁邊,沒有人知道為什麼。"
    shown = broken(text, 11).split("\n")
    assert "".join(shown) == text and all(cells(line) <= 11 for line in shown)
    assert not any(line.startswith(("。", ",")) for line in shown)
    assert broken("コード code は 48213 です", 10).split() == "コード code は 48213 です".split()
    assert broken("e\u0301" * 6 + " x", 6) == "e\u0301" * 6 + "\nx"


def test_any_text_keeps_its_words_and_lines() -> None:
    rng = random.Random(5)
    for _ in range(300):
        text = "".join(rng.choice("ab cd  \n-*1.|`\t漢。é") for _ in range(rng.randrange(120)))
        width, pieces = rng.randrange(1, 30), rng.randrange(1, 9)
        shown = broken(text, width, pieces)
        assert re.sub(r"\s", "", shown) == re.sub(r"\s", "", text)
        assert shown.count("\n") >= text.count("\n") and broken(text, 1000, pieces) == text


def test_whole_texts() -> None:
    assert wrapped("one two three", 9, 2) == ["  one two", "  three"]
    assert wrapped("12,345,678,901 GiB", 6, 2) == ["  12,345,678,901", "  GiB"]
    assert wrapped("", 9) == []
