"""Requests: their choices are those that the parts which carry them out know."""

from __future__ import annotations

from typing import get_args

from cache.layout import KV_DTYPES, QUANTIZED
from l4ctx.documents.pdf import PDF_MODES
from l4ctx.run.choices import AttentionBackend, Dtype, KVDtype, PdfMode
from model.config import BACKEND_NAMES


def test_choices_are_what_there_is() -> None:
    assert get_args(AttentionBackend) == BACKEND_NAMES
    assert get_args(PdfMode) == PDF_MODES
    assert set(get_args(KVDtype)) == {"auto", *KV_DTYPES}
    assert set(get_args(Dtype)) == {"auto", *KV_DTYPES} - set(QUANTIZED)
