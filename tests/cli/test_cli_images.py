"""Images and PDF files among the documents, as a person reads them with the command."""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cache import layout as store_layout
from support import pdf_toys
from support.cli_runner import (
    ANSWER,
    DOCUMENT,
    QUESTION,
    TINY,
    Result,
    changed_checkpoint,
    check_refused,
    run_here,
    text_file,
    text_only_checkpoint,
)
from support.context_toys import block_digests

SUFFIXES = ("bmp", "gif", "jpeg", "png", "tiff", "webp")
TOKENS_PER_TILE = 16


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("L4CTX_MODEL", str(TINY))


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(text_only_checkpoint(tmp_path_factory.mktemp("text")))


def image(size: tuple[int, int] = (60, 40), seed: int = 0) -> Image.Image:
    """Grey, with one noisy corner."""
    made = Image.new("RGB", size, (128, 128, 128))
    made.paste(Image.frombytes("RGB", (8, 8), random.Random(seed).randbytes(192)))
    return made


def write_folder(name: str = "docs") -> Path:
    """A text that has the answer, and an image of every format."""
    folder = Path(name)
    text_file(folder / "a.md", DOCUMENT)
    for number, suffix in enumerate(SUFFIXES):
        image(seed=number).save(folder / f"image.{suffix}")
    return folder


def told(*arguments: str, **options: Any) -> dict[str, Any]:
    result = run_here("ask", QUESTION, *arguments, "--json", **options)
    assert result.code == 0, result
    return json.loads(result.stdout)


def skipped(report: dict[str, Any]) -> dict[str, str]:
    return {entry["path"]: entry["reason"] for entry in report["skipped"]}


def test_every_format_is_a_document_like_any_other() -> None:
    write_folder()
    result = run_here("ask", QUESTION, "docs")
    assert (result.code, result.stdout) == (0, ANSWER)
    assert "7 documents, 6 images, " in result.stderr and "skipped" not in result.stderr
    report = told("docs")
    names = ["docs/a.md", *(f"docs/image.{suffix}" for suffix in SUFFIXES)]
    assert [entry["path"] for entry in report["documents"]] == names
    assert [entry["path"] for entry in report["images"]] == names[1:]
    assert [entry["tokens"] for entry in report["images"]] == [TOKENS_PER_TILE + 3] * 6
    assert report["prompt_tokens"] > sum(entry["tokens"] for entry in report["documents"])


def test_large_images_are_tiles_and_count_into_plan_and_prompt() -> None:
    text_file(Path("a.md"), DOCUMENT)
    image((400, 300)).save("large.png")  # three rows of four tiles, and the whole
    report = told("a.md", "large.png")
    assert report["images"] == [{"path": "large.png", "tokens": 12 * (TOKENS_PER_TILE + 1) + TOKENS_PER_TILE + 3}]
    planned = json.loads(run_here("plan", "a.md", "large.png", "--json").stdout)
    assert planned["documents"] == report["documents"]
    alone = json.loads(run_here("plan", "a.md", "--json").stdout)
    assert planned["plan"]["weights"] > alone["plan"]["weights"]
    assert report["memory"]["weights"] == planned["plan"]["weights"] and planned["fits"]
    rate = ("--rate", "1000", "--json")
    seconds = [
        json.loads(run_here("plan", *paths, *rate).stdout)["seconds"] for paths in (("a.md",), ("a.md", "large.png"))
    ]
    assert seconds[1] > seconds[0]


def test_no_images_leaves_them_out_and_says_so() -> None:
    write_folder()
    result = run_here("ask", QUESTION, "docs", "--no-images")
    assert (result.code, result.stdout) == (0, ANSWER)
    assert "skipped docs/image.png: a PNG image; left out by --no-images\n" in result.stderr
    assert result.stderr.count("left out by --no-images") == 6 and "1 document, " in result.stderr
    check_refused(
        run_here("ask", QUESTION, "docs/image.png", "--no-images", "--quiet"),
        2,
        "found nothing to read",
        "left out by --no-images",
    )


