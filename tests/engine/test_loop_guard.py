"""What counts as an endless repetition, and what does not: on token ids, and on real text with the sample tokenizer."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable

import pytest

from l4ctx.checkpoint.tokenizer import Tokenizer
from l4ctx.engine.loop_guard import LONGEST_PERIOD, LOOP_REPEATS, LOOP_TOKENS, Loop, LoopGuard
from l4ctx.run.request import DEFAULT_MAX_NEW_TOKENS
from support.places import TINY


def first_loop(tokens: Iterable[int]) -> tuple[int, Loop] | None:
    """How many tokens it took, and the loop."""
    guard = LoopGuard()
    for number, token in enumerate(tokens, 1):
        if (loop := guard.push(token)) is not None:
            return number, loop
    return None


def naive(tokens: list[int]) -> Loop | None:
    """By the definition, over the whole answer."""
    for period in range(1, LONGEST_PERIOD + 1):
        length = LOOP_TOKENS + LOOP_REPEATS * period
        tail = tokens[-length:]
        if len(tail) == length and all(tail[i] == tail[i - period] for i in range(period, length)):
            return Loop(period, length // period)
    return None


def passage(length: int, seed: int = 0) -> list[int]:
    """Tokens that do not repeat within themselves."""
    return random.Random(seed).sample(range(1000), length)


@pytest.mark.parametrize("period", [1, 2, 3, 5, 7, 12, 33, 60, 64, 127, LONGEST_PERIOD])
@pytest.mark.parametrize("prefix", [0, 1, 59, 400])
def test_a_loop_is_found_as_soon_as_it_is_long_enough(period: int, prefix: int) -> None:
    tokens = [*range(2000, 2000 + prefix), *itertools.islice(itertools.cycle(passage(period)), 2000)]
    found = first_loop(tokens)
    assert found is not None
    length = LOOP_TOKENS + LOOP_REPEATS * period
    assert found == (prefix + length, Loop(period, length // period))
    assert length < DEFAULT_MAX_NEW_TOKENS


def test_it_is_the_definition() -> None:
    """Over few different tokens, with repeats of all lengths and slips in them."""
    rng = random.Random(3)
    for _ in range(30):
        tokens: list[int] = []
        while len(tokens) < 1500:
            piece = [rng.randrange(3) for _ in range(rng.choice((1, 1, 2, 3, 5, 9)))]
            tokens += piece * rng.choice((1, 2, 40, 130, 400))
        found = first_loop(tokens)
        expected = next(
            (number for number in range(1, len(tokens) + 1) if naive(tokens[max(0, number - 900) : number])), None
        )
        assert (found and found[0]) == expected
        if found is not None:
            assert found[1] == naive(tokens[: found[0]])


def test_one_different_token_resets_the_count() -> None:
    five = passage(5)
    almost = five * ((LOOP_TOKENS + LOOP_REPEATS * 5) // 5)
    assert first_loop(almost) is not None
    assert first_loop([*almost[:-1], 5000, *almost[:-1]]) is None


def test_a_passage_longer_than_the_longest_period_is_left_alone() -> None:
    assert first_loop(passage(LONGEST_PERIOD + 1) * 8) is None


LEGITIMATE = {
    "a rule": "=" * 80 + "\nTitle\n" + "=" * 80 + "\n" + "-" * 100 + "\n",
    "a table's rule": "|" + "---|" * 30 + "\n",
    "a table of equal cells": "\n".join("| " + " | ".join(["0"] * 8) + f" | row {n} |" for n in range(40)),
    "a numbered list": "\n".join(f"{n}. The access code is the same as before." for n in range(1, 60)),
    "thirty equal values": "\n".join(["3.14159"] * 30),
    "thirty equal words": "yes\n" * 30,
    "a row of zeros": "[" + ", ".join(["0"] * 64) + "]",
    "repeated lines of code": "    }\n" * 12 + "        self.assertTrue(value)\n" * 10,
    "a long number": "1" + "0" * 100 + " and " + "142857" * 20,
    "a chorus": "Row, row, row your boat, gently down the stream.\n" * 5,
    "a sentence ten times": "I will not talk in class again.\n" * 10,
    "a dump of zeros": "\n".join(f"{n:08x}  " + " ".join(["00"] * 16) for n in range(0, 640, 16)),
    "paragraphs that begin alike": "\n\n".join(
        "On the day the harbor was painted again, " * 2 + f"item {n} came." for n in range(30)
    ),
}


@pytest.mark.parametrize("name", LEGITIMATE)
def test_what_people_ask_for_is_not_cut(name: str) -> None:
    """With the sample's tokenizer, which has few words and so makes many tokens of them."""
    ids = Tokenizer.from_folder(TINY).encode_data(LEGITIMATE[name]).ids
    assert first_loop(ids) is None


@pytest.mark.parametrize(
    "text",
    [
        "the ",
        "ha",
        "I do not know. ",
        "\n",
        "and so on and on and on, ",
        "It is what it is. The old wall by the harbor was painted again, and nobody knew. ",
    ],
)
def test_real_loops_end_before_the_default_limit(text: str) -> None:
    ids = Tokenizer.from_folder(TINY).encode_data("The access code is 48213. " + text * 1000).ids
    found = first_loop(ids[:DEFAULT_MAX_NEW_TOKENS])
    assert found is not None and found[1].times > LOOP_REPEATS
