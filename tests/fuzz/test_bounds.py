"""SECURITY.md says what a file may cost; readers of the most expensive valid files stay within that."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys

import pytest

from fuzz.bounds import CASES
from support.places import ROOT

SLACK = 8 << 20
"""Bytes that the allocator may take or keep: at these sizes, the growth itself is some MiB."""


def stated() -> dict[str, tuple[float, float]]:
    """Bytes of memory a byte and seconds a MiB, by reader."""
    rows = re.findall(
        r"^\| ([^|]+) \| [^|]+ \| ([\d.]+) \| ([\d.]+) \|$", (ROOT / "SECURITY.md").read_text(encoding="utf-8"), re.M
    )
    return {name: (float(memory), float(seconds)) for name, memory, seconds in rows}


@functools.cache
def measured() -> dict[str, dict[str, tuple[int, int, float]]]:
    script = ROOT / "tests" / "fuzz" / "bounds.py"
    done = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def test_every_case_has_its_bound() -> None:
    assert stated().keys() == CASES.keys()


@pytest.mark.slow
def test_files_cost_no_more_than_is_stated() -> None:
    """Processor time, not time by the clock; what is stated is several times what a quiet machine takes."""
    over = {}
    for name, (memory, seconds) in stated().items():
        (small, grown, took), (large, grown_more, took_more) = measured()[name].values()
        bytes_a_byte = (grown_more - grown - SLACK) / (large - small)
        seconds_a_mebibyte = (took_more - took) / (large - small) * 2**20
        if bytes_a_byte > memory or seconds_a_mebibyte > seconds:
            over[name] = bytes_a_byte, seconds_a_mebibyte
    assert not over
