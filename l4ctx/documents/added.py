"""Documents that are read behind those of a saved context, as if all had been read together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
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
        known = held.get(document.source)
        if known is not None and (known.sha256, known.reading) == (document.sha256, document.reading):
            skipped.append(Skipped(document.source, "the context holds it already"))
            continue
        numbered = (f"{document.source} ({number})" for number in itertools.count(2))
        name = next(name for name in itertools.chain([document.source], numbered) if name not in taken)
        taken.add(name)
        added.append(replace(document, source=name))
    return added, skipped
