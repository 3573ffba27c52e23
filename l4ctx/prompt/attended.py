"""Where a model looked while it answered: attention of an answer's words to lines of the documents.

What is told is where attention went, not why: it shows the lines that an answer was probably taken from and proves
nothing. See the manual for the rules.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from l4ctx.checkpoint.tokenizer import StreamDecoder, Tokenizer
from l4ctx.prompt.texts import Place, PromptTexts

if TYPE_CHECKING:
    from model.kernels.watch import Looked

LEAST_ALONE = 0.99
"""Share of attention, on average over a statement's words that count, from which on a place is named."""

LEAST_WITH_WORDS = 0.75
"""The same where the words of the question stand there, too."""

LEAST_BESIDE = 0.25
"""A line next to a named one belongs to the place from this share on."""

EMPTY_WORDS = frozenset(
    "a an and are as at be but by can could did do does for from had has have he her his i if in into is it its me my "
    "no not of on or our she should so than that the their them then there these they this those to was we were what "
    "when where which who why will with would yes you your".split()
)

_STATEMENT_END = re.compile(r"[.!?。！？]+[\"”’»')\]*_]*(?:\s+|$)|\n+")
_WORD = re.compile(r"\w+(?:[.,:/'’-]\w+)*")


class Attended(NamedTuple):
    """A place, and the share of attention that it had, of the statement at these characters of the answer."""

    place: Place
    share: float
    statement: range


@dataclass(frozen=True)
class AttentionLog:
    """What the queries of one answer attended to in each layer, by position: an observer of the model."""

    within: range
    seen: dict[int, dict[int, Looked]] = field(default_factory=dict)
    """By position of the query and layer."""

    def observe(self, layer: int, position: int, looked: Looked) -> None:
        self.seen.setdefault(position, {})[layer] = looked


@dataclass(frozen=True)
class Answered:
    """An answer's tokens as text; `ends` are the characters where each token ends."""

    text: str
    ends: list[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer, ids: Sequence[int]) -> Answered:
        decoder, parts = StreamDecoder(tokenizer), list[str]()
        for token in ids:
            parts.append(decoder.push(token))
        if parts:
            parts[-1] += decoder.finish()
        return cls("".join(parts), list(accumulate(map(len, parts))))

    def tokens_of(self, words: Iterable[range]) -> list[int]:
        """The numbers of the tokens with a letter or digit of these words, which are in order."""
        found, start = list[int](), 0
        words = iter(words)
        word = next(words, None)
        for number, stop in enumerate(self.ends):
            while word is not None and word.stop <= start:
                word = next(words, None)
            if word is not None and max(start, word.start) < min(stop, word.stop):
                found.append(number)
            start = stop
        return found


def statements(answer: str) -> Iterator[range]:
    """The sentences and lines of an answer."""
    start = 0
    for end in _STATEMENT_END.finditer(answer):
        yield range(start, end.end())
        start = end.end()
    if start < len(answer):
        yield range(start, len(answer))


def content_words(answer: str, question: str) -> list[range]:
    """Where the words of an answer are that say something new: neither function words nor words of the question.

    All but function words where the question has them all.
    """
    known = {word.casefold() for word in _WORD.findall(question)}
    words = [found for found in _WORD.finditer(answer) if found[0].casefold() not in EMPTY_WORDS]
    new = [found for found in words if found[0].casefold() not in known]
    return [range(*found.span()) for found in new or words]


Line = tuple[int, int]
"""Number of a document, and of its line, from 0; of an image, from -1 down."""


