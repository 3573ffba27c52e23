"""What is proposed, how its length follows what was accepted, and what is counted."""

from __future__ import annotations

import random
from array import array

import pytest

from l4ctx.drafts.acceptance import FIRST_CHANCES, MATCH_LENGTHS, Acceptance
from l4ctx.drafts.drafter import MOST_TOKENS, DraftCounts, Drafter
from l4ctx.drafts.index import IndexedText
from l4ctx.drafts.order import text_order

TEXT = array("i", range(100, 180))


def indexed(ids: array[int]) -> IndexedText:
    return IndexedText(ids, text_order(ids))


def drafter(*, most: int = MOST_TOKENS, row_cost: float = 0.0, never: int | None = None) -> Drafter:
    """Of an answer that has just repeated three tokens of the text."""
    return Drafter([indexed(TEXT)], array("i", [7, 110, 111, 112]), most=most, row_cost=row_cost, never=never)


def test_what_followed_is_proposed() -> None:
    found = drafter()
    assert found.propose(100) == list(range(113, 113 + MOST_TOKENS))
    found.observe([*range(113, 113 + MOST_TOKENS), 120])
    assert found.propose(100) == list(range(121, 121 + MOST_TOKENS))
    found.observe([5])  # not what was proposed
    assert found.propose(100) == []  # 5 was never seen
    assert found.counts == DraftCounts(proposed=2 * MOST_TOKENS, accepted=MOST_TOKENS, drafts=2, steps=1 + 1)


def test_room_and_most_limit_it() -> None:
    assert drafter().propose(3) == [113, 114, 115]
    assert drafter().propose(0) == [] == drafter(most=0).propose(9)
    assert drafter(most=40).propose(100) == list(range(113, 153))


def test_it_ends_with_the_text_and_before_images() -> None:
    end = Drafter([indexed(TEXT)], array("i", [176, 177]), row_cost=0.0)
    assert end.propose(9) == [178, 179]
    assert drafter(never=115).propose(9) == [113, 114]
    assert drafter(never=113).propose(9) == []


def test_the_longest_match_wins_then_the_newest() -> None:
    old, new = array("i", [1, 2, 3, 4, 50, 51]), array("i", [9, 2, 3, 4, 60, 61])
    texts = [indexed(old), indexed(new)]
    assert Drafter(texts, array("i", [8, 3, 4]), row_cost=0.0).propose(2) == [60, 61]
    assert Drafter(texts, array("i", [1, 2, 3, 4]), row_cost=0.0).propose(2) == [50, 51]
    answer = Drafter(texts, array("i", [3, 4, 70, 5, 3, 4]), row_cost=0.0)
    assert answer.propose(2) == [70, 5]  # the answer itself is newer than any text


def test_without_a_match_nothing_is_proposed() -> None:
    found = Drafter([], array("i", [4]), row_cost=0.0)
    assert found.propose(5) == []
    found.observe([9])
    assert found.counts == DraftCounts(steps=1)


def test_drafts_that_fail_are_given_up_and_come_back() -> None:
    """A pause is ended by drafts that would have been right: they are compared, though not verified."""
    rng, text = random.Random(9), array("i", range(100, 300))
    found = Drafter([indexed(text)], text[:1], row_cost=0.1)
    lengths = []
    for _ in range(40):
        lengths.append(len(found.propose(100)))
        found.observe([rng.choice(text)])
    assert lengths[0] > 0 and not any(lengths[5:])
    for token in range(100, 140):
        lengths.append(len(found.propose(100)))
        found.observe([token])
    assert lengths[-1] == MOST_TOKENS


def test_the_number_of_tokens_follows_from_chances_and_cost() -> None:
    """Against the formula, from chances of one class of matches at a time."""
    acceptance = Acceptance()
    for length, chance in zip(MATCH_LENGTHS, FIRST_CHANCES, strict=True):
        assert acceptance.chance(length) == pytest.approx(chance)
    for cost in (0.0, 0.05, 0.3, 0.9):
        chances = [acceptance.chance(length) for length in range(3, 3 + 7)]
        rates, expected, chance = [1.0], 1.0, 1.0
        for count, next_one in enumerate(chances, 1):
            chance *= next_one
            expected += chance
            rates.append(expected / (1 + count * cost))
        assert acceptance.worth_verifying(3, 7, cost) == rates.index(max(rates))
    assert acceptance.worth_verifying(20, 7, 1.0) == 0  # a token of a draft costs as much as one without


def test_the_more_answers_share_a_forward_the_less_a_draft_of_one_is_worth() -> None:
    """Against the formula; where more tokens cost nothing, it is worth as much beside any number of others."""
    acceptance = Acceptance()
    for rows in (1, 2, 5, 40):
        for cost in (0.0, 0.05, 0.3):
            rates, expected, chance = [rows / (1 + (rows - 1) * cost)], float(rows), 1.0
            for count in range(1, 8):
                chance *= acceptance.chance(3 + count - 1)
                expected += chance
                rates.append(expected / (1 + (rows - 1 + count) * cost))
            assert acceptance.worth_verifying(3, 7, cost, rows) == rates.index(max(rates)), (rows, cost)
    lengths = [acceptance.worth_verifying(3, 7, 0.1, rows) for rows in (1, 2, 4, 8, 40)]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1] == 0
    assert acceptance.worth_verifying(3, 7, 0.0, 40) == 7


def test_a_step_without_room_is_no_observation() -> None:
    """What was found for the step before says nothing about this one; several drafters may share their counts."""
    counts = DraftCounts()
    text = indexed(TEXT)
    found, other = (Drafter([text], array("i", [7, 110]), row_cost=0.0, counts=counts) for _ in range(2))
    assert found.propose(3, 2) == [111, 112, 113]
    found.observe([111, 112, 5])
    assert found.propose(0, 2) == []
    found.observe([6])
    assert other.propose(1, 1) == [111]
    other.observe([111, 112])
    assert counts == DraftCounts(proposed=4, accepted=3, drafts=2, steps=3)


@pytest.mark.parametrize("length", [1, 3, 5, 32, 39])
def test_chances_follow_what_happens(length: int) -> None:
    acceptance, others = Acceptance(), Acceptance()
    for _ in range(100):
        acceptance.observe(length, is_right=True)
    assert acceptance.chance(length) > 0.95
    for _ in range(12):
        acceptance.observe(length, is_right=False)
    assert acceptance.chance(length) < 0.35
    unseen = 2 if length != 2 else 1
    assert acceptance.chance(unseen) == others.chance(unseen)
