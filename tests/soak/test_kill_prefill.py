"""Runs `kill_prefill.py` with a thousand kills, as a test."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support.places import ROOT


@pytest.mark.soak
def test_a_thousand_kills_lose_nothing() -> None:
    command = [sys.executable, str(ROOT / "tests" / "soak" / "kill_prefill.py"), "--kills", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
