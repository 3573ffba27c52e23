"""The text in which facts are planted: the user's own or made-up lines, of a given number of tokens."""

from __future__ import annotations

import itertools
import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from l4ctx.errors import InputError
from l4ctx.evaluation.tasks import Needle
from l4ctx.evaluation.words import ADJECTIVES, NOUNS

LINES_AT_A_TIME = 64
"""Encoded together to count their tokens."""

LONGEST_LINE = 400
"""Characters, about: longer lines are broken at a space, so that facts can stand between."""

Count = Callable[[str], int]
"""The number of tokens of a text."""


class HaystackError(InputError):
    """A text that cannot be made."""


@dataclass(frozen=True)
class Line:
    text: str  # with its newline
    tokens: float  # an estimate, exact for LINES_AT_A_TIME of them together


def own_lines(texts: Sequence[str], rng: random.Random) -> Iterator[str]:
    """The lines of these texts in order, from a random one on, over and over. Raises HaystackError."""
    lines = [part for text in texts for line in text.splitlines() for part in broken(line)]
    if not any(line.strip() for line in lines):
        raise HaystackError("the documents hold no text to plant facts in")
    first = rng.randrange(len(lines))
    return itertools.cycle([*lines[first:], *lines[:first]])


def broken(line: str) -> Iterator[str]:
    """At spaces, into parts of about LONGEST_LINE characters or less, each with a newline."""
    while len(line) > LONGEST_LINE and (at := line.find(" ", LONGEST_LINE)) >= 0:
        yield f"{line[:at]}\n"
        line = line[at + 1 :]
    yield f"{line}\n"


def made_up_lines(rng: random.Random) -> Iterator[str]:
    """Paragraphs of plain English sentences that say nothing of what is planted."""

    def thing() -> str:
        return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"

    while True:
        sentences = (
            rng.choice(SENTENCES).format(thing(), thing(), rng.randint(2, 60)) for _ in range(rng.randint(2, 5))
        )
        yield " ".join(sentences) + "\n"
        if rng.random() < 0.2:
            yield "\n"


SENTENCES = (
    "The {0} stood beside the {1} for most of the winter.",
    "Nobody had seen the {0} since the {1} was moved.",
    "After {2} days the {0} was painted again.",
    "They walked from the {0} to the {1} before noon.",
    "It rained for {2} hours, and the {0} stayed dry.",
    "A letter about the {0} arrived late.",
    "The children drew a {0} next to a {1}.",
    "In the evening the {0} could be heard far away.",
    "Some say that the {0} is older than the {1}.",
    "There were {2} people at the meeting, and most spoke about the {0}.",
    "The {0} was mended with what was left of the {1}.",
    "Only the {0} remained when the road was closed.",
    "The report mentions a {0} on page {2}.",
    "From the window one sees the {0} and, behind it, the {1}.",
    "Every spring the {0} is carried across the bridge.",
    "The guide told a long story about the {0}.",
)


class Haystack:
    """Lines that are counted once, and the text of any number of tokens up to theirs."""

    def __init__(self, lines: Iterator[str], tokens: int, count: Count) -> None:
        """Takes as many lines as have `tokens` tokens."""
        self._lines: list[Line] = []
        self._ends: list[float] = []  # tokens up to the end of each line
        total = 0.0
        while total < tokens:
            some = list(itertools.islice(lines, LINES_AT_A_TIME))
            counted, characters = count("".join(some)), sum(map(len, some))
            for text in some:
                self._lines.append(Line(text, counted * len(text) / characters))
                total += self._lines[-1].tokens
                self._ends.append(total)

    def planted(self, tokens: int, needles: Sequence[Needle], depths: int, rng: random.Random) -> str:
        """A text of lines with about `tokens` tokens, with the needles' sentences between lines.

        The sentences of a needle are at random places within its part of the text, one of `depths` equal ones.
        """
        last = bisect_right(self._ends, tokens)
        total = self._ends[last - 1] if last else 0.0
        places: list[tuple[int, int, str]] = []
        for needle in needles:
            where = sorted((needle.depth + rng.random()) / depths * total for _ in needle.sentences)
            for at, sentence in zip(where, needle.sentences, strict=True):
                places.append((min(last, bisect_left(self._ends, at)), len(places), f"{sentence}\n"))
        parts, done = list[str](), 0
        for line, _, sentence in sorted(places):
            parts += [one.text for one in self._lines[done:line]]
            parts.append(sentence)
            done = line
        return "".join([*parts, *(one.text for one in self._lines[done:last]), self._begun(last, tokens - total)])

    def _begun(self, line: int, tokens: float) -> str:
        """As many words of a line as have about so many tokens, with a newline."""
        if line == len(self._lines):
            return ""
        whole = self._lines[line]
        words, space, _ = whole.text[: int(len(whole.text) * tokens / whole.tokens)].rpartition(" ")
        return f"{words}\n" if space else ""
