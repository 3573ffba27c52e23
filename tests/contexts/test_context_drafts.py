"""The order for drafts in a saved context: kept, and made anew where it is missing, damaged or not to be trusted."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from cache.disk import Units
from l4ctx.contexts import files, reader, writer
from l4ctx.contexts.reader import Context, ContextReader
from l4ctx.contexts.states import Stored
from l4ctx.drafts.index import IndexedText
from l4ctx.drafts.order import text_order
from support.context_toys import BLOCK, CHUNK, answer, fresh_answer, keep, tokens

IDS = tokens(2 * BLOCK + CHUNK + 7)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "context"


@pytest.fixture
def made_anew(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each order had that reading made."""
    made = []

    def counting(ids: array[int]) -> array[int]:
        made.append(len(ids))
        return text_order(ids)

    monkeypatch.setattr(reader, "text_order", counting)
    return made


def text(folder: Path) -> IndexedText:
    with closing(ContextReader(folder)) as opened:
        return opened.context.text(opened.state)


def test_the_order_is_kept(folder: Path, made_anew: list[int]) -> None:
    keep(folder, IDS)
    found = text(folder)
    assert (found.ids, found.order) == (IDS, text_order(IDS)) and made_anew == []
    longer = IDS + tokens(BLOCK, seed=1)
    keep(folder, longer)
    assert text(folder).order == text_order(longer) and made_anew == []


@pytest.mark.parametrize("stop", [1, 2 * BLOCK])
def test_a_context_that_is_still_being_read_has_all_of_it(folder: Path, made_anew: list[int], stop: int) -> None:
    keep(folder, IDS, stop=stop)
    context = Context.read(folder)
    assert context.text(context.states[-1]).order == text_order(IDS) and made_anew == []


@pytest.mark.parametrize(
    "changed",
    [
        lambda order: order[:-1],
        lambda order: order + order[:1],
        lambda order: order[:0],
        lambda order: order[:-1] + array("i", [len(order)]),
        lambda order: array("i", [-1]) + order[1:],
        lambda order: order[:5] + array("i", [2**31 - 1]) + order[6:],
        lambda order: order[:5] + array("i", [-(2**31)]) + order[6:],
    ],
    ids=["shorter", "longer", "empty", "beyond the end", "before the start", "largest", "smallest"],
)
def test_positions_that_are_not_in_the_text_are_not_used(
    folder: Path, made_anew: list[int], monkeypatch: pytest.MonkeyPatch, changed: Callable[[array[int]], array[int]]
) -> None:
    """As somebody may write them, with checksums that match."""
    hostile = changed(text_order(IDS)) or array("i", [0, 0])
    monkeypatch.setattr(writer, "text_order", lambda ids: hostile)
    keep(folder, IDS)
    assert text(folder).order == text_order(IDS) and made_anew == [len(IDS)]
    assert answer(folder).equal(fresh_answer(IDS))


def test_any_other_order_is_used(folder: Path, made_anew: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes worse drafts, and no wrong answer: none is worth the time to check it."""
    monkeypatch.setattr(writer, "text_order", lambda ids: array("i", [3] * len(ids)))
    keep(folder, IDS)
    assert set(text(folder).order) == {3} and made_anew == []


def test_damage_is_repaired_by_making_it_anew(folder: Path, made_anew: list[int]) -> None:
    keep(folder, IDS)
    (path,) = folder.glob("tokens-*")
    content = bytearray(path.read_bytes())
    place = content.index(bytes(text_order(IDS)))
    content[place + 2] ^= 1
    path.write_bytes(content)
    assert text(folder).order == text_order(IDS) and made_anew == [len(IDS)]


def test_contexts_without_it_are_indexed(folder: Path, made_anew: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As they were written before there were drafts."""

    def without(folder: Path, prefix: str, units: Units, metadata: dict[str, str]) -> Stored:
        return files.write_file(folder, prefix, {name: units[name] for name in units if name != "order"}, metadata)

    monkeypatch.setattr(writer, "write_file", without)
    keep(folder, IDS)
    assert "order" not in Context.read(folder).file(Context.read(folder).states[-1].ids).units
    assert text(folder).order == text_order(IDS) and made_anew == [len(IDS)]
    assert keep(folder, IDS) == len(IDS)  # and the context is complete as it is
