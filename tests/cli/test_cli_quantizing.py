"""--quantize as a person uses it: answers, plans, and contexts that only the same kind can be asked about."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.cli_runner import FACTS, TINY, check_refused, question, run_here, text_file

MODEL = ("--model", str(TINY))
DOCUMENT = f"Some words.\nThe access code for the {FACTS['a'][0]} is {FACTS['a'][1]}.\nMore words.\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a document, and contexts of it with and without quantization."""
    folder = tmp_path_factory.mktemp("quantizing")
    document = str(text_file(folder / "a.md", DOCUMENT))
    for name, options in (("plain", ()), ("int8", ("--quantize", "int8"))):
        result = run_here("prefill", document, "-o", str(folder / name), *MODEL, *options)
        assert result.code == 0, result
    return folder


@pytest.mark.parametrize("kind", ["int8", "fp8", "int8+attention"])
def test_it_answers(place: Path, kind: str) -> None:
    result = run_here("ask", question("a"), str(place / "a.md"), *MODEL, "--quantize", kind, "--json")
    assert result.code == 0 and FACTS["a"][1] in json.loads(result.stdout)["answer"], result


def test_a_context_is_asked_about_with_what_it_was_made_with(place: Path) -> None:
    for name, same in (("int8", "int8"), ("plain", "none")):
        for options in ((), ("--quantize", same)):
            result = run_here("ask", question("a"), "--context", str(place / name), *MODEL, *options)
            assert result.code == 0 and FACTS["a"][1] in result.stdout, result
    made = json.loads((place / "int8" / "manifest.json").read_text())["made_with"]
    assert made["quantize"] == "int8"


@pytest.mark.parametrize(("name", "mine", "other"), [("int8", "int8", "none"), ("plain", "none", "int4")])
def test_a_context_of_another_kind_is_refused(place: Path, name: str, mine: str, other: str) -> None:
    context = str(place / name)
    for command in (
        ("ask", question("a"), "--context", context),
        ("prefill", str(place / "a.md"), "-o", context),
    ):
        check_refused(run_here(*command, *MODEL, "--quantize", other), 7, f"made with --quantize {mine}, not {other}")


def test_the_plan_counts_quantized_weights(place: Path) -> None:
    def weights(*options: str) -> int:
        result = run_here("plan", *options, *MODEL, "--dtype", "bfloat16", "--json")
        assert result.code == 0, result
        return int(json.loads(result.stdout)["plan"]["weights"])

    for what in (("--tokens", "4000"), (str(place / "a.md"),)):
        assert weights(*what, "--quantize", "int4+attention") < weights(*what, "--quantize", "int8") < weights(*what)


def test_other_kinds_are_refused() -> None:
    check_refused(run_here("ask", "hi", "--no-documents", *MODEL, "--quantize", "int5"), 2, "'int5' is not one of int8")