def test_a_text_only_checkpoint_says_what_it_does(text_model: str) -> None:
    write_folder()
    result = run_here("ask", QUESTION, "docs", "--model", text_model)
    assert (result.code, result.stdout) == (0, ANSWER)
    assert result.stderr.count("image; the checkpoint reads text alone\n") == 6
    check_refused(
        run_here("ask", QUESTION, "docs", "--pdf", "pages", "--model", text_model),
        2,
        "--pdf pages",
        "the checkpoint reads text alone",
        "--pdf text reads their text",
    )
    check_refused(run_here("ask", QUESTION, "docs", "--pdf", "both", "--no-images"), 2, "left out by --no-images")
    check_refused(run_here("plan", "docs", "--pdf", "some"), 2, "--pdf: 'some' is not one of text, pages, both")


def test_an_image_can_be_piped_in() -> None:
    image().save("image.png")
    result = run_here("ask", QUESTION, stdin=Path("image.png").read_bytes())
    assert result.code == 0 and "1 document, 1 image, " in result.stderr


@pytest.mark.parametrize(("mode", "images"), [("text", 0), ("pages", 2), ("both", 2)])
def test_pages_of_a_pdf(mode: str, images: int) -> None:
    lines = ANSWER.strip().encode()
    Path("report.pdf").write_bytes(
        pdf_toys.pdf(pdf_toys.Page(pdf_toys.text(b"Some words here.")), pdf_toys.Page(pdf_toys.text(lines)))
    )
    report = told("report.pdf", "--pdf", mode)
    assert [entry["path"] for entry in report["documents"]] == ["report.pdf"] and report["skipped"] == []
    assert [entry["path"] for entry in report["images"]] == [f"report.pdf, page {n + 1}" for n in range(images)]
    if mode != "pages":
        assert report["answer"] == ANSWER.strip()


def test_pdf_files_that_cannot_be_read_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    text_file(Path("docs/a.md"), DOCUMENT)
    Path("docs/scan.pdf").write_bytes(pdf_toys.pdf(pdf_toys.SCANNED))
    Path("docs/secret.pdf").write_bytes(pdf_toys.encrypted(b"secret", pdf_toys.Page(pdf_toys.text(b"x"))))
    Path("docs/torn.pdf").write_bytes(b"%PDF-1.7\n\0\1")
    found = skipped(told("docs"))
    assert found["docs/scan.pdf"] == "a PDF without text (scanned?); --pdf pages reads its pages as images"
    assert "password" in found["docs/secret.pdf"] and "broken" in found["docs/torn.pdf"]
    assert [entry["path"] for entry in told("docs", "--pdf", "pages")["images"]] == ["docs/scan.pdf, page 1"]
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    assert skipped(told("docs")) == dict.fromkeys(
        ["docs/scan.pdf", "docs/secret.pdf", "docs/torn.pdf"],
        'a PDF document; pip install "l4ctx[pdf]" adds what reads it',
    )


def test_hostile_files_are_named_and_the_rest_is_read() -> None:
    """Sixty mutated images and twenty-odd broken PDF files."""
    text_file(Path("docs/a.md"), DOCUMENT)
    chance, names = random.Random(7), []
    for number in range(60):
        file = Path(f"docs/{number:02d}.{SUFFIXES[number % 6]}")
        image((24, 17), number).save(file)
        raw = bytearray(file.read_bytes())
        if number % 3 == 0:
            del raw[chance.randrange(12, len(raw)) :]
        for _ in range(chance.randrange(1, 9)):
            raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        file.write_bytes(raw)
        names.append(str(file))
    for number, raw in enumerate(pdf_toys.broken(seed=1).values()):
        Path(f"docs/{number}.pdf").write_bytes(raw)
        names.append(f"docs/{number}.pdf")
    result = run_here("ask", QUESTION, "docs", "--json")
    assert result.code == 0 and "Traceback" not in result.stderr
    report = json.loads(result.stdout)
    seen = {entry["path"] for entry in report["documents"]} | skipped(report).keys()
    assert report["answer"] == ANSWER.strip() and seen == {"docs/a.md", *names} and len(report["skipped"]) > 40


def test_absurd_sizes() -> None:
    text_file(Path("docs/a.md"), DOCUMENT)
    Image.new("1", (1, 100_000)).save("docs/line.png")
    Image.new("1", (2**21, 1)).save("docs/longer.png")
    report = told("docs")
    assert [entry["path"] for entry in report["images"]] == ["docs/line.png"]
    assert "a side may have 1,048,576 at most" in skipped(report)["docs/longer.png"]


