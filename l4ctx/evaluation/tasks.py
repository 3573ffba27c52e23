"""What is planted in a text and asked for: tasks in the manner of RULER (https://arxiv.org/abs/2404.06654).

Sentences, questions, and what an answer has to contain. Where they are planted is left to `haystack`.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from l4ctx.evaluation.words import ADJECTIVES, NOUNS

CODE_DIGITS, KEYS, VALUES, DISTRACTORS, HOPS, MOST_MENTIONS = 5, 4, 4, 5, 4, 9
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = "BCDFGHJKLMNPQRSTVWXZ"


@dataclass(frozen=True)
class Needle:
    """`sentences` are planted in this order, each on a line of its own. An answer is right if it has one of each of the
    `expected` alternatives and none of the `decoys`."""

    task: str
    depth: int  # the number of its part of the text, from 0
    sentences: tuple[str, ...]
    question: str
    expected: tuple[tuple[str, ...], ...]
    decoys: tuple[str, ...] = ()

    def is_found(self, answer: str) -> bool:
        """By the exact strings, as whole words or numbers; only the case of letters does not count."""
        return all(any(_has(answer, text) for text in one) for one in self.expected) and not any(
            _has(answer, text) for text in self.decoys
        )


def _has(answer: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(text)}(?!\w)", answer, re.IGNORECASE) is not None


class Drawing:
    """Names and codes that are different within a text."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self._taken: set[str] = set()

    def _new(self, draw: Callable[[], str]) -> str:
        while (text := draw()) in self._taken:
            pass
        self._taken.add(text)
        return text

    def entity(self, adjective: str | None = None, noun: str | None = None) -> str:
        """Two words, such as "amber falcon"; one of them may be given."""
        return self._new(lambda: f"{adjective or self.rng.choice(ADJECTIVES)} {noun or self.rng.choice(NOUNS)}")

    def code(self) -> str:
        return self._new(lambda: "".join(self.rng.choice("0123456789") for _ in range(CODE_DIGITS)))

    def variable(self) -> str:
        return self._new(lambda: "".join(self.rng.choice(LETTERS) for _ in range(5)))


def single(depth: int, drawn: Drawing) -> Needle:
    """One fact."""
    entity, code = drawn.entity(), drawn.code()
    return Needle("single", depth, (_access(entity, code),), _access_question(entity), ((code,),))


def keys(depth: int, drawn: Drawing) -> Needle:
    """One fact among others of its kind whose names share a word with its own."""
    entity, code = drawn.entity(), drawn.code()
    adjective, noun = entity.split()
    others = [drawn.entity(adjective) if number % 2 else drawn.entity(noun=noun) for number in range(KEYS - 1)]
    wrong = [drawn.code() for _ in others]
    sentences = [_access(entity, code), *map(_access, others, wrong)]
    drawn.rng.shuffle(sentences)
    return Needle("keys", depth, tuple(sentences), _access_question(entity), ((code,),), tuple(wrong))


def values(depth: int, drawn: Drawing) -> Needle:
    """Several values of one name, all of which are asked for."""
    entity, codes = drawn.entity(), [drawn.code() for _ in range(VALUES)]
    sentences = tuple(f"One of the gate numbers of the {entity} is {code}." for code in codes)
    question = f"What are all {VALUES} gate numbers of the {entity}?"
    return Needle("values", depth, sentences, question, tuple((code,) for code in codes))


def distractors(depth: int, drawn: Drawing) -> Needle:
    """One fact among sentences about the same name that do not answer the question."""
    entity, code, wrong = drawn.entity(), drawn.code(), [drawn.code() for _ in range(DISTRACTORS)]
    sentences = [
        _access(entity, code),
        f"The serial number of the {entity} is {wrong[0]}.",
        f"Last year the access code for the {entity} was {wrong[1]}, which no longer works.",
        f"The weight of the {entity} was given as {wrong[2]} grams.",
        f"Whoever asks about the {entity} should call {wrong[3]}.",
        f"Somebody wrote {wrong[4]} on the {entity}, but that is not its access code.",
    ]
    drawn.rng.shuffle(sentences)
    return Needle("distractors", depth, tuple(sentences), _access_question(entity), ((code,),), tuple(wrong))


def tracing(depth: int, drawn: Drawing) -> Needle:
    """Variables that get their value from one another, all of which are asked for."""
    code, names = drawn.code(), [drawn.variable() for _ in range(HOPS + 1)]
    sentences = [f"The variable {names[0]} is set to {code}."]
    sentences += [f"The variable {new} is set to the variable {old}." for old, new in itertools.pairwise(names)]
    question = f"Which {HOPS + 1} variables have the value {code}? Give all their names."
    return Needle("tracing", depth, tuple(sentences), question, tuple((name,) for name in names))


def counting(depth: int, drawn: Drawing) -> Needle:
    """A sentence that is repeated, whose number is asked for."""
    entity, times = drawn.entity(), drawn.rng.randint(2, MOST_MENTIONS)
    sentences = (f"The bell of the {entity} rang.",) * times
    question = f"How many times does the text say that the bell of the {entity} rang? Answer with a number."
    others = [number for number in range(2, MOST_MENTIONS + 1) if number != times]
    wrong = tuple(text for number in others for text in (str(number), NUMBERS[number]))
    return Needle("counting", depth, sentences, question, ((str(times), NUMBERS[times]),), wrong)


TASKS: dict[str, Callable[[int, Drawing], Needle]] = {
    made.__name__: made for made in (single, keys, values, distractors, tracing, counting)
}


def needles(tasks: Sequence[str], depths: int, rng: random.Random) -> Iterator[Needle]:
    """One of each task for each depth, all with different names."""
    drawn = Drawing(rng)
    for task in tasks:
        for depth in range(depths):
            yield TASKS[task](depth, drawn)


def _access(entity: str, code: str) -> str:
    return f"The access code for the {entity} is {code}."


def _access_question(entity: str) -> str:
    return f"What is the access code for the {entity}?"
