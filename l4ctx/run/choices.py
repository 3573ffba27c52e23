"""The options that have a fixed set of values, for the command line and for requests."""

from __future__ import annotations

from typing import Literal

PdfMode = Literal["text", "pages", "both"]
HtmlMode = Literal["source", "text"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
KVDtype = Literal["auto", "float32", "bfloat16", "float16", "fp8", "int8"]
AttentionBackend = Literal["sdpa", "cudnn", "matmul", "flex", "eager"]
