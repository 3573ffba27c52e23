"""Perplexity of documents: the loss that `transformers` gives, whatever the steps and slices, and its report."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from cache.hybrid import HybridKVCache
from l4ctx.engine.prefill import prefill
from l4ctx.evaluation import score as scoring
from l4ctx.evaluation.positions import ByPosition
from l4ctx.spans import Span
from model.weights.loading import load_checkpoint
from support.cli_runner import check_refused, run_here, text_file
from support.places import TINY
from support.toy_checkpoints import VOCABULARY, Toys

TEXT = "The old wall by the harbor was painted again in the third week of spring.\n"


@pytest.mark.parametrize(("name", "chunk"), [("scout", 5), ("scout", 64), ("maverick", 14)])
def test_it_is_the_loss_of_transformers(name: str, chunk: int, toys: Toys, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = toys(name, 0.25)
    ids, _ = toy.case(1, 61)
    with torch.no_grad():
        expected = float(toy.oracle(ids, labels=ids, use_cache=False).loss)
    model, found, slices = load_checkpoint(toy.folder), scoring.Score(), []
    logits_of = model.logits_of

    def sliced(states: torch.Tensor) -> torch.Tensor:
        slices.append(len(states))
        return logits_of(states)

    monkeypatch.setattr(model, "logits_of", sliced)
    monkeypatch.setattr(scoring, "LOGIT_BYTES", 3 * 4 * VOCABULARY)
    row = ids[0].tolist()

    def observe(positions: range, states: torch.Tensor) -> None:
        targets = row[positions.start + 1 : positions.stop + 1]
        found.add(positions.start + 1, scoring.losses_of(model, states[0, : len(targets)], targets), [])

    for _ in prefill(model, HybridKVCache(model.config, length=61), row, prefill_chunk_size=chunk, observe=observe):
        pass
    assert found.total.tokens == 60 and max(slices) <= 3
    assert found.total.mean == pytest.approx(expected, abs=1e-4)
    assert sum(sums.nats for _, sums in found.by_position.filled()) == pytest.approx(found.total.nats)


def test_losses_are_gathered_in_ranges_that_double() -> None:
    losses = [float(number) for number in range(1, 12)]
    whole, parts = ByPosition(), ByPosition()
    whole.add(1, losses)
    for start in range(0, 11, 3):
        parts.add(1 + start, losses[start : start + 3])
    assert whole == parts
    assert [(start, sums.tokens, sums.nats) for start, sums in whole.filled()] == [
        (1, 1, 1.0),
        (2, 2, 5.0),
        (4, 4, 22.0),
        (8, 4, 38.0),
    ]
    third = whole.filled()[2][1]
    assert third.error == pytest.approx(1.95996 * math.sqrt(5 / 3 / 4), rel=1e-4)


def test_documents_have_their_own_sums() -> None:
    found = scoring.Score()
    spans = [Span("a", 1, 4), Span("b", 4, 6)]  # position 0 begins the text
    found.add(1, [1.0, 2.0], spans)
    found.add(3, [4.0, 8.0, 16.0], spans)
    assert [(sums.tokens, sums.nats) for sums in found.by_document] == [(3, 7.0), (2, 24.0)]


def test_the_command_scores_text_alone(tmp_path: Path) -> None:
    text_file(tmp_path / "docs" / "a.txt", TEXT * 3)
    text_file(tmp_path / "docs" / "b.txt", TEXT)
    Image.new("RGB", (4, 4)).save(tmp_path / "docs" / "c.png")
    pictures = [str(tmp_path / name) for name in ("curve.svg", "curve.png")]
    arguments = ("score", str(tmp_path / "docs"), "-m", str(TINY), "--dtype", "float32")
    result = run_here(*arguments, "--json", "-o", pictures[0], "-o", pictures[1])
    assert result.code == 0, result
    found = json.loads(result.stdout)
    assert "skipped docs/c.png: a PNG image; a score is of text" in result.stderr
    assert found["bytes"] == 4 * len(TEXT) + 2 and found["predicted_tokens"] == found["tokens"] - 1
    assert found["nats"] == pytest.approx(found["nats_per_token"] * found["predicted_tokens"])
    assert found["perplexity"] == pytest.approx(math.exp(found["nats_per_token"]))
    assert found["bits_per_byte"] == pytest.approx(found["nats"] / math.log(2) / found["bytes"])
    assert sum(document["nats"] for document in found["documents"]) == pytest.approx(found["nats"])
    assert [document["path"] for document in found["documents"]] == ["docs/a.txt", "docs/b.txt"]
    svg = Path(pictures[0]).read_text(encoding="utf-8")
    assert "perplexity" in svg and "http" not in svg.replace('xmlns="http://www.w3.org/2000/svg"', "")
    with Image.open(pictures[1]) as png:
        assert png.size == (1280, 720)
    first = run_here(*arguments, "--tokens", "20", "--kv-dtype", "int8")
    assert first.code == 0 and "the first 20 of " in first.stderr, first
    assert all(len(line) <= 80 for line in first.stdout.splitlines()), first.stdout


def test_what_cannot_be_scored_is_refused_in_one_line(tmp_path: Path) -> None:
    text = str(text_file(tmp_path / "a.txt", TEXT))
    for file, why in (("curve.jpg", "ends with .png or .svg"), ("no/curve.svg", "there is no folder")):
        check_refused(run_here("score", text, "-m", str(TINY), "-o", str(tmp_path / file)), 2, why)
    check_refused(run_here("score", "-m", str(TINY)), 2, "no documents")
    Image.new("RGB", (4, 4)).save(tmp_path / "c.png")
    check_refused(run_here("score", str(tmp_path / "c.png"), "-m", str(TINY)), 2, "nothing to read")
