"""Readers of what the user writes: questions, answers of an earlier run, arguments; and what is given as the model."""

from __future__ import annotations

import functools
import io
import json
import random
from collections.abc import Mapping
from pathlib import Path

from fuzz.inputs import Failure, Files, Reader, one_of
from fuzz.mutation import mutate_json, mutate_text
from l4ctx.errors import CODES_OF_ERRORS, INPUT, MEMORY, TOO_LONG

QUESTIONS, ANSWERS, ARGUMENT = "questions.jsonl", "answers.jsonl", "arguments"
MOST_MESSAGE = 10_000  # characters: what a person can still read


@functools.cache
def questions() -> Mapping[str, Files]:
    records = [
        {"id": "a", "question": "Where?", "max_new_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 1},
        {"question": "Who is \u00fc\u2028?"},
        {"id": 7, "question": "When?"},
    ]
    lines = "\n".join(json.dumps(record) for record in records).encode()
    return {"objects": {QUESTIONS: lines}, "lines": {QUESTIONS: "Where?\n\n  Wo ist Köln? \r\nWhen?\n".encode()}}


def mutate_lines(draw: random.Random, content: bytes) -> bytes:
    """One of the lines as JSON, or the text."""
    lines = content.split(b"\n")
    if draw.randrange(3) == 0:
        return mutate_text(draw, content)
    number = draw.randrange(len(lines))
    return b"\n".join([*lines[:number], mutate_json(draw, lines[number]), *lines[number + 1 :]])


def read_questions(folder: Path) -> None:
    from l4ctx.run.questions import read_questions as read

    read(io.BytesIO((folder / QUESTIONS).read_bytes()), "questions")


@functools.cache
def answers() -> Mapping[str, Files]:
    lines = [json.dumps({"id": i, "question": q, "answer": "There."}) for i, q in ((1, "Where?"), ("b", "When?"))]
    whole = "\n".join(lines).encode()
    return {"whole": {ANSWERS: whole + b"\n"}, "unfinished": {ANSWERS: whole + b'\n{"id": "c", "ques'}}


def read_answers(folder: Path) -> None:
    """On a copy: the reader cuts off an unfinished line."""
    from l4ctx.run.answers_file import AnswersFile
    from l4ctx.run.questions import Question

    copy = folder / "copy"
    copy.write_bytes((folder / ANSWERS).read_bytes())
    AnswersFile(copy, [Question(1, 1, "Where?"), Question(2, "b", "When?")]).close()


@functools.cache
def arguments() -> Mapping[str, Files]:
    found = ("8GiB", "500MB", "1.5G", "8388608", "128k", "10M", "128Ki", "4096", "1_000", "int4", "int8+attention",
             "utf-8", "windows-1252", "gbk", "cuda:0", "cpu", "0.5")  # fmt: skip
    return {text: {ARGUMENT: text.encode()} for text in found}


ARGUMENT_PIECES = (
    b"9" * 400, b"9" * 5000, b".", b"-", b"+", b"e", b"_", b" ", b"i", b"GiB", b"\0", b"\xff", b"0" * 1000, b"k",
    "٣".encode(), "²".encode(), b"attention", b"1e999", b"\n", b"rot13", b"idna", b"unicode_escape",
)  # fmt: skip


def mutate_argument(draw: random.Random, content: bytes) -> bytes:
    return mutate_text(draw, content, ARGUMENT_PIECES)


def read_argument(folder: Path) -> None:
    """The parsers raise ValueError, which the command line shows."""
    from l4ctx.documents.text import check_encoding, decode, is_text
    from l4ctx.formatting import human_bytes, parse_operations, parse_rate, parse_size, parse_tokens
    from model.quantization.choice import Quantization

    text = (folder / ARGUMENT).read_bytes().decode("utf-8", "surrogateescape")
    for parse in (parse_size, parse_tokens, parse_rate, parse_operations, Quantization.parse):
        try:
            value = parse(text)
        except ValueError:
            continue
        if isinstance(value, int) and value < 2**63:
            human_bytes(value)
    try:
        codec = check_encoding(text)
    except ValueError:
        return
    is_text("Köln, 日本".encode(), codec)
    decode("Köln, 日本".encode(), codec)


@functools.cache
def commands() -> Mapping[str, Files]:
    """Options of `plan`, one argument a line; the model is the folder."""
    from fuzz.checkpoint_readers import configurations

    config = configurations()["flat, default"]
    found = (
        "--tokens\n10M\n--kv-dtype\nint8\n--kv-host-memory\n8GiB\n--max-new-tokens\n100",
        "--tokens\n1000\n--prefill-chunk-size\n64\n--weights-memory\n2GiB\n--rate\n100\n--json",
        "--tokens\n0\n--quantize\nint4\n--dtype\nbfloat16\n--device\ncpu",
    )
    return {str(number): config | {ARGUMENT: text.encode()} for number, text in enumerate(found)}


def read_command(folder: Path) -> None:
    """The whole command, in this process: a line on stderr and an exit code."""
    from support.cli_runner import CONTROLS, run_here

    file = folder / ARGUMENT
    text = file.read_bytes().decode("utf-8", "surrogateescape") if file.is_file() else ""
    given = text.replace("\0", "").split("\n")
    done = run_here("plan", "--model", str(folder), *given[:40])
    if done.code not in {0, *CODES_OF_ERRORS} or "Traceback" in done.stderr or CONTROLS.search(done.stderr):
        raise Failure(f"exit code {done.code}", done.stderr)
    if len(done.stderr) > MOST_MESSAGE:
        raise Failure(f"more than {MOST_MESSAGE} characters on standard error", done.stderr[:300])
    does_not_fit = done.code in (TOO_LONG, MEMORY)  # which is the answer
    if done.code and not does_not_fit and not done.stderr.startswith("l4ctx: "):
        raise Failure("an error that is not told", repr(done))


@functools.cache
def folders() -> Mapping[str, Files]:
    """What people give for the model that is none."""
    adapter = json.dumps({"base_model_name_or_path": "meta/x", "peft_type": "LORA"}).encode()
    return {
        "adapter": {"adapter_config.json": adapter},
        "inner": {"a/config.json": b"{}", "b/config.json": b"{}"},
        "hub": {"models--meta--x/snapshots/0/config.json": b"{}", "models--meta--x/refs/main": b"0"},
        "gguf": {"x.gguf": b"GGUF" + bytes(20), "y-00001-of-00002.gguf": b"GGUF" + bytes(20)},
        "pickle": {"pytorch_model.bin": b"PK", "params.json": b"{}"},
        "context": {"manifest.json": b"{}"},
    }


def read_model_folder(folder: Path) -> None:
    from l4ctx.inspection.model_folder import check_model_folder, what_it_is

    for path in (folder, *sorted(folder.rglob("*"))):
        what_it_is(path)
    check_model_folder(folder)


NAMES = (
    "config.json", "manifest.json", "x.gguf", "mmproj-x.gguf", "m.safetensors", "z/config.json", "consolidated.00.pth",
    "a" * 200, "x-00001-of-99999.gguf", "adapter_config.json", "\u202e",
)  # fmt: skip


def mutate_folder(draw: random.Random, files: Files) -> Files:
    """A file changed, gone, or under another name."""
    name = draw.choice(sorted(files)) if files else "x"
    kept = {other: content for other, content in files.items() if other != name}
    match draw.randrange(3):
        case 0:
            return kept | {name: mutate_json(draw, files.get(name, b""))}
        case 1:
            return kept
        case _:
            other = draw.choice(NAMES)
            return kept | {other: files.get(name, b"")}


CODES = frozenset([INPUT])
READERS = (
    Reader("questions", questions, one_of(("jsonl", mutate_lines)), read_questions, CODES, share=100),
    Reader("answers", answers, one_of((ANSWERS, mutate_lines)), read_answers, CODES, share=60),
    Reader("arguments", arguments, one_of((ARGUMENT, mutate_argument)), read_argument, CODES, share=60),
    Reader("command_line", commands, one_of((ARGUMENT, mutate_argument), ("config.json", mutate_json)), read_command,
           CODES, share=1),
    Reader("model_folder", folders, mutate_folder, read_model_folder, CODES | {3}, share=40),
)  # fmt: skip
