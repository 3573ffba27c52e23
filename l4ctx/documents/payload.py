"""Machine payload in texts, which is left out: outputs of notebooks, and data: URIs.

`Payload` keeps a sample, from which the number of tokens saved is estimated once there is a tokenizer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from l4ctx.documents.notebook import notebook
from l4ctx.formatting import human_bytes

LEAST = 256  # characters of a data: URI's content that are worth leaving out
_SAMPLE = 1 << 16  # characters of what is left out that are tokenized to tell how many tokens all of it has

_MEDIA_TYPE = r"[A-Za-z0-9.+-]{1,60}/[A-Za-z0-9.+-]{1,80}"
_NEXT_LINE = r"(?=[A-Za-z0-9+/]{40}|[A-Za-z0-9+/]{1,75}[=\"')])"  # of a content that is broken into lines
_BASE64 = re.compile(  # no two of its alternatives begin alike: it takes linear time
    rf"(data:(?:{_MEDIA_TYPE})?(?:;[A-Za-z0-9.+_-]{{1,60}}=[^;,\s\"'()<>]{{1,80}}){{0,5}};base64,)"
    rf"((?:[A-Za-z0-9+/_=%-]++|\\/|\\r?\n{_NEXT_LINE}|\\n{_NEXT_LINE}|[ \t]*+\r?+\n[ \t]*+{_NEXT_LINE})++)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Payload:
    """What was left out of a text: a description, its length in characters, and its beginning."""

    what: str
    characters: int
    sample: str

    def tokens(self, sample_tokens: int) -> int:
        """About how many tokens it has, given those of its sample."""
        return round(sample_tokens * self.characters / max(len(self.sample), 1))


def without_payload(text: str, *, keep_lines: bool = False) -> tuple[str, Payload | None]:
    """The text of the document without payload, and what that was; None: there was none.

    `keep_lines`: the text is no notebook, and the lines of what is left out stay, empty.
    """
    found = []
    removed = []
    if not keep_lines and (cells := notebook(text)) is not None:
        text = cells.text
        if cells.what:
            found.append(f"{cells.what} of the notebook")
            removed.append(cells.left_out)
    uris: list[str] = []

    def shortened(match: re.Match[str]) -> str:
        if len(match.group(2)) < LEAST:
            return match.group()
        uris.append(match.group(2))
        line_ends = "\n" * match.group(2).count("\n") if keep_lines else ""
        return f"{match.group(1)}[{human_bytes(len(match.group(2)))} left out]{line_ends}"

    text = _BASE64.sub(shortened, text)
    if uris:
        found.append(f"the content of {len(uris):,} data: URI{'s' * (len(uris) != 1)}")
        removed += uris
    if not found:
        return text, None
    size = sum(map(len, removed))
    return text, Payload(" and ".join(found), size, "".join(removed)[:_SAMPLE])
