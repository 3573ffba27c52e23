"""The states of a saved context, from the records of its journal: one for each set of documents that it has held.

A state has a list of sealed blocks, which may begin with blocks of an earlier state, and once complete a tail: the
tokens behind the last sealed block. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from l4ctx.contexts.folder import RECREATE, typed
from l4ctx.errors import ContextError
from model.bounds import shown

_NAMES = {
    "block": re.compile(r"blocks/\d{6,12}-[0-9a-f]{12}\.safetensors"),
    "ids": re.compile(r"tokens-[0-9a-f]{12}\.safetensors"),
    "tail": re.compile(r"tail-[0-9a-f]{12}\.safetensors"),
}
MOST_TOKENS = 2**26
"""Six times the longest context of a published model: 256 MiB of ids."""

MOST_REFERENCES = 2**24
"""To blocks, of all states together: each state may begin with those of an earlier one."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Stored:
    """A data file: its name in the context's folder, and the SHA-256 of its header (cache.disk.write_units)."""

    name: str
    header_sha256: str

    def as_dict(self) -> dict[str, str]:
        return {"file": self.name, "sha256": self.header_sha256}


@dataclass
class State:
    """One set of documents, of `tokens` tokens; the first `start` of them were taken over from an earlier state.

    `partial` is the file, a block or a tail, with those taken over that fill no whole block.
    """

    tokens: int
    start: int
    ids: Stored
    system: bool
    blocks: list[Stored] = field(default_factory=list)
    partial: Stored | None = None
    tail: Stored | None = None
    is_complete: bool = False
    has_ended: bool = False  # in the journal; damage may have made it incomplete since

    @property
    def needs(self) -> list[Stored]:
        """The files that it needs; `partial` only until it is complete."""
        last = self.tail if self.is_complete else self.partial
        return [stored for stored in (self.ids, *self.blocks, last) if stored is not None]

    def kept(self, block_tokens: int) -> int:
        """Tokens whose keys and values are on disk."""
        return self.tokens if self.is_complete else max(self.start, len(self.blocks) * block_tokens)

    def forget(self, blocks: int, block_tokens: int) -> None:
        """Drops everything behind the first `blocks` blocks."""
        del self.blocks[blocks:]
        self.start = min(self.start - self.start % block_tokens, blocks * block_tokens)
        self.is_complete, self.tail, self.partial = False, None, None

    def begin_record(self, base: int | None) -> dict[str, Any]:
        """`base` is the index of the state that the first blocks were taken from."""
        return {
            "type": "begin",
            "tokens": self.tokens,
            "start": self.start,
            "ids": self.ids.as_dict(),
            "system": self.system,
            "base": base,
            "kept": len(self.blocks),
            "partial": None if self.partial is None else self.partial.as_dict(),
        }


def block_record(index: int, stored: Stored) -> dict[str, Any]:
    return {"type": "block", "index": index, **stored.as_dict()}


def end_record(tail: Stored | None, ids: Stored) -> dict[str, Any]:
    return {"type": "end", "tail": None if tail is None else tail.as_dict(), "ids": ids.name}


def replay(file: Path, records: Iterable[Any], block_tokens: int) -> list[State]:
    """The states, oldest first. Raises ContextError for an invalid record."""
    states: list[State] = []
    number = references = 0
    try:
        for number, record in enumerate(records, 1):  # noqa: B007 (named in the error)
            if record["type"] == "begin":
                states.append(_begun(record, states, block_tokens))
                references += len(states[-1].blocks)
                if references > MOST_REFERENCES:
                    raise ValueError(f"more than {MOST_REFERENCES:,} blocks of earlier states")
            elif record["type"] == "block":
                tip, index = states[-1], _count(record["index"])
                if tip.has_ended or index > len(tip.blocks):
                    raise ValueError(f"block {index} after {len(tip.blocks)}")
                if index < len(tip.blocks):  # read again from there, after damage
                    tip.forget(index, block_tokens)
                tip.blocks.append(_stored(record, "block"))
            elif record["type"] == "end":
                tip = states[-1]
                if len(tip.blocks) != tip.tokens // block_tokens:
                    raise ValueError(f"{len(tip.blocks)} blocks for {tip.tokens} tokens")
                if record["tail"] is None and tip.tokens % block_tokens:
                    raise ValueError(f"no tail for {tip.tokens} tokens")
                tip.tail = None if record["tail"] is None else _stored(record["tail"], "tail")
                tip.is_complete = tip.has_ended = True
            else:
                raise ValueError(f"type {shown(record['type'])}")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ContextError(
            f"{file}: damaged: record {number} is invalid ({type(error).__name__}: {error}); {RECREATE}"
        ) from None
    return states


def _begun(record: dict[str, Any], states: list[State], block_tokens: int) -> State:
    base, kept, partial = record["base"], _count(record["kept"]), record["partial"]
    if base is not None and _count(base) >= len(states):
        raise ValueError(f"base {base}")
    blocks = states[base].blocks[:kept] if base is not None else []
    start, tokens = _count(record["start"]), _count(record["tokens"])
    if len(blocks) != kept or kept != start // block_tokens or not start <= tokens <= MOST_TOKENS:
        raise ValueError(f"{kept} blocks for {start} of {tokens} tokens")
    if (partial is None) != (start % block_tokens == 0):
        raise ValueError(f"partial block for {start} tokens")
    if partial is not None:
        partial = _stored(partial, "tail" if str(partial["file"]).startswith("tail") else "block")
    return State(tokens, start, _stored(record["ids"], "ids"), typed(record["system"], bool), blocks, partial)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**48:
        raise ValueError(f"{shown(value)} is not a count")
    return value


def _stored(record: dict[str, Any], kind: str) -> Stored:
    name, sha256 = record["file"], record["sha256"]
    if not _NAMES[kind].fullmatch(name) or not _DIGEST.fullmatch(sha256):
        raise ValueError(f"{shown(name)} is not a file of a context")
    return Stored(name, sha256)


def is_temporary(name: str) -> bool:
    """Whether a file of this name is a temporary one that a killed writer may have left."""
    return re.fullmatch(r"\.(journal|[a-z]+\.json)\.(\d+|[0-9a-f]{16})", name) is not None


def is_ours(name: str) -> bool:
    """Whether a file of this name in a context's folder is a data file of it, so that it may be deleted."""
    return any(pattern.fullmatch(name) for pattern in _NAMES.values())
