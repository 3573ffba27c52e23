"""The index over a text against brute force: borders of segments, repeated text, tiny alphabets, any width of ids."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator

import pytest

from l4ctx.drafts import index, order
from l4ctx.drafts.index import DEPTH, NO_MATCH, IndexedText, Match, common_length, tokens_before
from l4ctx.drafts.order import text_order

LARGEST_ID = 2**31 - 2
ALPHABETS = (1, 2, 3, 30, 202_048, LARGEST_ID)


@pytest.fixture(params=[7, DEPTH, 50, 10**6])
def segment_tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Segments shorter than a match, as long as one, longer, and one for all."""
    monkeypatch.setattr(index, "SEGMENT_TOKENS", request.param)
    monkeypatch.setattr(order, "SEGMENT_TOKENS", request.param)
    return request.param


def drawn(alphabet: int, tokens: int, rng: random.Random) -> array[int]:
    """A text in which, as in real ones, passages come again."""
    ids = array("i", (rng.randrange(alphabet) for _ in range(tokens)))
    for _ in range(tokens // 40):
        start, to, length = rng.randrange(tokens), rng.randrange(tokens), rng.randrange(1, 2 * DEPTH)
        ids[to : to + length] = ids[start : start + length]
    return ids


def texts() -> Iterator[array[int]]:
    rng = random.Random(5)
    for alphabet in ALPHABETS:
        for tokens in (0, 1, 2, DEPTH + 1, 101, 260):
            yield drawn(alphabet, tokens, rng)
    yield array("i", [4, 9, 2] * 70)


def longest(ids: array[int], newest: array[int]) -> int:
    """By trying every position."""
    return max((common_length(tokens_before(ids, p, DEPTH), newest[:DEPTH]) for p in range(len(ids))), default=0)


def test_the_order_is_that_of_the_tokens_before(segment_tokens: int) -> None:
    for ids in texts():
        found = text_order(ids)
        for start in range(0, len(ids), segment_tokens):
            here = range(start, min(start + segment_tokens, len(ids)))
            expected = sorted(here, key=lambda position: (list(reversed(ids[:position]))[:DEPTH], position))
            assert found[here.start : here.stop].tolist() == expected


def test_the_longest_match_is_found(segment_tokens: int) -> None:
    rng = random.Random(6)
    for ids in texts():
        text = IndexedText(ids, text_order(ids))
        for _ in range(15):
            newest = tokens_before(ids, rng.randrange(len(ids) + 1), rng.randrange(2 * DEPTH))
            if newest and rng.random() < 0.5:
                newest[rng.randrange(len(newest))] = rng.randrange(5)
            match = text.find(newest)
            assert match.length == longest(ids, newest)
            assert common_length(tokens_before(ids, match.position, DEPTH), newest) >= match.length
            assert match == NO_MATCH or text.following(match, 3) == ids[match.position : match.position + 3] != array(
                "i"
            )


def test_a_match_crosses_the_borders_of_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (index, order):
        monkeypatch.setattr(module, "SEGMENT_TOKENS", 10)
    ids = array("i", range(100, 140))
    text = IndexedText(ids, text_order(ids))
    for position in range(1, 40):
        assert text.find(tokens_before(ids, position, DEPTH)) == Match(min(position, DEPTH), position)


def test_of_equal_matches_the_last_one_is_taken(segment_tokens: int) -> None:
    passage = list(range(50, 50 + DEPTH))
    ids = array("i", [1, *passage, 2, 3, *passage, 4, 5, *passage, 6, 7, 8])
    text = IndexedText(ids, text_order(ids))
    assert text.following(text.find(array("i", reversed(passage))), 2).tolist() == [6, 7]


def test_the_index_takes_8_bytes_a_token() -> None:
    ids = array("i", range(1000))
    text = IndexedText(ids, text_order(ids))
    assert sum(memoryview(part).nbytes for part in (text.ids, text.order)) == 8 * len(ids)
    assert memoryview(text.order).itemsize == index.ORDER_BYTES


def test_a_wrong_order_gives_no_wrong_match() -> None:
    rng = random.Random(7)
    ids = drawn(3, 200, rng)
    text = IndexedText(ids, array("i", (rng.randrange(200) for _ in ids)))
    for _ in range(100):
        newest = array("i", (rng.randrange(3) for _ in range(12)))
        match = text.find(newest)
        assert common_length(tokens_before(ids, match.position, DEPTH), newest) >= match.length


def test_looking_up_takes_few_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 for each segment, and 2 candidates: 220 behind ten million tokens."""
    ids = drawn(200, 4000, random.Random(8))
    monkeypatch.setattr(index, "SEGMENT_TOKENS", 1024)
    monkeypatch.setattr(order, "SEGMENT_TOKENS", 1024)
    text, compared = IndexedText(ids, text_order(ids)), []

    def counting(*args: int) -> array[int]:
        compared.append(args)
        return tokens_before(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(index, "tokens_before", counting)
    text.find(tokens_before(ids, 3000, DEPTH))
    assert 4 * 10 <= len(compared) <= 4 * (11 + 2)
