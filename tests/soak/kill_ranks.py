"""Kills one of several ranks at random moments of a reading, and checks how the others end and what they leave.

    python tests/soak/kill_ranks.py --mesh 2x2 --kills 50

The others must end within 10 s with one line, and the context must be sound, as far as the line says; after every fifth
kill one process resumes it. As torchrun does, the others get SIGTERM a second later. Everything is imported once, and
each rank is a fork, so that a kill costs the reading and little else. Prints a line for each kill, and at the end how
many of them fell into the reading and how many failed.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # forking a process with threads may hang
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for l4ctx
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for support

import torch  # noqa: F401  (imported once, for all forks)

import l4ctx.cli.answer
import l4ctx.contexts.writer
import l4ctx.engine.prefill
import l4ctx.run.follower
import l4ctx.run.inputs
import l4ctx.run.ranks
import l4ctx.run.session
import l4ctx.run.sizing  # noqa: F401
from l4ctx.cli.app import main as l4ctx_main
from l4ctx.contexts.folder import FILE
from l4ctx.contexts.reader import Context
from support.cli_runner import FILLER
from support.places import TINY
from support.torchrun import environment

ENDS_WITHIN, SECONDS_ALONE, LINES, RESUMED = 10, 1, 2000, 5
LOST = "another rank has ended"
KEPT = re.compile(r"([0-9,]+) of [0-9,]+ tokens are kept in c")


def forked(folder: Path, name: str, *arguments: str, **variables: str) -> int:
    """Begins the command in a process of its own; its output is in files `name`.out and `name`.err. Returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.chdir(folder)
        for descriptor, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{name}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        os.environ.update(variables)
        sys.argv = ["l4ctx", *arguments]
        l4ctx_main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int, seconds: float) -> int | None:
    """The exit code, negative for a signal; None if it has not ended in time."""
    stop = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > stop:
            return None
        time.sleep(0.02)


class Trial:
    """One mesh that reads into the context c of a folder of its own."""

    def __init__(self, tensor: int, context: int, folder: Path) -> None:
        self.folder, self.count = folder, tensor * context
        (folder / "long.md").write_text(FILLER * LINES, encoding="utf-8")
        (folder / "model").symlink_to(TINY, target_is_directory=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = ("--context-ranks", str(context)) if context > 1 else ()
        self.arguments = ("prefill", "long.md", "-o", "c", "--model", "model")
        self.ranks = [
            forked(folder, str(number), *self.arguments, *options, **environment(number, self.count, port))
            for number in range(self.count)
        ]

    def wait_until_it_reads(self) -> None:
        while "document" not in self.words(0):
            time.sleep(0.02)

    def words(self, number: int) -> str:
        file = self.folder / f"{number}.err"
        return file.read_text() if file.exists() else ""

    def wait(self) -> list[int | None]:
        return [ended(child, 600) for child in self.ranks]

    def kill(self, whom: int) -> tuple[list[int | None], float]:
        """Exit codes of the others, and the seconds until the last one had ended."""
        os.kill(self.ranks[whom], signal.SIGKILL)
        began = time.monotonic()
        os.waitpid(self.ranks[whom], 0)
        others = [child for child in self.ranks if child != self.ranks[whom]]
        codes = dict.fromkeys(others)
        codes[others[0]] = ended(others[0], SECONDS_ALONE)
        for child in others:
            if codes[child] is None:
                os.kill(child, signal.SIGTERM)
        for child in others:
            if codes[child] is None:
                codes[child] = ended(child, 120)
        return list(codes.values()), time.monotonic() - began

    def kept(self) -> int:
        """Tokens in the context, all of whose files are sound; 0 where none was made."""
        folder = self.folder / "c"
        if not (folder / FILE).exists():
            return 0
        context = Context.read(folder)
        tip = context.states[-1:]
        assert not any(context.damage(state, verify=True) for state in tip), "damaged"
        return sum(state.kept(context.recipe.block_tokens) for state in tip)

    def check(self, whom: int, codes: list[int | None], seconds: float, *, is_resumed: bool) -> str:
        """What became of it. Raises AssertionError for what must not be."""
        if not any(codes):
            return "done before the kill"
        assert all(codes) and None not in codes, f"exit codes {codes}"
        assert seconds < ENDS_WITHIN, f"{seconds:.1f} s"
        words = self.words(0)
        for number in range(1, self.count):
            assert not self.words(number), f"rank {number} said {self.words(number)!r}"
        assert "Traceback" not in words, words
        if whom:
            assert codes[0] == 6 and words.count(LOST) == 1 and LOST in words.splitlines()[-1], words
        before = self.kept()
        if said := KEPT.search(words):
            assert int(said[1].replace(",", "")) == before, (said[0], before)
        if is_resumed:
            self.resume(before)
        return f"ended in time, {before:,} tokens kept"

    def resume(self, before: int) -> None:
        """Raises AssertionError where one process does not go on with what is kept."""
        code = ended(forked(self.folder, "resumed", *self.arguments), 600)
        resumed = (self.folder / "resumed.err").read_text()
        assert code == 0 and (not before or f"{before:,} of" in resumed), resumed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", default="2x2", metavar="TxC", help="tensor x context ranks")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tensor, context = map(int, args.mesh.split("x"))
    source, found, longest = random.Random(args.seed), Counter[str](), 0.0
    scratch = Path(tempfile.mkdtemp(prefix="kill-ranks-"))

    def trial(name: str) -> Trial:
        folder = scratch / name
        folder.mkdir()
        made = Trial(tensor, context, folder)
        made.wait_until_it_reads()
        return made

    undisturbed, began = trial("undisturbed"), time.monotonic()
    assert not any(undisturbed.wait()), undisturbed.words(0)
    reading = time.monotonic() - began
    print(f"{args.mesh}: an undisturbed reading takes {reading:.1f} s", flush=True)
    for number in range(args.kills):
        whom, after = source.randrange(tensor * context), source.uniform(0, reading)
        this = trial(str(number))
        time.sleep(after)
        codes, seconds = this.kill(whom)
        try:
            what = this.check(whom, codes, seconds, is_resumed=number % RESUMED == 0)
        except AssertionError as error:
            found["failed"] += 1
            print(f"{number}: rank {whom} after {after:.1f} s: FAILED, see {this.folder}: {error}", flush=True)
            continue
        found["done before the kill" if what.startswith("done") else "ended in time"] += 1
        longest = max(longest, seconds)
        print(f"{number}: rank {whom} after {after:.1f} s: {what} ({seconds:.1f} s)", flush=True)
        shutil.rmtree(this.folder)
    print(f"{args.mesh}: {dict(found)}; the others took {longest:.1f} s at most", flush=True)
    if not found["failed"]:
        shutil.rmtree(scratch)
    sys.exit(bool(found["failed"]))


if __name__ == "__main__":
    main()
