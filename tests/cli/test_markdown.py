"""Answers as Markdown on a terminal: the same in any pieces and at any width, nothing lost, nothing that steers."""

from __future__ import annotations

import contextlib
import io
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from l4ctx.cli import answer
from l4ctx.cli.exits import Interruption
from l4ctx.cli.markdown.inline import LONGEST_HOLD, styled
from l4ctx.cli.markdown.stream import MarkdownStream
from l4ctx.cli.markdown.styles import Painter, Style, balanced
from l4ctx.cli.wrapping import cells
from support.cli_runner import ANSWER, QUESTION, TINY, run_here, text_file
from support.generating import Generating

SEQUENCE = re.compile(r"\x1b\[(\d+)m")
NAMES = {"1": "bold", "3": "italic", "4": "underline", "9": "struck", "36": "code"}
OFF = {"22": "bold", "23": "italic", "24": "underline", "29": "struck", "39": "code"}
TEXT = """# A title with `code`

Some **bold text that goes on for a while** and *italic*, snake_case_name, 5 * 3 * 2, ~~struck~~, a
[link](https://example.org/a_b) and <https://example.org/x>. An [1] reference, and **open.

- item one with **bold**: and a long line that needs to be wrapped somewhere
- [ ] to do
  * nested item that is long enough to be wrapped on forty columns, surely
    and continued

1. first
   ```python
   def f(x):
       return x ** 2
   ```
2. second

| name | value | note |
|:---|---:|---|
| `a` | 1 | some **longer note that needs room** here |
| b | 12,345 | a \\| bar |

> A quotation that is rather long and should hang when it is wrapped

***

    indented **code**
中文**粗體**文字，沒有空格的長句子應該可以在任何地方換行，不需要等待。
"""


def shown(text: str, width: int = 80, pieces: int = 10_000, **options: bool) -> str:
    stream = MarkdownStream(lambda: width, **options)
    parts = [stream.push(text[start : start + pieces]) for start in range(0, len(text), pieces)]
    return "".join(parts) + stream.finish()


def drawn(output: str) -> list[tuple[str, frozenset[str]]]:
    """Each character with its styles, as a terminal has them after `output`. Fails for other escape sequences."""
    styles, drawn, end = set[str](), [], 0
    for found in [*SEQUENCE.finditer(output), None]:
        text = output[end : found.start() if found else None]
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text), text
        drawn += [(character, frozenset(styles)) for character in text]
        if found is not None:
            end = found.end()
            if found[1] in NAMES:
                styles.add(NAMES[found[1]])
            else:
                styles.discard(OFF[found[1]])
    assert not styles
    return [(character, frozenset() if character.isspace() else style) for character, style in drawn]


def plain(output: str) -> str:
    return SEQUENCE.sub("", output)


def styled_words(output: str, style: str) -> str:
    return "".join(character if style in styles else " " for character, styles in drawn(output)).strip()


def test_what_is_shown() -> None:
    output = shown(TEXT, 40)
    assert plain(output).splitlines() == [
        "A title with code",
        "",
        "Some bold text that goes on for a while",
        "and italic, snake_case_name, 5 * 3 * 2,",
        "struck, a",
        "link (https://example.org/a_b) and",
        "https://example.org/x. An [1] reference,",
        "and **open.",
        "",
        "• item one with bold: and a long line",
        "  that needs to be wrapped somewhere",
        "• [ ] to do",
        "  • nested item that is long enough to",
        "    be wrapped on forty columns, surely",
        "    and continued",
        "",
        "1. first",
        "   def f(x):",
        "       return x ** 2",
        "2. second",
        "",
        "name   value  note",
        "────────────────────────────────────────",
        "a          1  some longer note that",
        "              needs room here",
        "b     12,345  a | bar",
        "",
        "│ A quotation that is rather long and",
        "  should hang when it is wrapped",
        "",
        "────────────────────",
        "",
        "    indented **code**",
        "中文粗體文字，沒有空格的長句子應該可以在",
        "任何地方換行，不需要等待。",
    ]
    assert styled_words(output, "underline").split() == ["A", "title", "with", "code"]
    assert styled_words(output, "italic") == "italic" and styled_words(output, "struck") == "struck"
    bold = " ".join(styled_words(output, "bold").split())
    assert bold == "bold text that goes on for a while bold name value note longer note that needs room 粗體"
    code = " ".join(styled_words(output, "code").split())
    assert code == "code def f(x): return x ** 2 a indented **code**"


@pytest.mark.parametrize("width", [20, 40, 80])
@pytest.mark.parametrize("pieces", [1, 2, 3, 7, 50])
def test_pieces_make_no_difference(width: int, pieces: int) -> None:
    assert drawn(shown(TEXT, width, pieces)) == drawn(shown(TEXT, width))
    assert drawn(shown(TEXT[:-1], width, pieces)) == drawn(shown(TEXT[:-1], width))


@pytest.mark.parametrize("width", [33, 40, 80, 200])
def test_lines_stay_within_the_width(width: int) -> None:
    for line in plain(shown(TEXT, width)).splitlines():
        assert cells(line) <= width, line


def test_no_text_is_lost_whatever_it_is() -> None:
    rng = random.Random(7)
    parts = [
        "ab",
        "cd ",
        "ef\n",
        "**",
        "*",
        "_",
        "`g",
        "~~",
        "[",
        "](h)",
        "- ",
        "# ",
        "> ",
        "|",
        "漢",
        "    ",
        "\\",
        "1. ",
    ]
    for _ in range(120):
        text = "".join(rng.choice(parts) for _ in range(rng.randrange(60)))
        width, pieces = rng.randrange(1, 50), rng.randrange(1, 9)
        output = shown(text, width, pieces)
        assert re.sub("[^a-h漢]", "", plain(output)) == re.sub("[^a-h漢]", "", text), text
        assert drawn(output) == drawn(shown(text, width)), text


