"""What is left of the system's limits, and what is refused for it before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from l4ctx.errors import LimitError
from l4ctx.machine import limits
from l4ctx.machine.memory import PeakSampler, available_memory
from support.places import ROOT

MIB = 2**20
needs_limits = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits are counted on Linux alone")


def limited(shell: str, code: str) -> str:
    """What a small Python program writes under limits that a shell sets."""
    done = subprocess.run(
        ["sh", "-c", f'{shell}; exec "$@"', "sh", sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_limits
@pytest.mark.parametrize("option", ["v", "d", "m"])
def test_limits_of_memory_are_counted(option: str) -> None:
    code = "from l4ctx.machine.memory import available_memory; print(available_memory())"
    left = int(limited(f"ulimit -{option} 200000", code))
    assert 100_000 * 1024 < left < 200_000 * 1024


@needs_limits
def test_the_limit_of_a_file() -> None:
    code = "from l4ctx.machine.limits import largest_file; print(largest_file())"
    assert limited("ulimit -f 16", code) in ("8192\n", "16384\n")  # of 512 or 1024 bytes, by shell
    assert limited("true", code) == "None\n"


def test_without_limits_there_is_more_than_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "soft_limit", lambda name: None)
    assert limits.limited_memory() == [] and limits.address_space_left() is None and limits.largest_file() is None
    free = available_memory()
    assert free is None or free > 0


@needs_limits
@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("RLIMIT_AS", "ulimit -v"),
        ("RLIMIT_DATA", "ulimit -d"),
        ("RLIMIT_NOFILE", "ulimit -n"),
        ("RLIMIT_STACK", "ulimit -s"),
    ],
)
def test_limits_too_low_for_torch_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, option: str) -> None:
    monkeypatch.setattr(limits, "soft_limit", lambda asked: 9 if asked == name else None)
    with pytest.raises(LimitError, match=option):
        limits.check_room_for_torch(is_loaded=False)
    monkeypatch.setattr(limits, "soft_limit", lambda asked: 2**50 if asked == name else None)
    limits.check_room_for_torch(is_loaded=False)


class Refused:
    """A system that starts so many threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.left, self._start = count, threading.Thread.start
        monkeypatch.setattr(threading.Thread, "start", lambda thread: self.start(thread))

    def start(self, thread: threading.Thread) -> None:
        if not self.left:
            raise RuntimeError("can't start new thread")
        self.left -= 1
        self._start(thread)


def test_threads_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    assert limits.startable_threads(1) == 1 and limits.startable_threads(5) == 5
    Refused(monkeypatch, 2)
    assert limits.startable_threads(5) == 3
    assert threading.active_count() == before


def test_without_threads_memory_is_sampled_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    Refused(monkeypatch, 0)
    with PeakSampler() as sampler:
        pass
    assert (sampler.peak is None) == (not os.path.exists("/proc/self/status"))


def test_torch_gets_the_threads_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    from l4ctx.machine import device

    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "before")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(device, "usable_cores", lambda: 4)
    device.prepare_torch()
    assert os.environ["OMP_NUM_THREADS"] == "before"
    Refused(monkeypatch, 1)
    device.prepare_torch()
    assert (os.environ["OMP_NUM_THREADS"], os.environ["TOKENIZERS_PARALLELISM"]) == ("2", "false")
