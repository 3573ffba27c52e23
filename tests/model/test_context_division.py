"""How attention chunks are dealt out over ranks, against counting them one by one."""

from __future__ import annotations

import itertools

import pytest

from model.config import TextConfig
from model.context_division import ContextRank, Piece, bytes_of_keys, bytes_of_queries, exchanged
from support.toy_checkpoints import BASE

CHUNK = 5
CONFIG = TextConfig.from_dict({"model_type": "llama4_text", **BASE, "attention_chunk_size": CHUNK})
COUNTS = [1, 2, 3, 4]


def owners(count: int, tokens: int) -> list[int]:
    """Of each token: rank i has the i-th chunk from either end of every 2 * count."""
    order = [*range(count), *reversed(range(count))]
    return list(itertools.islice((rank for rank in itertools.cycle(order) for _ in range(CHUNK)), tokens))


@pytest.mark.parametrize("count", COUNTS)
def test_tokens_are_counted_in_closed_form(count: int) -> None:
    expected = owners(count, 5 * count * CHUNK + 3)
    for number in range(count):
        rank = ContextRank(number, count)
        assert [rank.owner(position // CHUNK) for position in range(len(expected))] == expected
        for position in range(len(expected) + 1):
            assert rank.tokens_before(position, CHUNK) == expected[:position].count(number)


@pytest.mark.parametrize("count", COUNTS)
def test_pieces_are_runs_of_one_owner(count: int) -> None:
    tokens = 3 * count * CHUNK
    of = owners(count, tokens)
    for start, stop in itertools.product((0, 1, CHUNK, 2 * CHUNK + 3), (tokens - CHUNK - 2, tokens)):
        runs = [list(run) for _, run in itertools.groupby(range(start, stop), of.__getitem__)]
        expected = [Piece(of[run[0]], range(run[0], run[-1] + 1)) for run in runs]
        assert list(ContextRank(0, count).pieces(range(start, stop), CHUNK)) == expected
    assert list(ContextRank(0, count).pieces(range(7, 7), CHUNK)) == []


@pytest.mark.parametrize("count", COUNTS)
def test_keys_that_others_see_are_counted_in_closed_form(count: int) -> None:
    of = owners(count, 4 * count * CHUNK)
    for start, stop in ((0, 2), (0, 2 * CHUNK), (CHUNK, 3 * CHUNK + 1), (2, len(of)), (len(of) - 1, len(of))):
        pieces = list(ContextRank(0, count).pieces(range(start, stop), CHUNK))
        for number in range(count):
            seen = {
                key for query in range(start, stop) if of[query] != number for key in range(query) if of[key] == number
            }
            assert ContextRank(number, count).keys_seen(pieces, CHUNK) == len(seen)


@pytest.mark.parametrize("count", COUNTS)
def test_causal_work_is_the_same_for_all(count: int) -> None:
    """Of query and key pairs of different chunks, whoever attends: the queries' owner or the keys'."""
    chunks = range(6 * count)
    rank = ContextRank(0, count)
    by_query, by_key = [0] * count, [0] * count
    for query, key in itertools.product(chunks, chunks):
        if key < query:
            by_query[rank.owner(query)] += 1
            by_key[rank.owner(key)] += 1
    assert len(set(by_query)) == len(set(by_key)) == 1


def test_what_is_less_travels() -> None:
    """Keys first, queries once the past is long; nothing where no query sees another rank's keys."""
    query = bytes_of_queries(CONFIG, 1, 2)
    assert query == 6 * (10 * 2 + 10 * 4 + 4) and bytes_of_keys(CONFIG, 1, 2) == 2 * 2 * 10 * 2
    kinds = []
    for start in range(0, 60 * CHUNK, 4 * CHUNK):
        pieces = list(ContextRank(0, 2).pieces(range(start, start + 4 * CHUNK), CHUNK))
        found = exchanged(CONFIG, 2, pieces, 2)
        keys = sum(ContextRank(number, 2).keys_seen(pieces, CHUNK) for number in range(2))
        assert found.num_bytes == min(4 * CHUNK * query, bytes_of_keys(CONFIG, keys, 2))
        kinds.append(found.are_queries)
    assert kinds == sorted(kinds) and set(kinds) == {False, True}
    assert exchanged(CONFIG, 4, list(ContextRank(0, 4).pieces(range(CHUNK), CHUNK)), 2) == (False, 0)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("step", [3, CHUNK, 2 * CHUNK, 4 * CHUNK, 6 * CHUNK])
def test_a_step_is_divided(count: int, step: int) -> None:
    of = owners(count, 12 * count * step)
    steps = [of[start : start + step] for start in range(0, len(of), step)]
    rank = ContextRank(0, count)
    assert rank.most_in_a_step(step, CHUNK) == max(some.count(number) for some in steps for number in range(count))
