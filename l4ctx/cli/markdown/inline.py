"""Emphasis, code and links within a line of Markdown that is still being generated."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

from l4ctx.cli.markdown.styles import Style
from l4ctx.formatting import without_controls

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

LONGEST_HOLD = 400
"""Characters after which something that was opened and not closed is shown as it stands."""

_SPECIAL = re.compile(r"[*_~`\[\\<]")
_OPEN = re.compile(
    r"`|\*+(?=\S|$)|~~(?=\S|$)|(?<!\w)_+(?=\S|$)"  # that may be closed later
    r"|\[[^\]]*$|\[[^\]]*\]\([^)]*$"
)
_WIDE = r"\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff60\uffe0-\uffe6"
_BREAK = re.compile(rf"[ \t{_WIDE}]")
"""What ends a word: blanks and wide characters."""

_WORD = re.compile(rf"[^ \t{_WIDE}]*[ \t{_WIDE}]|[^ \t{_WIDE}]+")
_STYLES = {"strong": Style.BOLD, "em": Style.ITALIC, "s": Style.STRUCK}


@functools.cache
def _parser() -> MarkdownIt:
    """Entities and HTML are left as they are: they could stand for characters that steer a terminal."""
    from markdown_it import MarkdownIt

    return (
        MarkdownIt("commonmark", {"html": False}).enable("strikethrough").disable(["entity", "html_inline", "newline"])
    )


class InlineText:
    """The text of one line, in pieces; holds back what an opened span may still change, and the present word."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is settled, with marks of styles. `text` has no line end."""
        return "".join(map(self._push, _WORD.findall(text)))

    def _push(self, part: str) -> str:
        """A part of a word, or its end."""
        self._held += part
        if not _BREAK.match(part[-1]) or (len(self._held) <= LONGEST_HOLD and not _is_settled(self._held)):
            return ""
        settled, self._held = self._held, ""
        return styled(settled)

    def finish(self) -> str:
        """The rest, at the end of the line."""
        rest, self._held = self._held, ""
        return styled(rest)


def styled(text: str) -> str:
    """One line of Markdown with marks of styles; links are followed by where they lead."""
    if not _SPECIAL.search(text):
        return text
    return "".join(part if number % 2 else without_controls(part) for number, part in enumerate(_parsed(text)))


def _is_settled(text: str) -> bool:
    """Whether no continuation changes how `text`, is shown."""
    if not _SPECIAL.search(text):
        return True
    return not any(token.type == "text" and _OPEN.search(token.content) for token in _tokens(text))


def _tokens(text: str) -> list[Token]:
    return _parser().parseInline(text)[0].children or []


def _parsed(text: str) -> list[str]:
    """Text at even places, marks at odd ones."""
    parts, links = [""], list[tuple[str, int]]()
    for token in _tokens(text):
        kind, _, side = token.type.rpartition("_")
        if kind in _STYLES:
            parts += [_STYLES[kind].start if side == "open" else _STYLES[kind].stop, ""]
        elif token.type == "code_inline":
            parts += [Style.CODE.start, token.content, Style.CODE.stop, ""]
        elif token.type == "link_open":
            links.append((str(token.attrGet("href")), len("".join(parts))))
        elif token.type == "link_close":
            target, start = links.pop()
            if "".join(parts)[start:] not in (target, target.removeprefix("mailto:")):
                parts[-1] += f" ({target})"
        elif token.type == "image":
            parts[-1] += f"{token.content} ({token.attrGet('src')})"
        else:
            parts[-1] += token.content
    return parts
