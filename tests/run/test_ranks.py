"""One request carried out by several processes, started as torchrun starts them: who speaks, and how all end."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from l4ctx.contexts.folder import FILE
from l4ctx.contexts.reader import Context
from l4ctx.errors import RequestError
from l4ctx.machine.device import device_of_rank
from l4ctx.machine.ranks import Launch
from support.cli_runner import DOCUMENT, FILLER, QUESTION, TIMEOUT, check_refused, run_here
from support.places import TINY
from support.torchrun import environment, started

ENDS_WITHIN, SECONDS_ALONE = 10, 1
MESHES: dict[str, tuple[int, tuple[str, ...]]] = {
    "2x1": (2, ()),
    "1x2": (2, ("--context-ranks", "2")),
    "2x2": (4, ("--context-ranks", "2")),
}
"""Tensor x context ranks: how many processes, started with which options."""

LOST = "another rank has ended"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return filled(tmp_path)


def filled(folder: Path) -> Path:
    (folder / "a.md").write_text(DOCUMENT, encoding="utf-8")
    (folder / "long.md").write_text(FILLER * 2000, encoding="utf-8")
    (folder / "model").symlink_to(TINY, target_is_directory=True)
    return folder


@pytest.fixture(scope="module")
def reading_seconds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], float]:
    """How long a mesh reads, once all is tokenized, on this machine."""

    @cache
    def measure(mesh: str) -> float:
        folder = filled(tmp_path_factory.mktemp("undisturbed"))
        count, options = MESHES[mesh]
        with reading(folder, *options, count=count) as processes:
            began = time.monotonic()
            assert [process.wait(TIMEOUT) for process in processes] == [0] * count
            return time.monotonic() - began

    return measure


@contextmanager
def reading(folder: Path, *options: str, count: int = 2) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that begin to read into the context c: all is tokenized."""
    arguments = ("prefill", "long.md", "-o", "c", "--model", "model", *options)
    with started(*arguments, folders=[folder] * count) as processes:
        error = processes[0].stderr
        assert error is not None
        assert any("document" in line for line in iter(error.readline, ""))
        yield processes


