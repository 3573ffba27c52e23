"""Inputs that failed once: kept as what differs from a valid one, and read again by every run of the tests.

    python tests/fuzz/corpus.py keep READER SEED NUMBER    # an input of a campaign, with as few changes as still fail

A file of the corpus is JSON: the reader, the valid input, the files that differ (text, or base64; null: not there), and
what went wrong.
"""

from __future__ import annotations

import base64
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [each for each in (str(ROOT), str(ROOT / "tests")) if each not in sys.path]

from fuzz.inputs import Failure, Files, Folder, Reader, mutated  # noqa: E402
from fuzz.limits import attempt, prepare, seed_and_draws  # noqa: E402
from fuzz.readers import READERS  # noqa: E402

CORPUS = Path(__file__).resolve().parent / "corpus"
MOST_BYTES = 1 << 16  # of one of its files


def load(file: Path) -> tuple[Reader, Files]:
    kept = json.loads(file.read_text(encoding="utf-8"))
    reader = READERS[kept["reader"]]
    files = dict(reader.seeds()[kept["seed"]])
    for name, content in kept["files"].items():
        if content is None:
            files.pop(name, None)
        else:
            files[name] = _bytes(content)
    return reader, files


def _bytes(content: str | dict[str, Any]) -> bytes:
    if isinstance(content, str):
        return content.encode()
    return base64.b64decode(content["base64"])


def keep(reader: Reader, seed: str, files: Files, why: str) -> Path:
    """Writes an input to the corpus."""
    valid = reader.seeds()[seed]
    differing = {name: files.get(name) for name in sorted({*files, *valid}) if files.get(name) != valid.get(name)}
    kept = {"reader": reader.name, "seed": seed, "why": why, "files": {n: _shown(c) for n, c in differing.items()}}
    text = json.dumps(kept, indent=1, ensure_ascii=False) + "\n"
    if len(text.encode()) > MOST_BYTES:
        raise ValueError(f"{len(text):,} characters are too many for the corpus")
    CORPUS.mkdir(exist_ok=True)
    known = {file.read_text(encoding="utf-8") for file in CORPUS.glob("*.json")}
    number = next(n for n in itertools.count(1) if not (CORPUS / f"{reader.name}-{n:02}.json").exists())
    file = CORPUS / f"{reader.name}-{number:02}.json"
    if text not in known:
        file.write_text(text, encoding="utf-8")
    return file


def _shown(content: bytes | None) -> Any:
    if content is None:
        return None
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(content).decode()}
    return text


def failure_of(reader: Reader, files: Files) -> Failure | None:
    with tempfile.TemporaryDirectory() as place:
        try:
            attempt(reader, Folder(Path(place)), files)
        except Failure as failure:
            return failure
    return None


def smallest(reader: Reader, seed: int, number: int) -> tuple[str, Files, Failure]:
    """The input with the fewest of its changes that fails. Raises LookupError where it does not fail."""
    name, _ = seed_and_draws(reader, seed, number)
    count = len(seed_and_draws(reader, seed, number)[1])
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            draws = seed_and_draws(reader, seed, number)[1]  # anew: they are used up
            files = mutated(reader, reader.seeds()[name], [draws[n] for n in chosen])
            failure = failure_of(reader, files)
            if failure is not None:
                return name, files, failure
    raise LookupError(f"{reader.name} {seed} {number} does not fail")


if __name__ == "__main__":
    asked = READERS[sys.argv[2]]
    prepare(asked)
    origin, found, failed = smallest(asked, int(sys.argv[3]), int(sys.argv[4]))
    print(keep(asked, origin, found, failed.kind))
