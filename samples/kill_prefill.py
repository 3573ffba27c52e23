"""Kills readings into a saved context at random moments, and looks at what they leave behind.

    python samples/kill_prefill.py --kills 1000

Each trial makes a context, or changes the documents of one, with a toy model; it is killed (SIGKILL) some time within
the reading, asked, gone on with, perhaps killed again. In the end the bytes of its blocks and the logits of a question
must be those of a reading that nobody killed; and amid it no reader may see anything but a whole set of documents.
Torch is imported once, and each process is a fork. The model is so small that most of the time goes into files.
"""

from __future__ import annotations

import argparse
import os
import pickle
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a fork of a process with threads may hang
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from context_toys import BLOCK, Kind, answer, block_digests, changed, keep, model, tokens

from l4ctx.context import Context
from l4ctx.manifest import FILE as MANIFEST
from l4ctx.manifest import HEAD, ContextError

IDS = tokens(10 * BLOCK + 23)
OTHER_IDS = changed(IDS, 2 * BLOCK + 19)
WAYS = {"one block a step": Kind(prefill_chunk_size=BLOCK),
        "int8, five blocks a step": Kind("int8", prefill_chunk_size=5 * BLOCK)}
MOST_KILLS = 4  # of one trial
MOMENTS = ("before the manifest", "before the documents", "while reading", "while finishing", "after the end")


@dataclass
class Case:
    """A reading: into an existing context (`base`) or a new one, and what must come of it."""

    name: str
    kind: Kind
    base: Path | None
    digests: list[str]
    answers: list[bytes]  # logits by number of the sets of documents that are complete
    seconds: float

    @property
    def complete(self) -> int:
        """Sets of documents that are complete in the end."""
        return 1 if self.base is None else 2


def forked(work: Callable[[], object], moment: float | None = None) -> tuple[int, float]:
    """Does the work in a process of its own, which is killed `moment` seconds after it begins; exit code and time."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reading)
            os.write(writing, b"!")
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    began = time.perf_counter()
    if moment is not None:
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), time.perf_counter() - began


def in_a_fork(work: Callable[[], object], scratch: Path) -> object:
    """What the work returns; computed there, so that this process stays without threads."""
    file = scratch / "result"
    code, _ = forked(lambda: file.write_bytes(pickle.dumps(work())))
    if code:
        raise SystemExit("the reading that nobody kills fails")
    return pickle.loads(file.read_bytes())  # noqa: S301 (our own)


def outcome(folder: Path, kind: Kind) -> tuple[list[str], bytes]:
    return block_digests(folder), answered(folder, kind)


def answered(folder: Path, kind: Kind) -> bytes:
    return bytes(answer(folder, kind).flatten().view(torch.uint8).tolist())


def prepare(scratch: Path) -> list[Case]:
    """Measures readings that nobody kills."""
    cases = []
    for name, kind in WAYS.items():
        bases = {"a new context": None, "a change": scratch / f"base of {name}"}
        answers = [b""]
        for what, base in bases.items():
            ids = IDS if base is None else OTHER_IDS
            seconds = []
            for n in range(3):
                folder = scratch / f"{what}, {name}, {n}"
                if base is not None:
                    shutil.copytree(base, folder)
                seconds.append(forked(lambda: keep(folder, ids, kind))[1])  # noqa: B023 (done at once)
            digests, logits = in_a_fork(lambda: outcome(folder, kind), scratch)  # noqa: B023
            answers.append(logits)
            cases.append(Case(f"{what}, {name}", kind, base, digests, answers, statistics.median(seconds)))
            if base is None:
                folder.rename(bases["a change"])
    return cases


def moment_of(folder: Path, case: Case) -> str:
    """How far a killed reading has come, by what it left."""
    if not (folder / MANIFEST).exists():
        return "before the manifest"
    try:
        states = Context.read(folder).states
    except ContextError:
        return "and cannot be read"  # whoever asks will find out why
    complete = sum(state.is_complete for state in states)
    if complete == case.complete:
        return "after the end"
    if len(states) == complete:
        return "before the documents"
    return "while finishing" if len(states[-1].blocks) == len(case.digests) else "while reading"


def check_readers(folder: Path, case: Case) -> None:
    """Whoever asks now gets the answer of the newest set of documents that was read to its end, or is told of none."""
    is_there = (folder / MANIFEST).exists()
    complete = sum(state.is_complete for state in Context.read(folder).states) if is_there else 0
    if complete:
        assert answered(folder, case.kind) == case.answers[complete], f"a wrong answer after {complete} ends"
        return
    try:
        answer(folder, case.kind)
    except ContextError as error:
        said = str(error)
        assert any(text in said for text in ("no such folder", "no manifest", "was read yet", "was interrupted")), said
    else:
        raise AssertionError("an answer of what is not complete")


def check_end(folder: Path, case: Case) -> None:
    digests, logits = outcome(folder, case.kind)
    assert digests == case.digests, "other block bytes"
    assert logits == case.answers[case.complete], "other logits"
    assert (folder / HEAD).exists()


def trial(folder: Path, case: Case, chance: random.Random, most: int, moments: Counter[str]) -> bool:
    """One context, killed until it is whole or `most` times; whether all was right. Counts the kills by moment."""
    if case.base is not None:
        shutil.copytree(case.base, folder)
    ids = IDS if case.base is None else OTHER_IDS
    kills = []
    for _ in range(chance.randint(1, most)):
        code, _ = forked(lambda: keep(folder, ids, case.kind), chance.uniform(0, case.seconds))
        if code != -signal.SIGKILL:
            break
        kills.append(moment_of(folder, case))
        if forked(lambda: check_readers(folder, case))[0]:
            code = 1
            break
    else:
        code = 0
    moments.update(kills)
    if code == 0:
        code = forked(lambda: keep(folder, ids, case.kind))[0] or forked(lambda: check_end(folder, case))[0]
    if code:
        print(f"wrong: {case.name}, killed {', then '.join(kills) or 'never'}: {folder}", flush=True)
    return code == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model()
    began, chance = time.perf_counter(), random.Random(args.seed)
    moments: Counter[str] = Counter()
    scratch = Path(tempfile.mkdtemp(prefix="l4ctx-kills-"))
    cases = prepare(scratch)
    wrong = trials = 0
    while moments.total() < args.kills:
        folder = scratch / f"trial {trials}"
        if trial(folder, cases[trials % len(cases)], chance, min(MOST_KILLS, args.kills - moments.total()), moments):
            shutil.rmtree(folder)
        else:
            wrong += 1
        trials += 1
    where = ", ".join(f"{moments[name]:,} {name}" for name in MOMENTS)
    took = ", ".join(f"{case.seconds * 1000:.0f}" for case in cases)
    print(f"{moments.total():,} kills in {trials:,} trials: {where}; {wrong:,} mismatches "
          f"({time.perf_counter() - began:.0f} s; readings that nobody kills take {took} ms)")
    if wrong:
        raise SystemExit(1)
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
