"""Walks fault points: each fault must end in the right answer or in one clear line, and lose nothing.

    python tests/faults/walk.py --results FILE [--shard 1/2] [--most N] [--operations prefill,ask] [--again]

A walk can be stopped and continued: FILE has a line of JSON for each fault that was tried. The order is the same in
every walk, the most likely errors of each call first.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for samples
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for support and faults

from faults import snapshots
from faults.operations import OPERATIONS, Operation, Place
from faults.shim import FAULTS, Fault, required_shim
from support.fork_server import Ended

NOISE = re.compile(r"Traceback|panicked|Warning:|Exception ignored|Fatal Python|core dumped|INTERNAL ASSERT")
SAYS_SO = re.compile(
    r"unknown|cannot|could not|unreadable|not be|missing|damage|left out|changed|error|denied", re.IGNORECASE
)
CODES = {0, 1, 2, 3, 4, 5, 6, 7}
FIRST = 3  # of the errors of each call are tried before the others


@dataclass(frozen=True)
class Base:
    """A run without a fault: what it printed, the state that it started from and the one that it made."""

    stdout: str
    started: dict[str, Any]
    made: dict[str, Any]
    points: dict[str, int]


@dataclass(frozen=True)
class Verdict:
    """`outcome`: "answer", "told" (less than all, and it says so), "line", "absent" (a file that is not there is no
    fault), "unreached" or "bad", and then why."""

    outcome: str
    why: str = ""
    code: int | None = None
    line: str = ""  # the last one on stderr; of a bad one, more


class Walk:
    """Faults on the operations of a place."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._bases: dict[str, Base] = {}
        self._resumed: dict[tuple[str, str], str] = {}  # what is wrong with going on from a state

    def base(self, operation: Operation) -> Base:
        if operation.name not in self._bases:
            self._bases[operation.name] = self._record(operation)
        return self._bases[operation.name]

    def faults(self, operation: Operation) -> list[Fault]:
        """All of them, in the order in which they are tried."""
        found = [
            (place >= FIRST, Fault(point, nth, kind))
            for point, count in sorted(self.base(operation).points.items())
            for nth in range(1, count + 1)
            for place, kind in enumerate(FAULTS[point.split()[0]])
        ]
        random.Random(operation.name).shuffle(found)
        found.sort(key=lambda entry: entry[0])
        return [fault for _, fault in found]

    def attempt(self, operation: Operation, fault: Fault) -> Verdict:
        base = self.base(operation)
        self.place.put_back(operation.start, base.started["tree"])
        ended = self.place.run(operation.arguments, seed=2, fault=[fault.point, fault.nth, fault.kind])
        is_optional = not operation.needs_all or " model/" in fault.point or fault.point.endswith("/.gitignore")
        if fault.kind == "ENOENT" and is_optional and not _noise(ended):
            return Verdict("absent", "", ended.code)  # another checkpoint, other patterns, or less to look at
        if why := self.wrong(operation, base, ended):
            return Verdict("bad", why, ended.code, f"{ended.stdout[-400:]}\n---\n{ended.stderr[-600:]}")
        line = (ended.stderr.splitlines() or [""])[-1]
        outcome = "unreached" if not ended.told["fired"] else "line" if ended.code else "answer"
        if outcome == "answer" and not _same(operation, ended.stdout, base.stdout):
            outcome = "told"
        return Verdict(outcome, "", ended.code, line)

    def _record(self, operation: Operation) -> Base:
        """Two runs, which must be equal."""
        self.place.put_back(operation.start)
        state = self.place.state
        started = {"tree": snapshots.tree(state), "context": snapshots.context(state / "ctx")}
        runs = []
        points = self.place.top / "scratch" / "points"
        for _ in range(2):
            self.place.put_back(operation.start)
            runs.append(self.place.run(operation.arguments, seed=2, points=str(points)))
        first, second = runs
        assert first.code == second.code == 0, (operation.name, first)
        assert _same(operation, first.stdout, second.stdout) and first.told == second.told, (first, second)
        counted = dict(line.rsplit("\t", 1) for line in points.read_text().splitlines())
        return Base(second.stdout, started, second.told, {point: int(count) for point, count in counted.items()})

    def wrong(self, operation: Operation, base: Base, ended: Ended, lift: Callable[[], None] = lambda: None) -> str:
        """What is wrong with a run that had a fault; empty if nothing is. `lift` is called before it is run again."""
        if ended.code is None:
            return f"hangs: {ended.stderr[-200:]}"
        if noise := NOISE.search(ended.stderr):
            return kind_of(ended.stderr[noise.start() :])
        if ended.code not in CODES or ended.told is None:
            return f"exit code {ended.code}"
        lines = ended.stderr.splitlines()
        is_told = not operation.needs_all and SAYS_SO.search(
            ended.stdout + ended.stderr
        )  # a report lists what is wrong
        if not all(line.startswith("l4ctx: ") for line in lines) or (ended.code and not lines and not is_told):
            return f"not a line: {ended.stderr[-200:]!r}"
        if is_told:
            return ""
        if ended.code:
            if not base.stdout.startswith(ended.stdout.rstrip("\n")):
                return "wrong output before the error"
        elif not _same(operation, ended.stdout, base.stdout):
            return "exit code 0 with another output"
        return self.wrong_state(operation, base, ended, lift)

    def wrong_state(
        self, operation: Operation, base: Base, ended: Ended, lift: Callable[[], None] = lambda: None
    ) -> str:
        """What is wrong with what a run left, and with what the same command makes of that."""
        now = ended.told["context"]
        is_valid = now in (base.started["context"], base.made["context"])
        if not is_valid and base.started["context"] and ":" not in base.started["context"]:
            return f"the context is lost: {now if ':' in now else 'neither the earlier one nor the new one'}"
        if operation.keeps and ended.code == 0 and now != base.made["context"]:
            return "exit code 0, and the context is not complete"
        tree = ended.told["tree"]
        if tree == base.started["tree"] or (ended.code == 0 and tree == base.made["tree"]):
            return ""
        key = operation.name, tree
        if key not in self._resumed:
            lift()
            self._resumed[key] = self._wrong_afterwards(operation, base)
        return self._resumed[key]

    def _wrong_afterwards(self, operation: Operation, base: Base) -> str:
        """The same command again, without a fault."""
        ended = self.place.run(operation.arguments, seed=3)
        if operation.name == "quantize" and "is there already" in ended.stderr:  # all was written, not all was synced
            return "" if ended.told["files"] == base.made["files"] else "a checkpoint that is not whole"
        if ended.code != 0 or NOISE.search(ended.stderr):
            return f"the same command afterwards: exit code {ended.code}: {ended.stderr[-300:]}"
        is_same = _same(operation, ended.stdout, base.stdout)
        if operation.name == "questions":  # what is answered already is not asked again
            is_same = ended.stdout in base.stdout
        if not is_same:
            return "the same command afterwards prints something else"
        if ended.told["context"] != base.made["context"]:
            return f"the same command afterwards makes another context: {ended.told['context']}"
        if ended.told["files"] != base.made["files"]:
            return "the same command afterwards makes other files"
        return ""


