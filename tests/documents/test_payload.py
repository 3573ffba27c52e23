"""Payload of machines: what is left out of a text, what stays, and what is said about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from l4ctx.documents.notebook import notebook
from l4ctx.documents.payload import without_payload
from l4ctx.documents.reader import read_documents


def cell(kind: str, source: str | list[str], **entries: Any) -> dict[str, Any]:
    return {"cell_type": kind, "metadata": {}, "source": source, **entries}


def written(*cells: dict[str, Any], nbformat: int = 4) -> str:
    return json.dumps({"cells": list(cells), "metadata": {}, "nbformat": nbformat, "nbformat_minor": 5}, indent=1)


PLOT = {"output_type": "display_data", "data": {"image/png": "iVBORw0KGgo" * 900, "text/plain": ["<Figure>"]}}


def test_a_notebook_becomes_its_numbered_cells() -> None:
    text, payload = without_payload(
        written(
            cell("markdown", ["# Title\n", "words"]),
            cell("code", "x = 1\nx", outputs=[PLOT, PLOT]),
            cell("raw", ""),
            cell("code", [], outputs=[]),
        )
    )
    assert text == (
        "# %% [markdown] cell 1\n# Title\nwords\n\n# %% cell 2\nx = 1\nx\n\n# %% [raw] cell 3\n\n# %% cell 4\n"
    )
    assert payload is not None and payload.what == "2 outputs of the notebook" and payload.characters > 19_000


def test_format_3_attachments_and_half_surrogates() -> None:
    old = json.dumps(
        {"nbformat": 3, "worksheets": [{"cells": [{"cell_type": "code", "input": ["y\n", "z"], "outputs": []}]}]}
    )
    assert without_payload(old) == ("# %% cell 1\ny\nz\n", None)
    for odd in ("7", '"x"', "{}", "null", "true"):
        sheets = f'{{"nbformat": 3, "worksheets": [{{"cells": {odd}}}, {odd}]}}'
        assert without_payload(sheets)[1] is None
        assert without_payload(f'{{"nbformat": 4, "cells": [{{"source": "x", "outputs": {odd}}}]}}')[1] is None
    text, payload = without_payload(written(cell("markdown", "\ud800 a", attachments={"a.png": {"image/png": "A"}})))
    assert text == "# %% [markdown] cell 1\n\ufffd a\n"
    assert payload is not None and payload.what == "1 attachment of the notebook"


@pytest.mark.parametrize(
    "text",
    [
        written(cell("code", "x"))[:-9],
        '{"nbformat": 4}',
        '{"nbformat": 4, "cells": 3}',
        written(nbformat=7),
        '["nbformat"]',
        '{"nbformat": 4, "cells": [{"source": 3}]}',
        '{"cells": []}',
        '{"nbformat": 3, "worksheets": 0}',
        '{"nbformat": 4, "cells": [{"source": "x"}, 7]}',
        "[" * 9999,
        "words",
    ],
)
def test_what_is_no_notebook_is_the_text_that_it_is(text: str) -> None:
    assert notebook(text) is None and without_payload(text) == (text, None)


LONG = "QUJD" * 200


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"![a](data:image/png;base64,{LONG}=) b", "![a](data:image/png;base64,[801 B left out]) b"),
        (
            f'<img src="data:image/svg+xml;charset=utf-8;base64,{LONG}">',
            '<img src="data:image/svg+xml;charset=utf-8;base64,[800 B left out]">',
        ),
        (f"url(data:font/woff2;base64,{LONG})", "url(data:font/woff2;base64,[800 B left out])"),
        (f"a data:;base64,{LONG}\nNext words", "a data:;base64,[800 B left out]\nNext words"),
        (f'"data:a/b;base64,{LONG}\n  {LONG}\n  QUI="', '"data:a/b;base64,[1.6 KiB left out]"'),
        (
            json.dumps({"a": f"data:a/b;base64,{LONG}\n{LONG}\n", "b": 1}),
            '{"a": "data:a/b;base64,[1.6 KiB left out]\\n", "b": 1}',
        ),
    ],
)
def test_the_content_of_data_uris_is_left_out(text: str, expected: str) -> None:
    shown, payload = without_payload(text)
    assert shown == expected
    assert payload is not None and payload.what == "the content of 1 data: URI"


@pytest.mark.parametrize(
    "text",
    [
        "data:image/png;base64,QUJD",
        f'"data:image/png;base64," + "{LONG}"',
        LONG,
        f"data:text/plain,{LONG}",
        f"base64,{LONG}",
        "data:image/gif;base64," + "/" * 200 + "!",
    ],
)
def test_what_is_short_or_no_uri_stays(text: str) -> None:
    assert without_payload(text) == (text, None)


def test_a_document_keeps_its_digest_and_its_payload_if_wanted(tmp_path: Path) -> None:
    file = tmp_path / "plot.ipynb"
    file.write_text(written(cell("code", "plot()", outputs=[PLOT])))
    short, whole = (read_documents([file], stdin=None, keep_payload=keep).documents[0] for keep in (False, True))
    assert short.text == "# %% cell 1\nplot()\n" and short.payload is not None
    assert whole.text == file.read_text() and whole.payload is None
    assert short.sha256 == whole.sha256


def test_tokens_are_scaled_from_those_of_the_beginning() -> None:
    _, payload = without_payload(f"data:a/b;base64,{'QUJD' * 50_000}")
    assert payload is not None and (payload.characters, len(payload.sample)) == (200_000, 1 << 16)
    assert payload.tokens(1000) == 3052
