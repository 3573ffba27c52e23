"""The decode loop against naive full forwards and `transformers`; sampling against formulas in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from l4ctx.checkpoint.generation_config import GenerationConfig, GenerationConfigError, Sampling
from l4ctx.engine.choose import GenerationError, choose
from l4ctx.engine.generate import generate
from l4ctx.engine.prefill import prefill
from l4ctx.engine.row import Row
from model.transformer import Transformer
from model.weights.loading import load_checkpoint
from support.cached_paths import new_cache
from support.drafting import ended
from support.places import SHARED
from support.toy_checkpoints import VOCABULARY, Toys

PROMPT = [5, 61, 3, 3, 90, 17, 42, 8, 11, 2, 77]  # beyond one attention chunk of 7
NEW_TOKENS = 30


def run(
    model: Transformer,
    *,
    max_new_tokens: int = NEW_TOKENS,
    stop_tokens: frozenset[int] = frozenset(),
    sampling: Sampling = Sampling(),
    prompt: list[int] = PROMPT,
) -> tuple[list[int], str]:
    """Prefill, then decode: the tokens and why it ended."""
    cache = new_cache(model, torch.empty(1, len(prompt) + max_new_tokens))
    list(prefill(model, cache, prompt[:-1], prefill_chunk_size=4))
    row = Row(cache, prompt[-1], max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, sampling=sampling)
    return ended(generate(model, row))


def naive_greedy(model: Transformer, count: int) -> list[int]:
    """Every token from a full forward over all before it, without a cache."""
    ids = list(PROMPT)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(PROMPT) :]


@pytest.mark.parametrize("name", ["scout", "maverick", "top_2", "nope_first"])
def test_greedy_equals_naive_and_transformers(toys: Toys, name: str) -> None:
    toy = toys(name, 0.25)
    model = load_checkpoint(toy.folder, dtype=torch.float32)
    found, reason = run(model)
    assert reason == "length" and len(found) == NEW_TOKENS
    assert len(set(found)) > 3  # a model that says one thing would prove nothing
    assert found == naive_greedy(model, NEW_TOKENS)
    theirs = toy.oracle.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT)),
        use_cache=False,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert found == theirs[0, len(PROMPT) :].tolist()


@pytest.fixture
def scout(toys: Toys) -> Transformer:
    return load_checkpoint(toys("scout", 0.25).folder, dtype=torch.float32)


def test_a_prompt_of_one_token(scout: Transformer) -> None:
    found, _ = run(scout, prompt=[9], max_new_tokens=2)
    first = int(scout(torch.tensor([[9]]))[0, -1].argmax())
    assert found == [first, int(scout(torch.tensor([[9, first]]))[0, -1].argmax())]


def test_stop_tokens_end_and_are_not_yielded(scout: Transformer) -> None:
    greedy, _ = run(scout)
    for position in (0, 1, 7):
        stop = greedy[position]
        first = greedy.index(stop)
        for stops in (frozenset({stop}), frozenset({stop, VOCABULARY + 5})):
            assert run(scout, stop_tokens=stops) == (greedy[:first], "stop")
    never = frozenset(range(VOCABULARY)) - set(greedy)
    assert run(scout, stop_tokens=never) == (greedy, "length")


def test_length_comes_before_a_stop_that_would_follow(scout: Transformer) -> None:
    greedy, _ = run(scout)
    first = next(i for i in range(1, NEW_TOKENS) if greedy[i] not in greedy[:i])
    stop = frozenset({greedy[first]})
    assert run(scout, max_new_tokens=first, stop_tokens=stop) == (greedy[:first], "length")
    assert run(scout, max_new_tokens=first + 1, stop_tokens=stop) == (greedy[:first], "stop")
    assert run(scout, max_new_tokens=0) == ([], "length")


def test_every_token_is_committed_once_it_is_followed(scout: Transformer) -> None:
    """Nothing is computed before it is asked for; the cache then holds all but the last token."""
    cache = new_cache(scout, torch.empty(1, 40))
    list(prefill(scout, cache, PROMPT[:-1]))
    tokens = generate(scout, Row(cache, PROMPT[-1], max_new_tokens=9, stop_tokens=frozenset()))
    assert cache.offset == len(PROMPT) - 1
    for number in range(9):
        next(tokens)
        assert cache.offset == len(PROMPT) + number


def test_a_seed_makes_it_reproducible(scout: Transformer) -> None:
    drawn = [run(scout, sampling=Sampling(temperature=1.5, seed=seed))[0] for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len({tuple(tokens) for tokens in drawn}) == 3
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    unseeded = [run(scout, sampling=Sampling(temperature=1.5))[0] for _ in range(2)]
    assert unseeded[0] != unseeded[1]
    assert torch.equal(torch.random.get_rng_state(), before)  # the process's own generator is left alone


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.0),
        Sampling(temperature=0.0, top_k=5, top_p=0.5, seed=1),
        Sampling(temperature=2.0, top_k=1, seed=1),
        Sampling(temperature=2.0, top_p=1e-9, seed=1),
        Sampling(temperature=2.0, top_p=0.0, seed=1),
        Sampling(temperature=1e-4, seed=1),
    ],
)
def test_degenerate_sampling_is_greedy(scout: Transformer, sampling: Sampling) -> None:
    assert run(scout, sampling=sampling) == run(scout)


LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.5, 0.3, -4.0, 1.9, 0.0, 1.1])
SAMPLINGS = {
    "all": Sampling(temperature=1.0),
    "hot": Sampling(temperature=2.5),
    "cold": Sampling(temperature=0.4),
    "top-k": Sampling(temperature=1.0, top_k=4),
    "top-p": Sampling(temperature=1.0, top_p=0.7),
    "top-k beyond the vocabulary": Sampling(temperature=1.0, top_k=100),
    "cold top-p": Sampling(temperature=0.4, top_p=0.9),  # temperature first: it changes what is within p
    "hot top-k then top-p": Sampling(temperature=1.7, top_k=5, top_p=0.8),  # p of what the k leave, not of all
}


def probabilities(logits: Tensor, sampling: Sampling) -> list[float]:
    """The definition in plain float64: the fewest likeliest tokens that hold `top_p` of the first `top_k`."""
    weights = (logits.double() / sampling.temperature).exp()
    order = sorted(range(len(logits)), key=lambda token: (-weights[token].item(), token))
    order = order[: sampling.top_k or None]
    total = sum(weights[token].item() for token in order)
    kept, mass = [], 0.0
    for token in order:
        if mass >= sampling.top_p:
            break
        kept.append(token)
        mass += weights[token].item() / total
    kept_total = sum(weights[token].item() for token in kept)
    return [weights[token].item() / kept_total if token in kept else 0.0 for token in range(len(logits))]


@pytest.mark.parametrize("name", SAMPLINGS)
def test_frequencies_follow_the_formula(name: str) -> None:
    sampling, draws = SAMPLINGS[name], 6000
    expected = torch.tensor(probabilities(LOGITS, sampling), dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    counts = torch.zeros(len(LOGITS), dtype=torch.float64)
    for _ in range(draws):
        counts[choose(LOGITS, sampling, generator)] += 1
    assert not counts[expected == 0].any() and counts[expected * draws > 20].all()
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((counts / draws - expected).abs() <= 4.5 * deviation).all()


@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_formula_is_that_of_transformers(name: str) -> None:
    sampling = SAMPLINGS[name]
    warped = TemperatureLogitsWarper(sampling.temperature)(None, LOGITS[None].double())
    if sampling.top_k:
        warped = TopKLogitsWarper(sampling.top_k)(None, warped)
    if sampling.top_p < 1:
        warped = TopPLogitsWarper(sampling.top_p)(None, warped)
    theirs = warped.softmax(-1)[0]
    assert (theirs - torch.tensor(probabilities(LOGITS, sampling))).abs().max() < 1e-6


def test_ties_go_to_the_lowest_id() -> None:
    logits, generator = torch.tensor([1.0, 3.0, 2.0, 3.0, 3.0]), torch.Generator().manual_seed(0)
    assert {choose(logits, Sampling(temperature=t, top_k=1), generator) for t in (0.0, 1.0)} == {1}
    pairs = {choose(logits, Sampling(temperature=1.0, top_k=2), generator) for _ in range(60)}
    assert pairs == {1, 3}
    assert choose(torch.zeros(50_000), Sampling(temperature=1.0, top_k=1), generator) == 0


@pytest.mark.parametrize("places", [[0, 1], [511, 512], [512, 1500], [1535, 1536], [1599], [3, 1599], range(1600)])
def test_greedy_choice_is_the_first_largest_wherever_it_is(places: Sequence[int]) -> None:
    logits = torch.full((1600,), -3.0)
    logits[list(places)] = -1.5
    assert choose(logits, Sampling(temperature=0.0), torch.Generator()) == places[0]
    assert choose(logits.bfloat16(), Sampling(temperature=0.0), torch.Generator()) == places[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_of_every_dtype_and_large_ones(dtype: torch.dtype) -> None:
    logits = torch.tensor([-60000.0, 3.0, 60000.0]).to(dtype)
    before = logits.clone()
    for temperature in (0.0, 1e-3, 1.0, 1e6):
        assert choose(logits, Sampling(temperature=temperature, top_k=1), torch.Generator()) == 2
    assert choose(logits, Sampling(temperature=1.0), torch.Generator()) == 2
    assert torch.equal(logits, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    logits = LOGITS.clone()
    logits[7] = bad
    with pytest.raises(GenerationError, match="--dtype float32"):
        choose(logits, Sampling(temperature=temperature), torch.Generator())


def test_a_model_that_breaks_down_is_refused(scout: Transformer) -> None:
    with torch.no_grad():
        scout.model.norm.weight[3] = float("nan")
    with pytest.raises(GenerationError, match="not finite"):
        run(scout)


WriteJson = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> WriteJson:
    def write(generation: Any = None, config: Any = None) -> Path:
        for name, value in (("generation_config.json", generation), ("config.json", config)):
            if value is not None:
                (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": 9}, {5}),
        ({"eos_token_id": [200001, 200007, 200008]}, {}, {200001, 200007, 200008}),
        ({"eos_token_id": []}, {"eos_token_id": 9}, set()),
        ({"temperature": 0.6}, {"eos_token_id": 9}, {9}),
        (None, {"eos_token_id": [8, 9]}, {8, 9}),
        (None, {"model_type": "llama4", "text_config": {"eos_token_id": [7]}}, {7}),
        (None, {"eos_token_id": 3, "text_config": {"eos_token_id": 7}}, {3}),
        (None, {"text_config": None}, set()),
        ({"eos_token_id": 0}, None, {0}),
        (None, None, set()),
        ({"eos_token_id": None}, {"eos_token_id": 9}, {9}),
    ],
)
def test_stop_tokens(folder: WriteJson, generation: Any, config: Any, expected: set[int]) -> None:
    assert GenerationConfig.from_folder(folder(generation, config)).stop_tokens == frozenset(expected)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, Sampling()),
        ({}, Sampling()),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, Sampling(0.6, 0.9, 0)),
        ({"do_sample": True, "temperature": 0.6, "top_k": 40}, Sampling(0.6, 1.0, 40)),
        ({"do_sample": True}, Sampling(1.0, 1.0, 0)),
        ({"do_sample": True, "temperature": None, "top_p": None, "top_k": None}, Sampling(1.0, 1.0, 0)),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, Sampling()),
        ({"temperature": 0.6}, Sampling(0.6)),
        ({"temperature": 1}, Sampling(1.0)),
        ({"temperature": 0.0}, Sampling()),
        ({"do_sample": True, "temperature": 0.5, "top_p": 0.0}, Sampling(0.5, 0.0, 0)),
    ],
)
def test_the_authors_sampling(folder: WriteJson, generation: Any, expected: Sampling) -> None:
    read = GenerationConfig.from_folder(folder(generation, {"eos_token_id": 1}))
    assert read.sampling == expected
    assert read.stop_tokens == {1}


@pytest.mark.parametrize(
    ("generation", "config", "named"),
    [
        ("{", {}, "generation_config.json"),
        ("", {}, "generation_config.json"),
        ({}, '{"a": }', "config.json"),
        ("[" * 100_000, {}, "generation_config.json"),
        ({"eos_token_id": "5"}, {}, "eos_token_id '5'"),
        ({"eos_token_id": [5, True]}, {}, "eos_token_id"),
        ({"eos_token_id": 5.0}, {}, "eos_token_id"),
        ({"eos_token_id": {"a": 1}}, {}, "eos_token_id"),
        ({"do_sample": True, "temperature": "warm"}, {}, "generation_config.json"),
        ({"do_sample": True, "top_k": [4]}, {}, "generation_config.json"),
        ({"do_sample": True, "temperature": float("nan")}, {}, "temperature"),
        ([1], {}, "not an object"),
        ({"do_sample": True, "temperature": -1}, {}, "temperature"),
        ({"do_sample": True, "top_p": 1.5}, {}, "top_p"),
    ],
)
def test_what_cannot_be_used_is_named(folder: WriteJson, generation: Any, config: Any, named: str) -> None:
    path = folder(generation, config)
    with pytest.raises(GenerationConfigError) as error:
        GenerationConfig.from_folder(path)
    assert named in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_bytes_that_are_no_utf_8(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_bytes(b'{"eos_token_id": "\xff"}')
    with pytest.raises(GenerationConfigError, match=r"generation_config\.json: cannot be read as JSON"):
        GenerationConfig.from_folder(tmp_path)


def test_the_released_scout() -> None:
    folder = SHARED / "llama4" / "scout"
    if not folder.exists():
        pytest.skip("the released configurations are not at ../shared/llama4")
    config = GenerationConfig.from_folder(folder)
    assert config.stop_tokens == {200001, 200007, 200008}
    assert config.sampling == Sampling(temperature=0.6, top_p=0.9)