def test_a_saved_context_keeps_images_by_their_digests() -> None:
    """Everything after an image of the same size but different pixels is recomputed."""

    def prefill(context: str = "c") -> Result:
        return run_here("prefill", "docs", "-o", context)

    for number in range(3):
        text_file(Path(f"docs/{number}0.md"), f"{DOCUMENT if number == 1 else ''}{'word ' * 3000}\n")
        image(seed=number).save(f"docs/{number}5.png")
    assert prefill().code == 0
    assert run_here("ask", QUESTION, "--context", "c", "--quiet") == Result(0, ANSWER, "")
    spans = {entry["path"]: entry for entry in told("--context", "c")["documents"]}
    assert "are in c already" in prefill().stderr and told("docs", "--context", "c")["reused_tokens"] > 9000
    image(seed=77).save("docs/15.png")
    report = told("docs", "--context", "c")
    before = sum(spans[name]["tokens"] for name in ("docs/00.md", "docs/05.png", "docs/10.md"))
    assert before - 2048 < report["reused_tokens"] <= before + 60 and report["answer"] == ANSWER.strip()
    text_file(Path("docs/05.md"), "New.\n")
    assert prefill().code == 0
    assert run_here("ask", QUESTION, "--context", "c", "--quiet") == Result(0, ANSWER, "")


def test_a_context_tells_its_images() -> None:
    text_file(Path("docs/a.md"), DOCUMENT)
    image().save("docs/b.png")
    assert run_here("prefill", "docs", "-o", "c").code == 0
    kept = told("--context", "c")
    assert kept["images"] == [{"path": "docs/b.png", "tokens": TOKENS_PER_TILE + 3}]
    again = told("docs", "--context", "c")
    assert again["images"] == kept["images"] and again["reused_tokens"] == kept["reused_tokens"]
    assert again["memory"]["weights"] == kept["memory"]["weights"]  # the vision tower is not loaded for nothing


