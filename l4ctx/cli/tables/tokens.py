"""Tokens by document as lines of text, which programs can cut as easily as people can read them."""

from __future__ import annotations

from collections.abc import Iterator

from l4ctx.formatting import counted, without_controls
from l4ctx.run.token_counts import Folder, TokenCounts


def token_lines(counts: TokenCounts) -> Iterator[str]:
    """A line for each document, the largest first, and one for all of them."""
    width = max(len(f"{counts.total:,}"), len("tokens"))
    yield f"{'tokens':>{width}}  share  document"
    for source, tokens in counts.largest_first:
        yield f"{tokens:{width},}  {tokens / counts.total:5.0%}  {without_controls(source)}"
    yield f"{counts.total:{width},}  {1:5.0%}  {counted(len(counts.documents), 'document')}"


def token_tree(counts: TokenCounts) -> Iterator[str]:
    """The same by folder, with the tokens below each and what is in it indented; in every folder the largest first."""
    width = len(f"{counts.total:,}")
    yield f"{counts.total:{width},}  {counted(len(counts.documents), 'document')}"
    yield from _below(counts.tree, width, "")


def _below(folder: Folder, width: int, indent: str) -> Iterator[str]:
    entries: list[tuple[int, str, Folder | None]] = [
        *((below.tokens, f"{name}/", below) for name, below in folder.folders.items()),
        *((tokens, name, None) for name, tokens in folder.documents.items()),
    ]
    for tokens, name, below in sorted(entries, key=lambda entry: -entry[0]):
        yield f"{tokens:{width},}  {indent}{without_controls(name)}"
        if below is not None:
            yield from _below(below, width, f"{indent}  ")
