"""Readers of saved contexts: manifest, journal, head, and the files of blocks, tails and tokens."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import random
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from fuzz.checkpoint_readers import mutate_shard, read_inspection
from fuzz.inputs import Files, Reader, one_of
from fuzz.mutation import mutate_bytes, mutate_json, mutate_text
from l4ctx.errors import CONTEXT, INPUT
from support.places import ROOT


@functools.cache
def contexts() -> Mapping[str, Files]:
    """Toys: complete, and one whose reading was stopped; and those that an earlier version saved."""
    from support.context_toys import keep, tokens

    found: dict[str, Files] = {}
    for name, stop in (("complete", None), ("interrupted", 40)):
        with mock.patch("secrets.token_hex", _Counter()), tempfile.TemporaryDirectory() as place:
            keep(Path(place) / "c", tokens(75), stop=stop)
            found[name] = _files(Path(place) / "c")
    saved = ROOT / "tests" / "contexts" / "saved_by_0_1_0"
    return found | {"older, with an image": _files(saved / "image" / "context")}


class _Counter:
    """Names that are the same in every run."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def __call__(self, count: int) -> str:
        return f"{next(self._numbers):0{2 * count}x}"


def _files(folder: Path) -> Files:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.suffix != ".lock"
    }


def mutate_units(draw: random.Random, content: bytes) -> bytes:
    """A file of units as its writer might have made it: one with other places, or another content and its CRC-32."""
    try:
        return _other_units(draw, content)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):  # it was changed before
        return mutate_bytes(draw, content, 200)


def _other_units(draw: random.Random, content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    places = json.loads(header["__metadata__"]["units"])
    if draw.randrange(2):
        units = mutate_json(draw, json.dumps(places).encode())
        return _shard(header, units.decode("utf-8", "replace"), data)
    name = draw.choice(sorted(places))
    offset, size, _ = places[name]
    unit = data[offset : offset + size]
    changed = mutate_json(draw, unit) if unit[:1] in (b"[", b"{") else mutate_bytes(draw, unit)
    for other, place in places.items():
        if other != name and place[0] >= offset + size:
            places[other] = [place[0] + len(changed) - size, *place[1:]]
    places[name] = [offset, len(changed), zlib.crc32(changed)]
    return _shard(header, json.dumps(places), data[:offset] + changed + data[offset + size :])


def _shard(header: dict[str, Any], units: str, data: bytes) -> bytes:
    text = json.dumps(header | {"__metadata__": header["__metadata__"] | {"units": units}}).encode()
    return len(text).to_bytes(8, "little") + text + data


def mutate_journal(draw: random.Random, content: bytes) -> bytes:
    """A change to one record, with the chain of digests made whole again: a hostile journal, not a damaged one."""
    if draw.randrange(4) == 0:
        return mutate_text(draw, content)
    records = [line.partition(b" ")[2] for line in content.splitlines()]
    number = draw.randrange(len(records)) if records else 0
    match draw.randrange(6):
        case 0:
            del records[number : number + 1]
        case 1:
            records[number:number] = records[draw.randrange(len(records) or 1) :][:1]
        case 2:
            draw.shuffle(records)
        case _:
            records[number : number + 1] = [mutate_json(draw, record) for record in records[number : number + 1]]
    chain, lines = b"0" * 16, []
    for record in records:
        chain = hashlib.sha256(chain + record).hexdigest()[:16].encode()
        lines.append(chain + b" " + record + b"\n")
    return b"".join(lines)


def mutate_context(draw: random.Random, files: Files) -> Files:
    """Any file; and often the digests that name its header, so that the change is read and not just noticed."""
    changed = _ONE(draw, files)
    if draw.randrange(4) == 0:
        return changed
    journal = changed.get("journal", b"")
    for name, content in changed.items():
        if name.endswith(".safetensors") and files.get(name) is not content:
            length = int.from_bytes(content[:8], "little")
            old = files.get(name, b"")
            before, after = _digest(old), hashlib.sha256(content[: 8 + length]).hexdigest()
            journal = journal.replace(before.encode(), after.encode())
    if journal != changed.get("journal"):
        records = [line.partition(b" ")[2] for line in journal.splitlines()]
        chain, lines = b"0" * 16, []
        for record in records:
            chain = hashlib.sha256(chain + record).hexdigest()[:16].encode()
            lines.append(chain + b" " + record + b"\n")
        changed = changed | {"journal": b"".join(lines)}
    return _with_head(changed) if draw.randrange(2) else changed


def _digest(content: bytes) -> str:
    return hashlib.sha256(content[: 8 + int.from_bytes(content[:8], "little")]).hexdigest()


def _with_head(files: Files) -> Files:
    """The head that the journal's last end makes right."""
    last, end = 0, ""
    for number, line in enumerate(files.get("journal", b"").splitlines(), 1):
        try:
            record = json.loads(line.partition(b" ")[2])
            if record["type"] == "end":
                last, end = number, hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return files | {"head.json": json.dumps({"records": last, "end": end}).encode()} if last else files


_ONE = one_of(
    ("manifest.json", mutate_json), ("head.json", mutate_json), ("journal", mutate_journal),
    ("journal", mutate_journal), ("journal", mutate_journal), ("safetensors", mutate_shard),
    ("safetensors", mutate_bytes), ("safetensors", mutate_units), ("safetensors", mutate_units),
)  # fmt: skip


def read_context(folder: Path) -> None:
    """What `ask --context` and `prefill` read of it."""
    from contextlib import closing

    import torch

    from cache.errors import DiskError
    from cache.hybrid import HybridKVCache
    from l4ctx.contexts.manifest import saved_checkpoint
    from l4ctx.contexts.reader import Context, ContextReader
    from support.context_toys import CONFIG, Kind

    os.makedirs(folder / "blocks", exist_ok=True)
    saved_checkpoint(folder)
    context = Context.read(folder)
    for state in context.usable:
        try:
            context.damage(state, verify=True)
            context.documents(state)
            context.images(state)
            context.ids(state)
            context.text(state).find(context.ids(state)[:8])
        except DiskError:
            continue
    with closing(ContextReader(folder)) as reader:
        kind, tokens = Kind(), reader.tokens
        layout = kind.layout(min(tokens, 3000))
        cache = HybridKVCache(CONFIG, length=layout.length, dtype=torch.float32, layout=layout)
        reader.context.restore(reader.state, cache, min(tokens, 3000))


READERS = (
    Reader("context", contexts, mutate_context, read_context, frozenset([CONTEXT]), share=20),
    Reader("inspect_context", contexts, mutate_context, read_inspection, frozenset([CONTEXT, INPUT]), share=8),
)
