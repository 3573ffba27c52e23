"""The paragraphs of a part of an office document, as a stream: neither the part nor a tree of it is held in memory."""

from __future__ import annotations

from collections.abc import Iterable
from xml.etree import ElementTree

from l4ctx.confinement.work import Refusal
from l4ctx.documents.office.bounds import MOST_SPACES, check_depth, check_elements


def paragraphs(pieces: Iterable[bytes], tag: str | None, skipped: frozenset[str]) -> list[str]:
    """The text of elements `tag` (None: of all) by paragraph, without what is below the elements `skipped`.

    Expat bounds how far entities expand, and external ones are never read. Raises Refusal, also for too many elements.
    """
    target = _Paragraphs(tag, skipped)
    parser = ElementTree.XMLParser(target=target)
    try:
        for piece in pieces:
            parser.feed(piece)
        parser.close()
    except ElementTree.ParseError as error:
        raise Refusal(f"it is broken: {error}") from None
    return [text for text in target.found if text and not text.isspace()]


class _Paragraphs:
    """What expat calls."""

    def __init__(self, tag: str | None, skipped: frozenset[str]) -> None:
        self.found: list[str] = []
        self._tag, self._skipped = tag, skipped
        self._runs: list[list[str]] = [[]]  # one list for each paragraph that is open
        self._count = self._depth = self._inside = self._spaces = 0
        self._is_text = False

    def start(self, name: str, attributes: dict[str, str]) -> None:
        name = name.rpartition("}")[2]
        self._count, self._depth = self._count + 1, self._depth + 1
        check_elements(self._count)
        check_depth(self._depth)
        if name in self._skipped:
            self._inside += 1
        if self._tag is not None:
            self._is_text = name == self._tag
        elif name in ("p", "h"):
            self._runs.append([])
        elif name == "s":
            self._repeat(attributes)

    def _repeat(self, attributes: dict[str, str]) -> None:
        given = next((value for key, value in attributes.items() if key.endswith("}c")), "1").strip()[:12]
        self._spaces += int(given) if given.isdecimal() else 1
        if self._spaces > MOST_SPACES:
            raise Refusal(f"it repeats spaces, more than {MOST_SPACES:,}")

    def data(self, text: str) -> None:
        if not self._inside and (self._is_text or (self._tag is None and len(self._runs) > 1)):
            self._runs[-1].append(text)

    def end(self, name: str) -> None:
        name = name.rpartition("}")[2]
        self._depth -= 1
        self._is_text = False
        if name in self._skipped:
            self._inside -= 1
        if self._tag is None:
            if name in ("p", "h") and len(self._runs) > 1:
                self.found.append("".join(self._runs.pop()))
        elif name in ("p", "h", "tab", "br"):
            self.found.append("".join(self._runs[-1]))
            self._runs[-1].clear()

    def close(self) -> None:
        return None
