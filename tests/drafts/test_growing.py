"""Matches within an answer that grows, against brute force."""

from __future__ import annotations

import random
from array import array

import pytest

from l4ctx.drafts.growing import PATTERNS, GrowingText
from l4ctx.drafts.index import DEPTH, NO_MATCH, Match


def expected_position(ids: list[int]) -> int:
    """The last place that follows the longest of the patterns which the newest tokens begin."""
    for length in PATTERNS:
        found = [p for p in range(length, len(ids)) if ids[p - length : p] == ids[len(ids) - length :]]
        if length <= len(ids) and found:
            return found[-1]
    return 0


@pytest.mark.parametrize("alphabet", [1, 2, 3, 10, 256, 2**31 - 1])
def test_the_last_match_is_found(alphabet: int) -> None:
    rng = random.Random(alphabet)
    for tokens in range(60):
        prompt = array("i", (rng.randrange(alphabet) for _ in range(rng.randrange(40))))
        answer = [rng.randrange(alphabet) for _ in range(tokens)]
        text, ids = GrowingText(prompt), prompt.tolist() + answer
        for token in answer:
            text.extend([token])
        newest = text.newest
        assert newest.tolist() == ids[::-1][:DEPTH]
        match = text.find(newest)
        assert match.position == expected_position(ids)
        before = ids[: match.position][::-1]
        assert before[: match.length] == newest[: match.length].tolist()
        assert match.length in (len(newest), len(before)) or before[match.length] != newest[match.length]


def test_tokens_are_not_matched_across_their_bytes() -> None:
    """In 32-bit little-endian ids, 0x01000000 and 1 in a row hold the bytes of 0x00000101."""
    text = GrowingText(array("i", [0x01000000, 1, 7, 0x00000101]))
    assert text.find(text.newest) == NO_MATCH


def test_what_repeats_goes_on() -> None:
    text = GrowingText(array("i", [5, 8, 2, 9, 8, 2, 9, 8]))
    match = text.find(text.newest)
    assert match == Match(4, 5)
    assert text.following(match, 8).tolist() == [2, 9, 8, 2, 9, 8, 2, 9]


def test_the_prompt_is_not_changed() -> None:
    prompt = array("i", [1, 2])
    GrowingText(prompt).extend([3])
    assert prompt.tolist() == [1, 2]