def _noise(ended: Ended) -> bool:
    return ended.code not in CODES or NOISE.search(ended.stderr) is not None


def _same(operation: Operation, one: str, other: str) -> bool:
    if operation.name == "plan":  # how much memory is free, and what would fit into it
        one, other = (
            re.sub(r"(?m)^would fit.*\n|[\d.,]+ ?[KMGT]?i?B?", lambda found: "0" * (found[0][-1] != "\n"), text)
            for text in (one, other)
        )
    return one == other


def kind_of(trace: str) -> str:
    """The exception and where it came from, without what differs from run to run."""
    ours = re.findall(r'File "[^"]*?/((?:l4ctx|model|cache)/[^"]+)", line \d+, in (\S+)', trace)
    frames = re.findall(r'File "([^"]+)", line \d+, in (\S+)', trace)
    last = ours[-1] if ours else frames[-1] if frames else ("", "")
    said = re.sub(r"'[^']*'|[0-9a-f]{12,}|\d+", "*", (trace.strip().splitlines() or [""])[-1])
    return f"traceback: {last[0]} {last[1]}: {said[:160]}"


def recorded(results: Path) -> list[dict[str, Any]]:
    """The lines of a results file, which may not be there yet."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def tried(results: Path) -> dict[tuple[str, Fault], dict[str, Any]]:
    """The last line of each fault in a results file."""
    return {(line["operation"], Fault(*line["fault"])): line for line in recorded(results)}


@contextmanager
def new_place(prefix: str, folder: str | None) -> Iterator[Place]:
    """A place of its own in `folder`, with the shim compiled; removed at the end. Raises SystemExit without a shim."""
    top = Path(tempfile.mkdtemp(prefix=prefix, dir=folder)).resolve()
    try:
        with closing(Place(top / "place", required_shim(top))) as place:
            yield place
    finally:
        shutil.rmtree(top)


def chosen(walk: Walk, names: Collection[str], shard: int, shards: int) -> Iterator[tuple[Operation, Fault]]:
    """The faults of a shard: one of each operation in turn."""
    lists = [(operation, walk.faults(operation)) for operation in OPERATIONS if operation.name in names]
    for n in range(max(len(faults) for _, faults in lists)):
        for operation, faults in lists:
            if n < len(faults) and n % shards == shard:
                yield operation, faults[n]


def summary(lines: list[dict[str, Any]]) -> str:
    outcomes = Counter(line["outcome"] for line in lines)
    bad = Counter(line["why"] for line in lines if line["outcome"] == "bad")
    first = {line["why"]: line for line in reversed(lines)}
    text = [", ".join(f"{count:,} {outcome}" for outcome, count in sorted(outcomes.items())) or "nothing was tried"]
    for why, count in bad.most_common():
        text.append(f"{count:6,} {why} ({first[why]['operation']}: {first[why].get('fault') or first[why]['cut']})")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--shard", default="1/1", help="K/N: the K-th of N parts")
    parser.add_argument("--most", type=int, default=10**9, help="faults to try now")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--operations", default=",".join(operation.name for operation in OPERATIONS))
    parser.add_argument("--again", action="store_true", help="try what was bad once more")
    parser.add_argument("--folder", default="/dev/shm" if Path("/dev/shm").is_dir() else None)
    arguments = parser.parse_args()
    shard, shards = (int(part) for part in arguments.shard.split("/"))
    done, began, lines = tried(arguments.results), time.monotonic(), []
    with new_place("l4ctx-faults-", arguments.folder) as place, open(arguments.results, "a") as results:
        walk = Walk(place)
        for operation, fault in chosen(walk, arguments.operations.split(","), shard - 1, shards):
            before = done.get((operation.name, fault))
            if before is not None if not arguments.again else before is None or before["outcome"] != "bad":
                continue
            if len(lines) >= arguments.most or time.monotonic() - began > arguments.seconds:
                break
            verdict = walk.attempt(operation, fault)
            line = {"operation": operation.name, "fault": [fault.point, fault.nth, fault.kind], **vars(verdict)}
            lines.append(line)
            results.write(json.dumps(line) + "\n")
            results.flush()
    print(f"{len(lines):,} faults in {time.monotonic() - began:.0f} s: {summary(lines)}")


if __name__ == "__main__":
    main()