def attended(
    log: AttentionLog, answer: Answered, question: str, first_query: int, texts: PromptTexts
) -> list[Attended]:
    """The places that the statements of an answer attended to, those with the largest share first.

    The first token was chosen by the query at position `first_query`.
    """
    words, found = content_words(answer.text, question), list[Attended]()
    tokens = answer.tokens_of(words)
    others = [number for number in range(len(answer.ends)) if number not in tokens]
    usual = _usual(log, [first_query + token for token in others])
    line_of = cache(partial(_line_of, texts))  # heads and words look at the same keys
    for statement in statements(answer.text):
        own = answer.tokens_of(word for word in words if word.start in statement)
        lines = line_shares(log, [first_query + token for token in own], usual, line_of)
        if lines and (place := _place(lines, question, texts)) is not None:
            found.append(Attended(*place, statement))
    return sorted(_once(found), key=lambda one: -one.share)


Head = tuple[int, int]
"""Layer, and number in it."""


def _shares(log: AttentionLog, query: int) -> Iterator[tuple[Head, int, float]]:
    """What each head attended to: positions and shares."""
    for layer, looked in log.seen.get(query, {}).items():
        for head, position, share in zip(*(x.tolist() for x in looked), strict=True):
            yield (layer, head), position, share


def _usual(log: AttentionLog, queries: Sequence[int]) -> dict[tuple[Head, int], float]:
    """What heads attend to whatever the word is: the share that each position has on average over these queries."""
    usual: dict[tuple[Head, int], float] = defaultdict(float)
    for query in queries:
        for head, position, share in _shares(log, query):
            usual[head, position] += share / len(queries)
    return usual


def line_shares(
    log: AttentionLog,
    queries: Sequence[int],
    usual: Mapping[tuple[Head, int], float],
    line_of: Callable[[int], Line | None],
) -> dict[Line, float]:
    """The share of attention that lines had on average over these queries: that of the head that looked most, beyond
    what is usual. `line_of` tells the line of a position."""
    lines: dict[Line, float] = defaultdict(float)
    for query in queries:
        own: dict[Line, dict[Head, float]] = defaultdict(lambda: defaultdict(float))
        for head, position, share in _shares(log, query):
            if (line := line_of(position)) is not None:
                own[line][head] += max(0.0, share - usual.get((head, position), 0.0))
        for line, heads in own.items():
            lines[line] += max(heads.values()) / len(queries)
    return lines


def _place(lines: dict[Line, float], question: str, texts: PromptTexts) -> tuple[Place, float] | None:
    """The heaviest line with those beside it, and its share; None where that is too small."""
    number, line = max(lines, key=lambda one: lines[one])
    document, share = texts.document(number), min(1.0, lines[number, line])
    if line < 0:
        return (document.image(document.images[-1 - line]), share) if share >= LEAST_ALONE else None
    first = last = line
    while first > 0 and lines.get((number, first - 1), 0.0) >= LEAST_BESIDE:
        first -= 1
    while lines.get((number, last + 1), 0.0) >= LEAST_BESIDE:
        last += 1
    around = document.lines(max(0, first - 1), min(last + 1, document.last_line))
    is_about = _has_words(texts.text(around), question)
    return (document.lines(first, last), share) if share >= (LEAST_WITH_WORDS if is_about else LEAST_ALONE) else None


def _has_words(text: str, question: str) -> bool:
    """Whether all words of the question that count stand in a text, whatever their last two letters."""
    text = text.casefold()
    words = [word.casefold() for word in _WORD.findall(question) if word.casefold() not in EMPTY_WORDS]
    return bool(words) and all(word[: max(4, len(word) - 2)] in text for word in words)


def _once(found: Iterable[Attended]) -> list[Attended]:
    """Each place with the statement that attended to it most."""
    best: dict[tuple[str, range], Attended] = {}
    for one in found:
        key = one.place.source, one.place.tokens
        if key not in best or best[key].share < one.share:
            best[key] = one
    return list(best.values())


def _line_of(texts: PromptTexts, position: int) -> Line | None:
    number = texts.number_at(position)
    if number is None:
        return None
    document = texts.document(number)
    if (image := document.image_at(position)) is not None:
        return number, -1 - document.images.index(image)
    line = document.line_of(position)
    return None if line is None else (number, line)
