"""What is planted and what counts as found, the text that it is planted in, and intervals."""

from __future__ import annotations

import itertools
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4ctx.evaluation.haystack import Haystack, HaystackError, made_up_lines, own_lines
from l4ctx.evaluation.intervals import wilson
from l4ctx.evaluation.tasks import TASKS, Needle, needles

NAMES = tuple(TASKS)


def made(depths: int = 6, seed: int = 1) -> list[Needle]:
    return list(needles(NAMES, depths, random.Random(seed)))


def test_facts_are_in_their_sentences_and_differ() -> None:
    found = made()
    assert [(needle.task, needle.depth) for needle in found] == list(itertools.product(NAMES, range(6)))
    for needle in found:
        text = " ".join(needle.sentences)
        if needle.task == "counting":
            assert str(len(needle.sentences)) in needle.expected[0] and len(set(needle.sentences)) == 1
        else:
            assert all(one[0] in text for one in needle.expected) and all(code in text for code in needle.decoys)
        assert needle.is_found(" and ".join(one[0] for one in needle.expected))
        for wrong in needle.decoys:
            assert not needle.is_found(" and ".join([wrong, *(one[0] for one in needle.expected)]))
    codes = re.findall(r"\b\d{5}\b", " ".join(sentence for needle in found for sentence in needle.sentences))
    assert len(codes) == len(set(codes)) > 60
    questions = [needle.question for needle in found]
    assert len(set(questions)) == len(questions)
    assert made() == found != made(seed=2)


def test_an_answer_is_right_if_it_has_all_that_is_expected_and_nothing_else() -> None:
    needle = Needle("values", 0, ("",), "", (("12345",), ("7", "seven")), ("99999",))
    for answer in ("12345 and 7", "Seven, then 12345."):
        assert needle.is_found(answer), answer
    for answer in ("", "12345", "123456 and 7", "12,345 and 7", "12345 and 77", "12345, 7, or 99999", "x12345 7"):
        assert not needle.is_found(answer), answer


def test_a_count_is_right_alone() -> None:
    needle = next(needle for needle in made() if needle.task == "counting" and len(needle.sentences) == 5)
    for answer in ("5", "Five times.", "The bell rang 5 times (five)."):
        assert needle.is_found(answer), answer
    for answer in ("2, 3, 4, 5, 6", "four or five", "15", "5.5 or 9 times", "many"):
        assert not needle.is_found(answer), answer


def words(text: str) -> int:
    return len(text.split())


def test_sentences_lie_in_their_parts_of_the_text() -> None:
    depths, facts = 4, list(needles(("single", "tracing"), 4, random.Random(3)))
    haystack = Haystack(made_up_lines(random.Random(4)), 5000, words)
    text = haystack.planted(4000, facts, depths, random.Random(5))
    planted = {sentence for needle in facts for sentence in needle.sentences}
    filler = [line for line in text.splitlines() if line not in planted]
    assert abs(words("\n".join(filler)) - 4000) < 12
    for needle in facts:
        places = [words(text[: text.index(sentence)]) / words(text) for sentence in needle.sentences]
        assert places == sorted(places)
        assert all(needle.depth / depths - 0.03 < place < (needle.depth + 1) / depths + 0.03 for place in places)
    assert haystack.planted(4000, facts, depths, random.Random(5)) == text
    assert haystack.planted(100, [], depths, random.Random(5)).split()[:90] == text.split()[:90] or planted


def test_own_text_is_repeated_from_a_random_line_on() -> None:
    lines = list(itertools.islice(own_lines(["a b\nc\n", "d " * 500], random.Random(2)), 9))
    assert len(set(lines)) == len(set(lines[:5])) and all(line.endswith("\n") and len(line) < 420 for line in lines)
    assert "".join(lines).replace("\n", " ").split().count("c") >= 1
    for texts in ([""], [], [" \n\n"]):
        with pytest.raises(HaystackError):
            own_lines(texts, random.Random(2))


@given(st.integers(0, 40), st.integers(0, 40))
def test_intervals_hold_the_share_and_shrink(right: int, wrong: int) -> None:
    asked = right + wrong
    low, high = wilson(right, asked)
    assert 0 <= low <= (right / asked if asked else 0.5) <= high <= 1
    assert high - low >= sum((-1) ** i * x for i, x in enumerate(wilson(4 * right, 4 * asked)[::-1])) - 1e-12


def test_intervals_are_those_of_tables() -> None:
    """Brown, Cai and DasGupta, Interval Estimation for a Binomial Proportion, 2001; and R's prop.test without
    continuity correction."""
    assert wilson(0, 10) == pytest.approx((0, 0.27753), abs=1e-5)
    assert wilson(20, 20) == pytest.approx((0.83887, 1), abs=1e-5)
    assert wilson(7, 10) == pytest.approx((0.39678, 0.89221), abs=1e-5)
    assert wilson(0, 0) == (0, 1)
