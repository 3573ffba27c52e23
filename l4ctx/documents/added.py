"""Documents that are read behind those of a saved context, as if all had been read together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from l4ctx.documents.document import Document, Skipped
from l4ctx.spans import Span


def added_documents(documents: Iterable[Document], held: Mapping[str, Span]) -> tuple[list[Document], list[Skipped]]:
    """Those that the context does not hold, each under a name of its own, and those that it does hold.

    `held` has each document of the context by its name, without a digest where the context has only a part of it.
    """
    added: list[Document] = []
    skipped: list[Skipped] = []
    taken = set(held)
    for document in documents:
        known = itertools.takewhile(held.__contains__, _names(document.source))  # it may have been added before
        if any((held[name].sha256, held[name].reading) == (document.sha256, document.reading) for name in known):
            skipped.append(Skipped(document.source, "the context holds it already"))
            continue
        name = next(name for name in _names(document.source) if name not in taken)
        taken.add(name)
        added.append(replace(document, source=name))
    return added, skipped


def _names(source: str) -> Iterator[str]:
    """Of a document, and of later states of it."""
    return itertools.chain([source], (f"{source} ({number})" for number in itertools.count(2)))