def test_the_first_rank_answers_and_the_others_say_nothing(folder: Path) -> None:
    """With drafts, some of which are wrong and taken back, and blocks in a file of each rank."""
    arguments = ("ask", QUESTION, "a.md", "--model", "model", "--kv-dir", ".", "--max-new-tokens", "16")
    alone = run_here("ask", QUESTION, str(folder / "a.md"), "--model", str(TINY), "--max-new-tokens", "16", "-q")
    with started(*arguments, folders=(folder, folder)) as processes:
        (out, error), silent = (process.communicate(timeout=TIMEOUT) for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert out == alone.stdout and "48213" in out
    assert "l4ctx: 2 ranks, and the model divided over them\n" in error
    assert silent == ("", "")


def test_what_another_rank_fails_at_is_what_the_first_says(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with started("ask", QUESTION, "a.md", "--model", "model", folders=(folder, empty)) as processes:
        (out, error), silent = (process.communicate(timeout=TIMEOUT) for process in processes)
    assert [process.returncode for process in processes] == [6, 3]
    assert out == "" and silent == ("", "")
    assert "l4ctx: rank 1 failed: model: no config.json there" in error.splitlines()[-1]
    assert "Traceback" not in error


@dataclass(frozen=True)
class Ended:
    """What is left of a mesh of which one process was killed."""

    codes: list[int]  # of the others, in order
    words: str  # the last ones of the first rank
    seconds: float  # until all had ended


def killed_after(seconds: float, folder: Path, whom: int, *options: str, count: int = 2) -> Ended:
    """They read into the context c, and one is killed so many seconds after all is tokenized."""
    with reading(folder, *options, count=count) as processes:
        time.sleep(seconds)
        processes[whom].kill()
        began = time.monotonic()
        others = [process for process in processes if process is not processes[whom]]
        with suppress(subprocess.TimeoutExpired):
            others[0].wait(SECONDS_ALONE)
        for process in others:
            process.terminate()  # as torchrun does; a leader that waits for the others cannot know
        said = [process.communicate(timeout=TIMEOUT) for process in others]
        took = time.monotonic() - began
        assert all(out == "" for out, _ in said)
        first = 0 if whom else 1
        assert all(error == "" for number, (_, error) in enumerate(said) if number or first)
        return Ended([process.returncode for process in others], "" if first else said[0][1], took)


def kept(folder: Path) -> int:
    """Tokens in the context, all of whose files are sound; 0 where none was made."""
    if not (folder / FILE).exists():
        return 0
    context = Context.read(folder)
    tip = context.states[-1:]
    assert not any(context.damage(state, verify=True) for state in tip)
    return sum(state.kept(context.recipe.block_tokens) for state in tip)


def check_words(ended: Ended) -> None:
    """The first rank ended with one line about the one that was killed."""
    assert ended.codes[0] == 6 and ended.words.count(LOST) == 1 and LOST in ended.words.splitlines()[-1]
    assert "Traceback" not in ended.words


def test_a_killed_rank_ends_the_first_with_one_line(folder: Path) -> None:
    ended = killed_after(1.0, folder, whom=1)
    check_words(ended)
    assert ended.seconds < ENDS_WITHIN


@pytest.mark.faults
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("seed", range(50))
def test_a_rank_killed_at_any_moment_ends_the_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch, reading_seconds: Callable[[str], float], seed: int, mesh: str
) -> None:
    """What they read until then is kept, and one process goes on with it."""
    (count, options), source = MESHES[mesh], random.Random(seed)
    whom = source.randrange(count)
    ended = killed_after(source.uniform(0, reading_seconds(mesh)), folder, whom, *options, count=count)
    if not any(ended.codes):
        pytest.skip("they were faster than before, and done")
    assert ended.seconds < ENDS_WITHIN and all(ended.codes)
    if whom:
        check_words(ended)
        assert " kept" in ended.words
    monkeypatch.chdir(folder)
    before = kept(Path("c"))
    if said := re.search(r"([0-9,]+) of [0-9,]+ tokens are kept in c", ended.words):
        assert int(said[1].replace(",", "")) == before
    if seed % 10 == 0:
        resumed = run_here("prefill", "long.md", "-o", "c", "--model", "model")
        assert resumed.code == 0 and (not before or f"{before:,} of" in resumed.stderr)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("ask", QUESTION, "a.md", "--weights-memory", "1GiB"), "--weights-memory does not go with several ranks"),
        (
            ("prefill", "a.md", "-o", "c", "--weights-memory", "1GiB"),
            "--weights-memory does not go with several ranks",
        ),
        (("plan", "a.md"), "plan: several ranks only ask and prefill"),
    ],
)
def test_what_ranks_cannot_do_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], named: str
) -> None:
    monkeypatch.chdir(folder)
    for name, value in environment(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGTERM)
    try:
        check_refused(run_here(*arguments, "--model", str(TINY)), 2, named)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not (folder / "c").exists()


@pytest.mark.parametrize(
    ("name", "gpus", "named"),
    [
        ("cuda:1", 4, "--device cuda:1: each rank has a GPU of its own"),
        ("auto", 1, "2 ranks on this machine, which has 1 GPU: start one for each"),
        ("meta", 2, "--device meta: cannot be used here"),
    ],
)
def test_devices_that_ranks_cannot_share(monkeypatch: pytest.MonkeyPatch, name: str, gpus: int, named: str) -> None:
    pretend(monkeypatch, gpus)
    launch = Launch.of(environment(1, 2, 1))
    assert launch is not None
    with pytest.raises(RequestError, match=re.escape(named)):
        device_of_rank(launch, name)


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_rank_has_the_gpu_of_its_number_on_the_machine(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    chosen = pretend(monkeypatch, 2)
    said = environment(3, 4, 1) | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    launch = Launch.of(said)
    assert launch is not None
    assert device_of_rank(launch, name) == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")]
    assert device_of_rank(launch, "cpu") == torch.device("cpu")


def pretend(monkeypatch: pytest.MonkeyPatch, gpus: int) -> list[torch.device]:
    """That the machine has so many GPUs; returns which become torch's current one."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    ones = torch.ones
    monkeypatch.setattr(
        torch, "ones", lambda *size, device: ones(*size, device="meta" if "meta" in str(device) else "cpu")
    )
    return chosen


@pytest.mark.parametrize(
    "edit",
    [
        lambda said: said.pop("TORCHELASTIC_RUN_ID"),
        lambda said: said.update(WORLD_SIZE="1"),
        lambda said: said.update(RANK="first"),
    ],
)
def test_other_environments_start_one_process(edit: Callable[[dict[str, str]], object]) -> None:
    said = environment(1, 2, 29500)
    launch = Launch.of(said)
    assert launch is not None and (launch.number, launch.count, launch.port, launch.speaks) == (1, 2, 29500, False)
    edit(said)
    assert Launch.of(said) is None