def test_a_span_is_held_until_it_is_closed_and_no_longer() -> None:
    stream = MarkdownStream(lambda: 80)
    assert stream.push("one two ") == "one two"
    assert stream.push("**three four ") == "" and stream.push("five") == ""
    assert plain(stream.push("** six seven")) == " three four five six"
    open_end = "**" + "word " * LONGEST_HOLD
    assert len(stream.push(f" {open_end}")) > LONGEST_HOLD


def test_nothing_of_an_answer_steers_the_terminal() -> None:
    """Entities stand for any character, and links for other text."""
    text = "&#27;[2J &#x202e;x &lt; <b>y</b> [safe](javascript:alert(1)) [a](http://e.org/&#27;x)\n"
    text += "| a |\n|--|\n| &#155; |\n"
    output = shown(text)
    assert "&#27;[2J" in plain(output) and "<b>y</b>" in plain(output) and "http" in plain(output)
    assert drawn(output)
    for mark in (*(style.start for style in Style), *(style.stop for style in Style)):
        assert drawn(shown_answer(f"x{mark}y **b** {mark}"))  # as every control character, none of it survives


def shown_answer(text: str) -> str:
    from l4ctx.formatting import without_controls

    return shown(without_controls(text))


def test_tables_too_wide_for_the_terminal_are_stacked() -> None:
    rows = "| Scout | 109 billion | 16 |\n| Maverick | 400 billion | |\n"
    table = f"| architecture | parameters | experts |\n|---|---|---|\n{rows}"
    assert plain(shown(table, 20)).splitlines() == [
        "architecture Scout",
        "parameters 109",
        "billion",
        "experts 16",
        "",
        "architecture",
        "Maverick",
        "parameters 400",
        "billion",
        "experts",
    ]
    assert plain(shown("| a | b |\nno table\n")) == "| a | b |\nno table\n"
    assert plain(shown("| a | b |")) == "| a | b |\n"
    assert plain(shown("|a|b|\n|-|-|")).splitlines() == ["a  b", "────"]


def test_without_colours_and_without_unicode() -> None:
    output = shown("**a `b` c** d\n- e\n> f\n***\n", has_colours=False, is_ascii=True)
    assert plain(output) == "a b c d\n* e\n> f\n--------------------\n" and "[36m" not in output
    assert styled_words(output, "bold") == "a b c"


def test_the_width_may_change() -> None:
    width = 20
    stream = MarkdownStream(lambda: width)
    output = stream.push("aaa bbb ccc ddd eee fff ")
    width = 9
    assert output + stream.push("ggg hhh iii\n") == "aaa bbb ccc ddd eee\nfff ggg\nhhh iii\n"


def test_styles_end_with_each_line_and_with_each_piece() -> None:
    assert balanced(["\x0ea", "b\x0fc"]) == ["\x0ea\x0f", "\x0eb\x0fc"]
    painter = Painter(has_colours=True)
    assert painter.paint("\x0ea") == "\x1b[1ma\x1b[22m" and painter.paint("b\x0fc") == "\x1b[1mb\x1b[22mc"
    assert styled("no special characters") == "no special characters"


# In the command


def answer_on(monkeypatch: pytest.MonkeyPatch, pieces: list[str], stop: Any = "stop", **options: Any) -> str:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdout", stream)
    with contextlib.suppress(KeyboardInterrupt):
        answer.show_answer(Generating(pieces, stop), print, Interruption(), json=False, **options)
    return stream.getvalue()


def test_where_markdown_is_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    pieces = ["The **co", "de** is `4", "8213`.", " \x1b[2J\n"]
    for term, plain_wanted, is_rendered in (("xterm", False, True), ("xterm", True, False), ("dumb", False, False)):
        monkeypatch.setenv("TERM", term)
        output = answer_on(monkeypatch, pieces, plain=plain_wanted)
        assert ("\x1b[1mcode\x1b[22m" in output) == is_rendered != ("**code**" in output)
        assert "\x1b[2J" not in output and output.endswith("\n")
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    answer.show_answer(Generating(pieces), print, Interruption(), json=False)  # type: ignore[arg-type]
    assert stream.getvalue() == "The **code** is `48213`. \ufffd[2J\n"


def test_an_interruption_leaves_no_style_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for pieces in (["# A ti"], ["a **b c"], ["```\ncode"], ["| a |\n"], ["**a** "]):
        output = answer_on(monkeypatch, pieces, KeyboardInterrupt())
        assert output.endswith("\n") and drawn(output)
    assert answer_on(monkeypatch, [], KeyboardInterrupt()) == ""


def test_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text_file(tmp_path / "a.md", ANSWER)
    monkeypatch.chdir(tmp_path)
    result = run_here("ask", QUESTION, "a.md", "--stats", "--quiet", "--model", str(TINY))
    assert (result.code, result.stdout) == (0, ANSWER)
    assert re.fullmatch(
        r"l4ctx: \d+ tokens; read \d+ in [\d.]+ s \([\d,.]+ tokens/s\); "
        r"answered \d+ in [\d.]+ s \([\d,.]+ tokens/s\); loading took [\d.]+ s\n",
        result.stderr,
    )
