"""Commands under limits of the system: the right answer or one clear line, and what was kept stays valid.

Run by `pytest -m faults`. Limits of memory are counted from what the process has when the command begins.
"""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.cli_runner import ANSWER, FILLER, QUESTION, question
from support.fork_server import Ended, ForkServer, Run
from support.places import TINY

pytestmark = pytest.mark.faults
MIB = 2**20
MODEL = ["--model", "model", "--quiet"]
CHUNK = ["--prefill-chunk-size", "512"]
SHORT = ["--max-new-tokens", "14"]
COMMANDS = {
    "ask": ["ask", QUESTION, "a.txt", *MODEL, *SHORT],
    "tier": ["ask", QUESTION, "a.txt", *MODEL, *SHORT, *CHUNK, "--kv-dir", "disk", "--kv-host-memory", "1MiB"],
    "save": ["ask", QUESTION, "a.txt", "--save-context", "new", *MODEL, *SHORT, *CHUNK],
    "prefill": ["prefill", "a.txt", "-o", "new", *MODEL, *CHUNK],
    "grow": ["prefill", "a.txt", "b.txt", "-o", "context", *MODEL, *CHUNK],
    "context": ["ask", QUESTION, "--context", "context", *MODEL, *SHORT],
    "questions": ["ask", "--questions", "questions.txt", "--context", "context", *MODEL, *SHORT],
    "inspect": ["inspect", "context", "--verify"],
    "plan": ["plan", "--tokens", "100k", *MODEL],
    "quantize": ["quantize", "model", "-o", "quantized", "--to", "w8a16", "--quiet"],
}
KEPT = {"save": "new", "prefill": "new", "grow": "context"}
REPORTS = ("inspect", "plan")  # end with other codes than 0 after a report on stdout, which shows what is free
LIMITS = [
    *(("RLIMIT_AS", mib * MIB) for mib in (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 3000)),
    *(("RLIMIT_DATA", mib * MIB) for mib in (0, 4, 64, 256, 3000)),
    *(("RLIMIT_NOFILE", number) for number in (4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 64, 256)),
    *(("RLIMIT_FSIZE", size) for size in (500, 4096, 65536, MIB, 3 * MIB, 64 * MIB)),
    *(("RLIMIT_STACK", size) for size in (2**16, 2**20)),
]


def small_blocks(limit: list[Any]) -> None:
    """In the fork: blocks of a few hundred KiB; then a limit of memory, beyond what is used already."""
    from cache import layout

    layout.MIN_BLOCK_BYTES, layout.MIN_SEGMENT_BYTES, layout.MIN_SEGMENT_TOKENS = 3 * 2**18, 1, 1
    if limit and limit[0] in ("RLIMIT_AS", "RLIMIT_DATA"):
        field = {"RLIMIT_AS": "VmSize:", "RLIMIT_DATA": "VmData:"}[limit[0]]
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        used = next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
        resource.setrlimit(getattr(resource, limit[0]), (used + limit[1],) * 2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("limits")
    (folder / "a.txt").write_text(f"{ANSWER}{FILLER * 54}", encoding="utf-8")
    (folder / "b.txt").write_text(FILLER * 30, encoding="utf-8")
    (folder / "questions.txt").write_text(f"{QUESTION}\n{question('b')}\n", encoding="utf-8")
    (folder / "disk").mkdir()
    shutil.copytree(TINY, folder / "model")
    return folder


@pytest.fixture(scope="module")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    warm_up = [Run(COMMANDS[name], str(base)) for name in ("ask", "plan")]
    with ForkServer(tmp_path_factory.mktemp("server"), warm_up=warm_up) as started:
        made = started.run(
            Run(["prefill", "a.txt", "-o", "context", *MODEL, *CHUNK], str(base), before=BEFORE, argument=[])
        )
        assert made.code == 0, made
        yield started


BEFORE = "faults.test_limits:small_blocks"


@pytest.mark.parametrize("command", COMMANDS)
def test_limits(server: ForkServer, base: Path, tmp_path: Path, command: str) -> None:
    def run(folder: Path, limit: tuple[str, int] | None = None) -> Ended:
        limits = dict([limit]) if limit and limit[0] not in ("RLIMIT_AS", "RLIMIT_DATA") else {}
        argument = list(limit or ())
        return server.run(Run(COMMANDS[command], str(folder), limits=limits, before=BEFORE, argument=argument))

    free = run(Path(shutil.copytree(base, tmp_path / "free")))
    assert free.code == 0, free
    for number, limit in enumerate(LIMITS):
        folder = Path(shutil.copytree(base, tmp_path / str(number)))
        ended = run(folder, limit)
        said = ended.stderr.splitlines()
        assert "Traceback" not in ended.stderr and "panicked" not in ended.stderr, (limit, ended)
        if ended.code == 0:
            assert command in REPORTS or ended.stdout == free.stdout, (limit, ended)
        else:
            assert ended.code in range(1, 8), (limit, ended)
            is_told = command in REPORTS and ended.stdout and ended.code != 1
            assert is_told or (len(said) == 1 and said[0].startswith("l4ctx: ")), (limit, ended)
        if command in KEPT:
            again = run(folder)
            assert (again.code, again.stdout) == (0, free.stdout), (limit, again)
            valid = server.run(Run(["inspect", KEPT[command], "--verify"], str(folder), before=BEFORE, argument=[]))
            assert valid.code == 0, (limit, valid)
        shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes an ordinary user, which root alone may")
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_an_ordinary_user_with_few_threads(server: ForkServer, base: Path, tmp_path: Path, processes: int) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "here"))
    for path in (folder, *folder.rglob("*")):
        os.chown(path, 65534, 65534)
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(parent.stat().st_mode | 0o011)
    run = Run(COMMANDS["ask"], str(folder), limits={"RLIMIT_NPROC": processes}, user=65534)
    ended = server.run(run)
    assert ended.code == 0 or (ended.code in range(2, 8) and ended.stderr.count("\n") == 1), ended
