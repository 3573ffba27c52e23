"""Prompts without a chat template, with tools in it, and with a template of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from l4ctx.checkpoint.chat_template import ChatTemplate
from l4ctx.checkpoint.tokenizer import Tokenizer
from l4ctx.documents.document import Document
from l4ctx.prompt.builder import build_prompt
from l4ctx.prompt.wrapping import PromptTemplateError, Wrapping, wrapping
from support.cli_runner import TINY, check_refused, fact_document, question, run_here, text_file
from support.tokenizer_fixtures import toy_tokenizer_folder

OWN = "{% for d in documents %}## {{ d.index }}: {{ d.name }}\n{{ d.text }}\n{% endfor %}Q: {{ question }}\nA:"
DOCUMENTS = [Document("a.md", "1", "First {{ question }} text."), Document("l4ctxText1z", "2", "Second <|eot|> text.")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(toy_tokenizer_folder(tmp_path_factory.mktemp("tokenizer")))


def test_documents_and_question_can_stand_as_they_are(tokenizer: Tokenizer) -> None:
    prompt = build_prompt(tokenizer, None, DOCUMENTS, " why? ", wrapping=Wrapping.none(2))
    assert tokenizer.decode(prompt.ids) == "First {{ question }} text.Second <|eot|> text. why? "
    assert prompt.ids[0] == tokenizer.bos_id and [span.start for span in prompt.spans] == [1, prompt.spans[0].stop]


def test_a_template_of_ones_own_wraps_them_and_spans_are_known(tokenizer: Tokenizer) -> None:
    """What is in documents and names is text to it."""
    names = [document.source for document in DOCUMENTS]
    prompt = build_prompt(tokenizer, None, DOCUMENTS, "why?", wrapping=wrapping(OWN, names))
    first = "## 1: a.md\nFirst {{ question }} text."
    assert tokenizer.decode(prompt.ids) == f"{first}\n## 2: l4ctxText1z\nSecond <|eot|> text.\nQ: why?\nA:"
    assert [tokenizer.decode(prompt.ids[span.start : span.stop]) for span in prompt.spans] == [
        first,
        "\n## 2: l4ctxText1z\nSecond <|eot|> text.",
    ]
    assert tokenizer.decode(prompt.ids[prompt.documents_stop :]) == "\nQ: why?\nA:"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ question }}", "it shows 1 of these 2 texts"),
        ("{{ question }}{{ documents[0].text }}", "in another order"),
        ("{{ documents[0].text }}{{ documents[0].text }}{{ question }}", "it shows 3 of these 2 texts"),
        ("{{ documents[0].text", "it fails: "),
        ("{{ question.__class__.__mro__ }}", "it fails: "),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "it fails: "),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(source: str, reason: str) -> None:
    with pytest.raises(PromptTemplateError, match=reason):
        wrapping(source, ["a.md"])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    text_file(tmp_path / "a.md", fact_document("a"))
    text_file(tmp_path / "own.jinja", OWN)
    text_file(tmp_path / "tools.json", json.dumps([{"type": "function", "function": {"name": "look_up"}}]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("L4CTX_MODEL", str(TINY))
    return tmp_path


def test_ask_shows_the_prompt_that_was_asked_for(place: Path) -> None:
    raw = run_here("ask", question("a"), "a.md", "--raw", "--dry-run").stdout
    assert "<document" not in raw and "<|header_start|>" not in raw and raw.rstrip().endswith(question("a"))
    own = run_here("ask", question("a"), "a.md", "--prompt-template", "own.jinja", "--dry-run").stdout
    assert "## 1: a.md\n" in own and f"Q: {question('a')}\nA:" in own and "<|header_start|>" in own


REFUSED = [
    (["--raw", "--tools", "tools.json"], "--raw puts nothing around documents and question, --tools does"),
    (["--raw", "--cite"], "--cite looks documents up by what --raw replaces"),
    (["--raw", "--system", "s"], "--raw: a system prompt needs a template"),
    (["--raw", "--save-context", "c"], "--raw: a saved context is what a chat template made of its documents"),
    (["--tools", "own.jinja"], "--tools own.jinja: not JSON: "),
    (["--tools", "none"], "--tools none: No such file or directory"),
    (["--prompt-template", "none"], "--prompt-template none: No such file or directory"),
]


@pytest.mark.parametrize(("options", "reason"), REFUSED)
def test_what_does_not_go_together_is_refused(place: Path, options: list[str], reason: str) -> None:
    check_refused(run_here("ask", question("a"), "a.md", *options), 2, reason)


def test_tools_are_told_where_the_chat_template_knows_them(place: Path) -> None:
    result = run_here("ask", question("a"), "a.md", "--tools", "tools.json", "--dry-run")
    if "tools" in (TINY / "chat_template.jinja").read_text(encoding="utf-8"):
        assert "look_up" in result.stdout
    else:
        check_refused(result, 2, "--tools: the checkpoint's chat template says nothing of tools")


def test_a_chat_template_renders_tools() -> None:
    template = ChatTemplate("{{ tools[0].name }}: {{ messages[0].content }}.", tools='[{"name": "look_up"}]')
    assert template.split(system=False) == ["look_up: ", "user", "."]
