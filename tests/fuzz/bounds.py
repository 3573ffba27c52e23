"""Large valid inputs that cost their readers the most, and what they cost: printed as JSON. Run by test_bounds.py.

Each is read in a process of its own at two sizes: so the cost of a byte is told from that of starting.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SIZES = (1 << 17, 1 << 19)  # bytes


def json_lists(size: int) -> dict[str, bytes]:
    """Small lists take the most memory a byte."""
    return {"config.json": b'{"a": [' + b"[]," * (size // 3) + b"0]}"}


def read_config(folder: Path) -> None:
    from fuzz.checkpoint_readers import read_configuration
    from model.errors import ConfigError

    try:
        read_configuration(folder)
    except ConfigError:
        return
    raise AssertionError("it is no configuration")


def vocabulary(size: int) -> dict[str, bytes]:
    from fuzz.checkpoint_readers import tokenizers

    files = dict(tokenizers()["llama"])
    content = json.loads(files["tokenizer.json"])
    vocabulary = content["model"]["vocab"]
    last = max([*vocabulary.values(), *(token["id"] for token in content["added_tokens"])])
    for number in range(size // 16):
        vocabulary[f"{number:08x}"] = last + 1 + number
    return files | {"tokenizer.json": json.dumps(content).encode()}


def read_tokenizer(folder: Path) -> None:
    from l4ctx.checkpoint.tokenizer import Tokenizer

    Tokenizer.from_folder(folder)


def shard(size: int) -> dict[str, bytes]:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"{number:06x}": entry for number in range(size // 68)}).encode()
    return {"model.safetensors": len(header).to_bytes(8, "little") + header}


def read_shard(folder: Path) -> None:
    from model.weights.shards import read_header

    read_header(folder / "model.safetensors")


def gguf_header(size: int) -> dict[str, bytes]:
    """As many tensors as fit: names, of which no table is made, cost less."""
    from support.gguf_headers import ARRAY, STRING, File, key, tensor

    tensors = [tensor(f"{number:06x}", (1,), 32 * number) for number in range(size // 80)]
    words = key("tokenizer.ggml.tokens", ARRAY, (STRING, [f"{number:06x}" for number in range(size // 28)]))
    return {
        "model.gguf": File(
            [key("general.architecture", STRING, "llama"), words], tensors, bytes(32 * len(tensors))
        ).content()
    }


def read_gguf(folder: Path) -> None:
    from model.gguf.header import read_header

    read_header(folder / "model.gguf")


def journal(size: int) -> dict[str, bytes]:
    import hashlib

    chain, lines = b"0" * 16, []
    for _ in range(size // 30):
        record = b'{"type":"x"}'
        chain = hashlib.sha256(chain + record).hexdigest()[:16].encode()
        lines.append(chain + b" " + record + b"\n")
    return {"journal": b"".join(lines)}


def read_journal(folder: Path) -> None:
    from l4ctx.contexts.journal import Journal

    Journal.read(folder / "journal")


def text(size: int) -> dict[str, bytes]:
    """In an encoding that has to be detected."""
    line = "Wo liegt Köln? Über die Brücke, naïve café, façade. ".encode("cp1252")
    return {"document": line * (size // len(line))}


def notebook(size: int) -> dict[str, bytes]:
    cell = {"cell_type": "code", "source": ["a"], "outputs": [{"data": {"a": [[], [], []]}}]}
    return {"document": json.dumps({"cells": [cell] * (size // 90), "nbformat": 4, "metadata": {}}).encode()}


def read_document(folder: Path) -> None:
    from l4ctx.documents.reader import read_documents

    read_documents([folder / "document"], stdin=None)


def patterns(size: int) -> dict[str, bytes]:
    return {".gitignore": b"".join(b"*%d?[a-z]*\n" % number for number in range(size // 16))}


def read_patterns(folder: Path) -> None:
    from l4ctx.documents.exclusion.gitignore import PatternFile

    file = PatternFile((folder / ".gitignore").read_bytes())
    file.ignores(b"docs/" + b"a" * 60, is_folder=False)


def questions(size: int) -> dict[str, bytes]:
    return {"questions": b"".join(b"Why %d?\n" % number for number in range(size // 11))}


def read_questions(folder: Path) -> None:
    from l4ctx.run.questions import read_questions as read

    with (folder / "questions").open("rb") as file:
        read(file, "questions")


def answers(size: int) -> dict[str, bytes]:
    line = b'{"id": %d, "question": "Why?", "answer": ""}\n'
    return {"answers": b"".join(line % number for number in range(size // 48))}


def read_answers(folder: Path) -> None:
    from l4ctx.run.answers_file import AnswersFile
    from l4ctx.run.questions import Question

    AnswersFile(folder / "answers", [Question(n, n, "Why?") for n in range(1000)]).close()


CASES: dict[str, tuple[Callable[[int], dict[str, bytes]], Callable[[Path], None]]] = {
    "JSON of a checkpoint": (json_lists, read_config),
    "tokenizer.json": (vocabulary, read_tokenizer),
    "safetensors header": (shard, read_shard),
    "GGUF header": (gguf_header, read_gguf),
    "journal of a context": (journal, read_journal),
    "text": (text, read_document),
    "notebook": (notebook, read_document),
    ".gitignore": (patterns, read_patterns),
    "questions": (questions, read_questions),
    "answers of an earlier run": (answers, read_answers),
}


def cost(make: Callable[[int], dict[str, bytes]], read: Callable[[Path], None], size: int) -> tuple[int, int, float]:
    """Bytes of the input, bytes of memory that reading took at its peak, and processor seconds."""
    with tempfile.TemporaryDirectory() as place:
        folder, results = Path(place), Path(place) / "results"
        files = make(size)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        total = max(map(len, files.values()))
        files.clear()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                base, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
                read(folder)
                took = time.process_time() - began
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                results.write_text(json.dumps([peak - base << 10, took]), encoding="utf-8")
                code = 0
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        grown, seconds = json.loads(results.read_text(encoding="utf-8"))
        return total, grown, seconds


def main() -> None:
    found = {}
    for name, (make, read) in CASES.items():
        with tempfile.TemporaryDirectory() as place:
            for file, content in make(1 << 12).items():
                (Path(place) / file).write_bytes(content)
            read(Path(place))  # once here, for what it imports
        small, large = (cost(make, read, size) for size in SIZES)
        found[name] = {"small": small, "large": large}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
