"""Answers of a model that knows nothing keep to a schema: greedy and sampled, with drafts and without."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from l4ctx.checkpoint.generation_config import Sampling
from l4ctx.checkpoint.tokenizer import Tokenizer
from l4ctx.errors import RequestError
from l4ctx.run.response_format import ResponseFormat, read_format
from support.cli_runner import TINY, check_refused, fact_document, question, run_here, text_file
from support.drafting import Chain, Prompted
from support.tokenizer_fixtures import toy_tokenizer_folder

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "a long one"]}, "minItems": 1, "maxItems": 3},
        "inner": {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"ok": {"type": "boolean"}},
                                               "required": ["ok"], "additionalProperties": False}]},
        "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    },
    "required": ["name", "age", "tags", "inner", "code"],
    "additionalProperties": False,
}  # fmt: skip


def check(answer: Any) -> None:
    """Against SCHEMA, by hand."""
    assert list(answer) == ["name", "age", "tags", "inner", "code"]
    assert isinstance(answer["name"], str) and len(answer["name"]) <= 12
    assert type(answer["age"]) is int and 0 <= answer["age"] <= 150
    assert 1 <= len(answer["tags"]) <= 3 and set(answer["tags"]) <= {"a", "b", "a long one"}
    assert answer["inner"] is None or (list(answer["inner"]) == ["ok"] and type(answer["inner"]["ok"]) is bool)
    assert re.fullmatch(r"[A-Z]{2}-[0-9]{3}", answer["code"])


class Random:
    """A model whose logits are random, and the answers that it gives."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_folder(toy_tokenizer_folder(folder))
        stop = self.tokenizer.special_id("<|eot|>")
        assert stop is not None
        self.stop_tokens = frozenset({stop})
        self.vocabulary = stop + 7  # embeddings without a token among them
        generator = torch.Generator().manual_seed(1)
        self.logits = 3 * torch.randn(self.vocabulary, self.vocabulary, generator=generator)
        self.format = ResponseFormat(json.dumps(SCHEMA), self.tokenizer, self.vocabulary, self.stop_tokens)

    def answer(self, sampling: Sampling, drafts: Prompted | None = None, most: int = 400) -> tuple[list[int], str]:
        chain = Chain(self.logits)
        return chain.answer(
            5,
            drafts,
            max_new_tokens=most,
            stop_tokens=self.stop_tokens,
            sampling=sampling,
            constraint=self.format.answer(),
        )

    def check(self, number: int) -> None:
        sampling = Sampling(temperature=0.2 + number % 7, top_p=(1.0, 0.9)[number % 2], top_k=number % 3, seed=number)
        ids, reason = self.answer(sampling)
        assert reason == "stop"
        check(json.loads(self.tokenizer.decode(ids)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Random:
    return Random(tmp_path_factory.mktemp("format"))


def test_sampled_answers_keep_to_the_schema(model: Random) -> None:
    for number in range(25):
        model.check(number)


@pytest.mark.soak
def test_a_thousand_sampled_answers_keep_to_the_schema(model: Random) -> None:
    for number in range(1000):
        model.check(number)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("wrong", [0.0, 0.4, 1.0])
def test_drafts_obey_the_schema_and_change_nothing(model: Random, temperature: float, wrong: float) -> None:
    sampling = Sampling(temperature=temperature, seed=3)
    alone, reason = model.answer(sampling)
    drafts = Prompted(alone, wrong, 5, model.vocabulary)
    assert model.answer(sampling, drafts) == (alone, reason) and drafts.proposed > 0
    check(json.loads(model.tokenizer.decode(alone)))


def test_an_answer_that_is_cut_says_so(model: Random) -> None:
    assert model.answer(Sampling(), most=3)[1] == "length"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    text_file(tmp_path / "a.md", fact_document("a"))
    text_file(tmp_path / "q.txt", f"{question('a')}\n" * 2)
    (tmp_path / "s.json").write_text(json.dumps(SCHEMA))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("L4CTX_MODEL", str(TINY))
    return tmp_path


def test_ask_keeps_answers_to_a_schema(place: Path) -> None:
    how = ["--response-format", "s.json", "--temperature", "1", "--seed", "4"]
    check(json.loads(run_here("ask", question("a"), "a.md", *how).stdout))
    lines = run_here("ask", "--questions", "q.txt", "a.md", *how).stdout.splitlines()
    for line in lines:
        check(json.loads(json.loads(line)["answer"]))
    cut = run_here("ask", question("a"), "a.md", *how, "--max-new-tokens", "3")
    assert cut.code == 6 and "before it was whole (--response-format)" in cut.stderr and cut.stdout.startswith("{")
    reported = json.loads(run_here("ask", question("a"), "a.md", *how, "--max-new-tokens", "3", "--json").stdout)
    assert reported["stop_reason"] == "length" and reported["error"]["code"] == 6


def test_of_many_answers_those_that_are_cut_are_not_kept_and_end_the_run_with_a_code(place: Path) -> None:
    (place / "q.txt").write_text(
        '{"id": "cut", "question": "Why?", "max_new_tokens": 3}\n{"id": "whole", "question": "?"}'
    )
    how = ["--questions", "q.txt", "a.md", "--response-format", "s.json", "--temperature", "1", "--seed", "4", "--json"]
    asked = run_here("ask", *how, "--resume-answers", "out.jsonl")
    printed = [json.loads(line) for line in asked.stdout.splitlines()]
    assert asked.code == 6 and "1 of 2 answers ended before being whole (--response-format" in asked.stderr
    assert {line["id"]: line["stop_reason"] for line in printed[:2]} == {"cut": "length", "whole": "stop"}
    assert len(printed) == 3 and printed[2]["error"]["code"] == 6 and printed[2]["answers"] == 2
    assert [json.loads(line)["id"] for line in Path("out.jsonl").read_text().splitlines()] == ["whole"]


def test_a_format_that_cannot_be_used_is_refused_at_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "bad.json").write_text('{"type": 5}')
    (place / "list.json").write_text("[]")
    (place / "text.json").write_text("text")
    for name, reason in {
        "none.json": "No such file or directory; give json, or a file with a schema",
        "bad.json": "type must be a string or array of strings",
        "list.json": "not a JSON schema, which is an object",
        "text.json": "not JSON: ",
    }.items():
        result = run_here("ask", question("a"), "a.md", "--response-format", name)
        check_refused(result, 2, f"--response-format {name}: {reason}")
    check_refused(run_here("ask", "?", "a.md", "--response-format", "json", "--cite"), 2, "--cite asks for quotations")
    assert json.loads(read_format("json")) == {"type": "object"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"l4ctx\[json\]"):
        read_format("json")
