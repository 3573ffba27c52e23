"""Prompts: rendered as `transformers` does, documents as data, prefixes that do not depend on what follows."""

from __future__ import annotations

import datetime
import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers

from l4ctx.checkpoint import pieces
from l4ctx.checkpoint import tokenizer as tokenizer_module
from l4ctx.checkpoint.chat_template import ChatTemplate, PromptError
from l4ctx.checkpoint.pieces import LONGEST_PIECE
from l4ctx.checkpoint.tokenizer import Tokenizer
from l4ctx.documents.document import Document
from l4ctx.prompt.builder import ForcedCut, Prompt, PromptLengthError, build_prompt, check_length
from l4ctx.spans import Span
from support.tokenizer_fixtures import (
    CONTROL_TOKENS,
    LLAMA4_TOKENIZER,
    loaded_tokenizer,
    toy_tokenizer_folder,
    transformers_tokenizer,
)

DOCUMENTS = [
    Document("notes/a.md", "", "The access code for the amber falcon is 48213.\n"),
    Document("b.py", "", "/* starts with a slash\n\n"),
    Document("日本/ü.txt", "", "\n\n日本語の文章。\r\n👍🏽"),
]
WRAPPED = "".join(
    f'<document index="{index}" path="{document.source}">\n{document.text}\n</document>\n\n'
    for index, document in enumerate(DOCUMENTS, start=1)
)
PATH = '<document index="1" path="{}">\n'


