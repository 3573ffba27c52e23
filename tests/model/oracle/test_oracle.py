"""Our model in float32 is as near to `transformers` in float64 as `transformers` in float32, by every path."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from model.weights.loading import load_checkpoint
from support.error_budget import difference
from support.naive_model import naive_logits
from support.oracle_differences import CASES, CPU_BACKENDS, ModelFactory, differences, load
from support.toy_checkpoints import CHUNK, KINDS, ROTATIONS, SCALES, Toy, Toys

QUICK_BACKENDS = tuple(name for name in CPU_BACKENDS if name != "flex")

pytestmark = pytest.mark.usefixtures("small_products")

ALWAYS = {(name, std) for name in ("scout", "maverick", "nope_first", "bfloat16") for std in SCALES}
ALWAYS |= {(name, max(SCALES)) for name in set(KINDS) - ROTATIONS}
"""Others are compared with -m matrix."""


def check_against_oracle(
    make_model: ModelFactory,
    toy: Toy,
    cases: Iterable[tuple[int, int]] = CASES,
    backends: Iterable[str] = CPU_BACKENDS,
) -> None:
    """Fails where the model disagrees with the oracle; a NaN disagrees."""
    found = differences(make_model, toy, cases, backends)
    wrong = {case: value for case, value in found.items() if not value <= 1}
    assert not wrong, f"{toy.name} in {toy.folder.name}: {wrong}"


@pytest.mark.parametrize(
    ("name", "std"),
    [
        (name, std) if (name, std) in ALWAYS else pytest.param(name, std, marks=pytest.mark.matrix)
        for name in KINDS
        for std in SCALES
    ],
)
def test_equals_transformers(toys: Toys, name: str, std: float) -> None:
    """Of the small weights, which show errors of eps, two cases that turn.

    flex, uncompiled, is slow: one case of those that differ in attention; test_flex.py has others.
    """
    is_large = std == max(SCALES)
    cases = CASES if is_large else [CASES[list(KINDS).index(name) % 4], CASES[-1]]
    check_against_oracle(load, toys(name, std), cases, QUICK_BACKENDS)
    if is_large and name in ("scout", "maverick", "nope_first", "no_temperature", "one_kv_head", "equal_heads"):
        check_against_oracle(load, toys(name, std), [(1, 2 * CHUNK + 1)], ["flex"])


DEFAULT_ROPE = [name for name, kind in KINDS.items() if "rope_parameters" not in kind.changes]


@pytest.mark.parametrize("name", DEFAULT_ROPE)
def test_the_oracle_in_float64_is_the_naive_model(toys: Toys, name: str) -> None:
    """A third opinion: what we and `transformers` might both get wrong. And nothing of the oracle's is in float32."""
    toy = toys(name, 0.25)
    ids, expected = toy.case(1, 61)
    naive = naive_logits(toy.oracle.config.get_text_config(), toy.oracle.state_dict(), ids[0])
    assert difference(expected[0], naive) <= 1e-12


@pytest.mark.parametrize("name", KINDS)
def test_logits_of_the_last_position_or_of_none(toys: Toys, name: str) -> None:
    toy = toys(name, 0.25)
    turn = list(KINDS).index(name)
    for backend in CPU_BACKENDS if name == "scout" else [QUICK_BACKENDS[turn % len(QUICK_BACKENDS)]]:
        model = load(toy.folder, backend)
        ids, expected = toy.case(2, 33)
        last = model(ids, logits="last")
        assert last.shape == (2, 1, expected.shape[-1])
        largest = expected.abs().max()
        assert (last - expected[:, -1:]).abs().max() <= toy.limit(2, 33) * largest
        assert (last - model(ids, logits="all")[:, -1:]).abs().max() <= toy.limit(2, 33) * largest
        assert model(ids, logits="none") is None


def test_embeddings_as_inputs_equal_token_ids(toys: Toys) -> None:
    toy = toys("scout", 0.25)
    model = load(toy.folder, "sdpa")
    ids, expected = toy.case(2, 33)
    embeddings = toy.oracle.get_input_embeddings()(ids).detach()
    before = embeddings.clone()
    assert difference(model(embeddings), expected) <= toy.limit(2, 33)
    assert torch.equal(embeddings, before)  # the inputs are the caller's


def test_the_oracle_itself_is_what_was_stored(toys: Toys) -> None:
    """A checkpoint read back by `transformers` gives the logits of the model that wrote it."""
    for name in ("bfloat16", "nested_sharded"):
        toy = toys(name, 0.25)
        ids, expected = toy.case(1, 61)
        again = type(toy.oracle).from_pretrained(toy.folder, dtype=torch.float32, attn_implementation="sdpa")
        with torch.no_grad():
            logits = again(ids, use_cache=False).logits
        assert difference(logits, expected) <= toy.limit(1, 61)


@pytest.mark.parametrize("std", SCALES)
def test_low_precision_is_about_as_good_as_the_oracles(toys: Toys, std: float) -> None:
    """bfloat16: our mean error against float32 is not above that of `transformers` in bfloat16 by more than half.

    One routing decision that flips within rounding moves a whole row of logits, hence the mean over rows' medians.
    """
    toy = toys("maverick", std)
    ids, expected = toy.case(2, 33)
    theirs = type(toy.oracle).from_pretrained(toy.folder, dtype=torch.bfloat16)
    with torch.no_grad():
        budget = (theirs(ids, use_cache=False).logits.float() - expected).abs().flatten(0, 1).mean(-1).median()
    for backend in CPU_BACKENDS:
        model = load_checkpoint(toy.folder, dtype=torch.bfloat16, attention=backend)
        logits = model(ids)
        assert logits.dtype == torch.bfloat16
        error = (logits.float() - expected).abs().flatten(0, 1).mean(-1).median()
        assert 0 < error <= 1.5 * budget, backend