def test_an_image_that_changes_before_it_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says what is kept; the same command resumes there."""
    from l4ctx.run import session

    text_file(Path("docs/a.md"), f"{DOCUMENT}{'word ' * 9000}\n")
    image().save("docs/b.png")

    def change_then(*given: Any) -> session.Session:
        image(seed=9).save("docs/b.png")
        return load(*given)

    load = session.load
    with monkeypatch.context() as patch:
        patch.setattr(session, "load", change_then)
        refused = run_here("prefill", "docs", "-o", "c", "--prefill-chunk-size", "2048", "--quiet")
        check_refused(
            refused,
            2,
            "docs/b.png: changed since it was first read; ",
            " tokens are kept in c; the same command resumes there",
        )
        image().save("docs/b.png")
        check_refused(run_here("ask", QUESTION, "docs", "--quiet"), 2, "first read; nothing is kept")
    assert run_here("prefill", "docs", "-o", "c", "--prefill-chunk-size", "2048").code == 0
    assert run_here("ask", QUESTION, "--context", "c", "--quiet") == Result(0, ANSWER, "")


@pytest.mark.parametrize("cut", range(1, 6))
def test_a_reading_that_is_interrupted_amid_images_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    """Blocks of 1024 tokens, whose ends cut tiles; one image has changed when the prefill resumes."""
    import l4ctx.engine.prefill

    monkeypatch.setenv("L4CTX_MODEL", str(changed_checkpoint(tmp_path / "short", attention_chunk_size=512)))
    monkeypatch.setattr(store_layout, "MIN_BLOCK_BYTES", 3 * 2**18)
    monkeypatch.setattr(store_layout, "MIN_SEGMENT_BYTES", 1)
    monkeypatch.setattr(store_layout, "MIN_SEGMENT_TOKENS", 1)
    read = l4ctx.engine.prefill.prefill

    def some(*given: Any, **options: Any) -> Iterator[Any]:
        yield from itertools.islice(read(*given, **options), cut)
        raise KeyboardInterrupt

    for number in range(12):
        image((400, 300), number).save(f"{number:02d}.png")
    paths = [f"{number:02d}.png" for number in range(12)]
    options = ("--prefill-chunk-size", "512", "--quiet")
    with monkeypatch.context() as patch:
        patch.setattr(l4ctx.engine.prefill, "prefill", some)
        assert run_here("prefill", *paths, "-o", "c", *options).code == 130
    if cut % 2:
        image((400, 300), 99).save("03.png")  # its tokens are cut by the end of the first block
    for name in ("c", "whole"):
        assert run_here("prefill", *paths, "-o", name, *options).code == 0
    assert len(block_digests(Path("c"))) == 2 and block_digests(Path("c")) == block_digests(Path("whole"))


def test_a_plan_without_shards_counts_the_tower_by_its_configuration(tmp_path: Path) -> None:
    write_folder()
    bare = changed_checkpoint(tmp_path / "bare")
    for file in bare.glob("*.safetensors*"):
        file.unlink()
    result = run_here("plan", "docs", "--model", str(bare), "--json")
    assert result.code == 0 and "the vision tower's weights are counted by config.json" in result.stderr
    whole = json.loads(run_here("plan", "docs", "--json").stdout)
    assert json.loads(result.stdout)["plan"]["weights"] == whole["plan"]["weights"]


def test_images_are_in_the_plan_and_a_remedy_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    text_file(Path("a.md"), DOCUMENT)
    image((3000, 2000)).save("large.png")
    plans = [
        json.loads(run_here("plan", *paths, "--json").stdout)["plan"] for paths in (("a.md",), ("a.md", "large.png"))
    ]
    assert plans[0]["images"] == 0 and plans[1]["images"] >= 16 * 3000 * 2000
    assert plans[1]["needed"] - plans[0]["needed"] >= plans[1]["images"]
    monkeypatch.setattr("l4ctx.run.sizing.available_memory", lambda: plans[0]["needed"] + (280 << 20))
    planned = run_here("plan", "a.md", "large.png", "--json")
    assert planned.code == 5
    assert any(
        remedy.startswith("--no-images makes it fit (large.png takes ")
        for remedy in json.loads(planned.stdout)["remedies"]
    )
    refused = run_here("ask", QUESTION, "a.md", "large.png", "--quiet")
    check_refused(refused, 5, "--no-images makes it fit (large.png takes ", "scaled down it takes less")


def test_a_vision_part_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    """Text is read all the same."""
    write_folder()
    config = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    odd = str(changed_checkpoint(tmp_path / "odd", vision_config=config["vision_config"] | {"hidden_act": "relu"}))
    check_refused(
        run_here("ask", QUESTION, "docs", "--quiet", "--model", odd),
        3,
        "vision_config.hidden_act: 'relu'",
        "--no-images reads the text alone",
    )
    assert run_here("ask", QUESTION, "docs/a.md", "--quiet", "--model", odd) == Result(0, ANSWER, "")
    index = json.loads((TINY / "model.safetensors.index.json").read_text(encoding="utf-8"))
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name.startswith("language")}
    blind = changed_checkpoint(tmp_path / "blind")
    (blind / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    check_refused(
        run_here("ask", QUESTION, "docs", "--quiet", "--model", str(blind)), 3, "--no-images reads the text alone"
    )
    assert run_here("ask", QUESTION, "docs/a.md", "--quiet", "--model", str(blind)) == Result(0, ANSWER, "")
    (blind / "preprocessor_config.json").write_text('{"size": {"height": 5, "width": 5}}', encoding="utf-8")
    (blind / "model.safetensors.index.json").write_bytes((TINY / "model.safetensors.index.json").read_bytes())
    check_refused(run_here("ask", QUESTION, "docs", "--quiet", "--model", str(blind)), 3, "preprocessor_config.json")


def test_many_questions_about_images() -> None:
    """Read now and from a context, with drafts and without: each answer is that of the question alone."""
    write_folder()
    other = "What is in the image?"
    text_file(Path("questions.txt"), f"{QUESTION}\n{other}\n{QUESTION}\n")
    limit = ("--max-new-tokens", "24", "--quiet")
    alone = [run_here("ask", asked, "docs", *limit).stdout for asked in (QUESTION, other)]
    assert alone[0] == ANSWER
    assert run_here("prefill", "docs", "-o", "c", "--quiet").code == 0
    for source in (("docs",), ("--context", "c"), ("docs", "--draft-tokens", "5")):
        result = run_here("ask", "--questions", "questions.txt", *source, "--batch", "2", "--in-order", *limit)
        assert result.code == 0, result
        found = [f"{json.loads(line)['answer']}\n" for line in result.stdout.splitlines()]
        assert found == [alone[0], alone[1], alone[0]]
