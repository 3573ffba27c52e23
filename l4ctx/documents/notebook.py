"""A Jupyter notebook as the text of its cells, numbered and without their outputs."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from l4ctx.formatting import counted


class Notebook(NamedTuple):
    """The cells as text; what was left out, in words (empty: nothing); and that itself, as JSON."""

    text: str
    what: str
    left_out: str


def notebook(text: str) -> Notebook | None:
    """What a notebook of format 3 or 4 shows; None for any other text, a broken notebook among it.

    A cell is a line `# %% cell 3` (`# %% [markdown] cell 4`, `# %% [raw] cell 5`; counted from 1) and its source.
    """
    if '"nbformat"' not in text or not text.lstrip().startswith("{"):
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("nbformat") not in (3, 4):
        return None
    cells = content.get("cells")
    if cells is None and isinstance(sheets := content.get("worksheets"), list):
        cells = [cell for sheet in sheets if isinstance(sheet, dict) for cell in _listed(sheet.get("cells"))]
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        return None
    shown = []
    outputs: list[Any] = []
    attachments: list[Any] = []
    for number, cell in enumerate(cells, 1):
        source = _joined(cell.get("source", cell.get("input", "")))
        if source is None:
            return None
        kind = cell.get("cell_type", "code")
        label = "" if kind == "code" else f"[{kind}] " if isinstance(kind, str) and kind.isalpha() else "[other] "
        ends_line = not source or source.endswith("\n")
        shown.append(f"# %% {label}cell {number}\n{source}" + "\n" * (not ends_line))
        found, attached = cell.get("outputs"), cell.get("attachments")
        outputs += _listed(found)
        attachments += list(attached.values()) if isinstance(attached, dict) else []
    counts = [counted(len(parts), what) for parts, what in ((outputs, "output"), (attachments, "attachment")) if parts]
    left_out = json.dumps(outputs + attachments, indent=1, ensure_ascii=False) if counts else ""
    return Notebook(_valid("\n".join(shown)), " and ".join(counts), _valid(left_out))


def _valid(text: str) -> str:
    """Replaces lone surrogates, which JSON can spell."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _joined(source: object) -> str | None:
    """A cell's source, which is a text or a list of its lines."""
    if isinstance(source, list) and all(isinstance(line, str) for line in source):
        return "".join(source)
    return source if isinstance(source, str) else None
