"""Triton's kernels on a GPU where there is one, else by its interpreter on the CPU."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported


def needs_triton() -> pytest.MarkDecorator:
    has_triton = importlib.util.find_spec("triton") is not None
    return pytest.mark.skipif(not has_triton, reason="no Triton, which comes with builds of torch for GPUs")