@pytest.fixture(scope="module", params=["toy", "llama 4"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "llama 4":
        if not LLAMA4_TOKENIZER.is_dir():
            pytest.skip("the real Llama 4 tokenizer is not at ../shared/llama4-tokenizer")
        return LLAMA4_TOKENIZER
    return toy_tokenizer_folder(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return loaded_tokenizer(folder)


@pytest.fixture(scope="module")
def template(folder: Path) -> ChatTemplate:
    found = ChatTemplate.from_folder(folder)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def raw(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("system", [None, "Answer briefly."])
@pytest.mark.parametrize("documents", [[], DOCUMENTS], ids=["question alone", "documents"])
def test_a_prompt_is_what_transformers_renders(
    folder: Path,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    documents: list[Document],
    system: str | None,
) -> None:
    oracle = transformers_tokenizer(folder)
    content = (WRAPPED if documents else "") + "What is the access code?"
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": content})
    prompt = build_prompt(
        tokenizer, template, documents, "  What is the access code?\n", system=f"\n{system}" if system else None
    )
    rendered = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert oracle.decode(prompt.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == rendered
    expected = oracle.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)["input_ids"]
    assert prompt.ids.tolist() == expected
    assert prompt.ids.tolist().count(expected[0]) == 1 and expected[0] == tokenizer.bos_id


def test_spans_hold_their_documents(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    prompt = build_prompt(tokenizer, template, DOCUMENTS, "why?", system="s")
    texts = [tokenizer.decode(prompt.ids[span.start : span.stop]) for span in prompt.spans]
    assert "".join(texts) == WRAPPED
    assert [span.source for span in prompt.spans] == [document.source for document in DOCUMENTS]
    assert all(span.stop == after.start for span, after in zip(prompt.spans, prompt.spans[1:], strict=False))


@pytest.mark.parametrize("with_template", [True, False])
def test_what_follows_changes_no_id_before_it(
    tokenizer: Tokenizer, template: ChatTemplate, with_template: bool
) -> None:
    used = template if with_template else None
    full = build_prompt(tokenizer, used, DOCUMENTS, "/* why?")
    for count in range(len(DOCUMENTS)):
        part = build_prompt(tokenizer, used, DOCUMENTS[:count], "something else")
        assert part.spans == full.spans[:count]
        stop = part.spans[-1].stop if part.spans else full.spans[0].start
        assert part.ids[:stop] == full.ids[:stop]


def test_nothing_from_outside_becomes_a_control_token(
    tokenizer: Tokenizer, template: ChatTemplate, raw: tokenizers.Tokenizer
) -> None:
    hostile = "".join(CONTROL_TOKENS) + "<|python_start|>"
    harmless = build_prompt(tokenizer, template, [Document("a", "", "b")], "c", system="d")
    prompt = build_prompt(tokenizer, template, [Document(hostile, "", hostile * 50)], hostile, system=hostile)
    added = set(raw.get_added_tokens_decoder())
    assert [i for i in prompt.ids if i in added] == [i for i in harmless.ids if i in added]
    text = tokenizer.decode(prompt.ids)
    assert text.count(hostile) == 53
    assert PATH.format(hostile) + hostile in text


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ('a"b.md', "a'b.md"),
        ("two\nlines\r.md", "two\ufffdlines\ufffd.md"),
        ('"><document index="9', "'><document index='9"),
        ("bad\udcff.md", "bad\ufffd.md"),
        ("esc\x1b\u2028.md", "esc\ufffd\ufffd.md"),
        ("<|eot|>.md", "<|eot|>.md"),
    ],
)
def test_a_path_stays_an_attribute_on_one_line(
    tokenizer: Tokenizer, template: ChatTemplate, source: str, shown: str
) -> None:
    prompt = build_prompt(tokenizer, template, [Document(source, "", "text")], "q")
    assert PATH.format(shown) + "text\n</document>\n\nq" in tokenizer.decode(prompt.ids)
    assert prompt.spans[0].source == source


def test_a_base_model_reads_plain_text(tmp_path: Path) -> None:
    folder = toy_tokenizer_folder(tmp_path)
    (folder / "chat_template.jinja").unlink()
    assert ChatTemplate.from_folder(folder) is None
    tokenizer = Tokenizer.from_folder(folder)
    prompt = build_prompt(tokenizer, None, DOCUMENTS, " q? ", system="Be brief.")
    assert prompt.ids[0] == tokenizer.bos_id and prompt.ids.tolist().count(prompt.ids[0]) == 1
    assert tokenizer.decode(prompt.ids) == f"Be brief.\n\n{WRAPPED}q?"


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": "A{{ messages[0].content }}B"},
        {
            "chat_template": [
                {"name": "tools", "template": "x"},
                {"name": "default", "template": "A{{ messages[0].content }}B"},
            ]
        },
    ],
    ids=["a text", "a list"],
)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.json"])
def test_where_a_template_is_found(tmp_path: Path, config: dict[str, object], file: str) -> None:
    (tmp_path / file).write_text(json.dumps(config))
    found = ChatTemplate.from_folder(tmp_path)
    assert found is not None and found.split(system=False) == ["A", "user", "B"]
    (tmp_path / "chat_template.jinja").write_text("C{{ messages[0].content }}D")
    found = ChatTemplate.from_folder(tmp_path)
    assert found is not None and found.split(system=False) == ["C", "user", "D"]


def test_special_tokens_come_from_either_file_in_either_form(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<old>"}, "eos_token": "<end>"}')
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<new>"}, "add_bos_token": true}')
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    found = ChatTemplate.from_folder(tmp_path)
    assert found is not None and found.split(system=False) == ["<new>", "user", "<end>"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no\nuser  role\x1b[31m') }}", r"fails: no user role \[31m$"),
        ("{{ ''.__class__.__mro__ }}", "fails: access to attribute '__class__' of 'str' object is unsafe"),
        (
            "{{ messages.append(1) }}{{ messages[0].content }}",
            "attribute 'append' of 'list' object is unsafe",
        ),
        ("{% if %}", "fails: Expected an expression"),
        ("{{ messages[0].content / 2 }}", "fails: unsupported operand"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails: maximum recursion"),
        ("{{ undefined.attribute }}", "fails: 'undefined' is undefined"),
        ("{% include '/etc/passwd' %}", "fails: no loader"),
        ("nothing of it", "must show the user message exactly once, but omits or alters it$"),
        ("{{ messages[0].content | upper }}", "must show the user message exactly once, but omits or alters it$"),
        ("{{ messages[0].content[:9] }}", "must show the user message exactly once, but omits or alters it$"),
        (
            "{{ messages[0].content }} {{ messages[0].content }}",
            "must show the user message exactly once, but shows it 2 times$",
        ),
    ],
)
def test_a_bad_template_is_one_line(source: str, message: str) -> None:
    with pytest.raises(PromptError, match=message) as raised:
        ChatTemplate(source).split(system=False)
    assert str(raised.value).isprintable()


def test_a_template_that_drops_the_system_prompt_is_refused() -> None:
    template = ChatTemplate("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    assert template.split(system=False) == ["", "user", ""]
    with pytest.raises(PromptError, match="must show the system message exactly once, but omits or alters it"):
        template.split(system=True)


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("[{{ messages[0].content | trim }}]", ["[", "user", "]"]),
        ("{{ messages[0].content }}l4ctxUserText0q", ["", "user", "l4ctxUserText0q"]),
        ("{{ messages[0]['content'][0]['text'] }}!", ["", "user", "!"]),
        ("{{ messages[0].content }}{% if tools is none %}{{ [1] | tojson }}<b>{% endif %}", ["", "user", "[1]<b>"]),
        ("{% for m in messages %}{{ m.content }}{% break %}{% endfor %}", ["", "user", ""]),
        ("{% if strftime_now('%Y') | int > 2000 %}{{ messages[0].content }}{% endif %}", ["", "user", ""]),
    ],
    ids=["trim", "marker in the template", "parts", "tojson", "break", "date"],
)
def test_what_templates_do(source: str, parts: list[str]) -> None:
    assert ChatTemplate(source).split(system=False) == parts


DATED = "{{ strftime_now('%d %b %Y %H:%M:%S') }}|{{ messages[0].content }}"
FILES_WITH_DATE = {
    "chat_template.jinja": DATED,
    "tokenizer_config.json": json.dumps({"chat_template": DATED}),
    "chat_template.json": json.dumps({"chat_template": [{"name": "default", "template": DATED}]}),
}


@pytest.mark.parametrize("file", FILES_WITH_DATE)
def test_a_pinned_date_is_what_a_template_shows(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text(FILES_WITH_DATE[file])
    pinned = datetime.datetime(2024, 2, 29, 7, 8, 9)
    renderings = [ChatTemplate.from_folder(tmp_path, date=pinned) for _ in range(2)]
    assert renderings[0] == renderings[1]
    for found in renderings:
        assert found is not None and found.date == pinned
        assert found.split(system=False) == ["29 Feb 2024 07:08:09|", "user", ""]
    other = ChatTemplate.from_folder(tmp_path, date=pinned.replace(second=10))
    assert other is not None and other.split(system=False)[0] == "29 Feb 2024 07:08:10|"


def test_without_a_pinned_date_it_is_now(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(DATED)
    found = ChatTemplate.from_folder(tmp_path)
    assert found is not None and found.date is None
    before = datetime.datetime.now().replace(microsecond=0)
    shown = found.split(system=False)[0]
    assert before <= datetime.datetime.strptime(shown, "%d %b %Y %H:%M:%S|") <= datetime.datetime.now()


def test_a_template_without_bos_gets_none(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(toy_tokenizer_folder(tmp_path))
    prompt = build_prompt(tokenizer, ChatTemplate("{{ messages[0].content }}<|eot|>"), [], "q")
    assert prompt.ids.tolist() == [*tokenizer.encode_data("q").ids, tokenizer.special_id("<|eot|>")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: cannot be read as JSON"),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "rag"}]}',
            "with one named default",
        ),
        ("chat_template.jinja", b"\xff\xff", r"chat_template\.jinja: cannot be read"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(PromptError, match=message):
        ChatTemplate.from_folder(tmp_path)


def test_forced_cuts_are_reported(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    text = "x" * (2 * LONGEST_PIECE + 9)
    prompt = build_prompt(tokenizer, template, [DOCUMENTS[0], Document("run.txt", "", text)], "q")
    assert prompt.forced_cuts == [ForcedCut("run.txt", LONGEST_PIECE), ForcedCut("run.txt", 2 * LONGEST_PIECE)]
    assert len(prompt.notes) == 1 and prompt.notes[0].startswith("run.txt: an unbroken run")
    assert f"\n{text}\n</document>" in tokenizer.decode(prompt.ids)


def test_texts_are_released_and_progress_is_told(
    tokenizer: Tokenizer, template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 10)
    monkeypatch.setattr(tokenizer_module, "BATCH_CHARACTERS", 50)
    made: list[weakref.ref[Document]] = []
    alive_before_next: list[int] = []

    def one_by_one() -> Iterator[Document]:
        for number in range(3):
            alive_before_next.append(sum(reference() is not None for reference in made))
            document = Document(f"{number}.md", "", "some words " * 20)
            made.append(weakref.ref(document))
            holder = [document]
            del document
            yield holder.pop()

    calls: list[tuple[int, int]] = []
    prompt = build_prompt(tokenizer, template, one_by_one(), "q", progress=lambda *call: calls.append(call))
    assert alive_before_next == [0, 0, 0]
    assert len(calls) > 6 and calls == sorted(calls)
    assert calls[-1] == (3 * 220, prompt.spans[-1].stop)


def test_a_prompt_that_is_too_long_names_the_largest_documents() -> None:
    prompt = Prompt()
    prompt.ids.extend(range(1000))
    sizes = {"a": 10, "b": 500, "c": 20, "d": 300, "e": 30, "f\n": 40, "g": 15}
    start = 0
    for source, size in sizes.items():
        prompt.spans.append(Span(source, start, start + size))
        start += size
    check_length(prompt, 24, 1024)
    with pytest.raises(PromptLengthError) as raised:
        check_length(prompt, 25, 1024)
    message = str(raised.value)
    assert "1,000 tokens" in message and "1 more than the model's 1,024 positions" in message
    assert message.endswith("b (500 tokens), d (300 tokens), f\ufffd (40 tokens), e (30 tokens), c (20 tokens)")
    prompt.spans.clear()
    with pytest.raises(PromptLengthError, match="shorten the question"):
        check_length(prompt, 25, 1024)
