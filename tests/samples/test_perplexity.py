"""The script that measures perplexity: its figures are a plain forward's, whatever the steps, and it resumes."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from l4ctx.checkpoint.tokenizer import Tokenizer
from model.transformer import Transformer
from model.weights.loading import load_checkpoint
from samples.evaluation import debian_corpus, evaluate_perplexity
from samples.evaluation.evaluate_perplexity import Window, evaluate, summary, windows
from support.places import ROOT, TINY

SIZE = 90
SETTINGS = {"window": SIZE, "kv_dtype": "auto"}


@pytest.fixture(scope="module")
def model() -> Transformer:
    return load_checkpoint(TINY, dtype=torch.float32)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return list(Tokenizer.from_folder(TINY).encode_data(text).ids[: 3 * SIZE + 11])


@pytest.mark.parametrize("step", [1, 32, SIZE, 1000])
def test_it_is_the_loss_of_a_plain_forward(model: Transformer, ids: list[int], step: int) -> None:
    row = torch.tensor(ids[:SIZE])
    logits = model(row[None])
    assert logits is not None
    losses = F.cross_entropy(logits[0, :-1], row[1:], reduction="none")
    found = evaluate(model, ids[:SIZE], "auto", step)
    assert found.tokens == SIZE - 1 and found.half_tokens == SIZE - 1 - SIZE // 2
    assert found.nats == pytest.approx(float(losses.sum()), rel=1e-5)
    assert found.half_nats == pytest.approx(float(losses[SIZE // 2 :].sum()), rel=1e-5)


def test_stored_types_of_keys_and_values_matter_in_every_layer(model: Transformer, ids: list[int]) -> None:
    exact = evaluate(model, ids[:SIZE], "auto", 32).nats
    errors = [abs(evaluate(model, ids[:SIZE], kv_dtype, 32).nats - exact) / exact for kv_dtype in ("int8", "fp8")]
    assert all(0 < error < 0.05 for error in errors), errors


def test_finished_windows_are_not_computed_again(
    model: Transformer, ids: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, computed = tmp_path / "results", []

    def counting(*arguments: object) -> Window:
        computed.append(arguments)
        return evaluate(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluate_perplexity, "evaluate", counting)
    first = windows(model, ids, SETTINGS, 32, results)
    expected = [next(first), next(first)]  # and then interrupted
    assert list(windows(model, ids, SETTINGS, 32, results))[:2] == expected and len(computed) == 3
    assert list(windows(model, ids, {**SETTINGS, "dtype": "other"}, 32, results))[:2] == expected
    assert len(computed) == 6, "other settings"
    assert [json.loads(line)["number"] for line in results.read_text().splitlines()] == [0, 1, 2, 0, 1, 2]


def test_the_summary_weighs_tokens() -> None:
    found = summary([Window(10.0, 5, 4.0, 2), Window(2.0, 3, 1.0, 3)])
    assert found["nats"] == 1.5 and found["tokens"] == 8 and found["perplexity"] == pytest.approx(4.481689)
    assert found["second_half_perplexity"] == pytest.approx(2.718282)


def test_the_corpus_is_every_different_readme(tmp_path: Path) -> None:
    for name, content in (
        ("b/README.gz", gzip.compress(b"packed")),
        ("a/README.md", b"plain"),
        ("a/README.again", b"plain"),
        ("c/README", "caf\xe9".encode("latin-1")),
        ("c/NEWS", b"other"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    os.symlink(tmp_path / "b" / "README.gz", tmp_path / "a" / "README.link.gz")
    assert list(debian_corpus.texts(tmp_path)) == ["plain", "packed"]
