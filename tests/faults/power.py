"""Cuts the power at every moment of an operation, and checks what a restart finds.

    python tests/faults/power.py --results FILE [--cuts 5000] [--shard 1/2]

A run's changes are recorded once. A cut is a number of changes and a way to lose those that were not synced
(`faults.disk`), drawn by its seed. The folder is built as it would be then: readers must have the earlier state or the
new one, and the same command must end as if nothing had happened. What a command said was done must be there.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for samples
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for support and faults

from faults import snapshots
from faults.disk import Change, Disk, losses, read_log
from faults.operations import ASK, OPERATIONS, QUESTION, Operation
from faults.walk import NOISE, Verdict, Walk, kind_of, new_place, recorded, summary

CUT = ("prefill", "resume", "grow", "replace", "verify", "ask-save", "questions", "quantize")
READERS = (["ask", QUESTION, "--context", "state/ctx", *ASK], ["inspect", "state/ctx"], ["inspect", "state/out"])


@dataclass(frozen=True)
class Cut:
    """The power fails after `after` changes; `seed` draws what is lost."""

    operation: str
    after: int
    seed: int


class Power:
    """Cuts of the operations of a place."""

    def __init__(self, walk: Walk) -> None:
        self.walk, self.place = walk, walk.place
        self._changes: dict[str, list[Change]] = {}
        self._answers: dict[str, str] = {}  # to the readers' question, by the digest of the context
        self._found: dict[tuple[str, str, bool], str] = {}  # what is wrong with a folder of these bytes

    def changes(self, operation: Operation) -> list[Change]:
        if operation.name not in self._changes:
            self.walk.base(operation)
            self.place.put_back(operation.start)
            log = self.place.top / "scratch" / "log"
            ended = self.place.run(operation.arguments, seed=2, log=str(log))
            assert ended.code == 0, ended
            self._changes[operation.name] = read_log(log, self.place.state)
            self._check_log(operation)
        return self._changes[operation.name]

    def cuts(self, operation: Operation, count: int) -> Iterator[Cut]:
        """All moments in turn, in a mixed order."""
        moments = list(range(len(self.changes(operation)) + 1))
        random.Random(operation.name).shuffle(moments)
        for n in range(count):
            yield Cut(operation.name, moments[n % len(moments)], n)

    def attempt(self, operation: Operation, cut: Cut, *, per_full: int = 5) -> Verdict:
        """Of each cut, all that the context holds is read; one of `per_full` is asked, inspected and gone on with."""
        self.walk.base(operation)
        is_full = cut.seed % per_full == per_full - 1
        changes = self.changes(operation)
        chance = random.Random(f"{cut.operation} {cut.after} {cut.seed}")
        disk = Disk(self.place.start(operation.start))
        for number, change in enumerate(changes[: cut.after]):
            disk.apply(number, change)
        files = disk.after(losses(chance, cut.after))
        is_done = cut.after == len(changes)
        key = operation.name, repr(sorted((name, hash(content)) for name, content in files.items())), is_done or is_full
        if key not in self._found:
            self._build(files)
            self._found[key] = self._wrong_context(operation, is_done=is_done) or (
                self._wrong(operation) if is_full else ""
            )
        why = self._found[key]
        return Verdict("bad", why) if why else Verdict("answer")

    def _check_log(self, operation: Operation) -> None:
        """All changes, none lost, are what the run left: the log has them all."""
        disk = Disk(self.place.start(operation.start))
        for number, change in enumerate(self._changes[operation.name]):
            disk.apply(number, change)
        kept = disk.after(losses(_First(), 0))
        there = {path.relative_to(self.place.state).as_posix(): path for path in self.place.state.rglob("*")}
        assert kept.keys() == there.keys(), (operation.name, kept.keys() ^ there.keys())
        for name, content in kept.items():
            assert content is None or content == there[name].read_bytes(), (operation.name, name)

    def _build(self, files: dict[str, bytes | None]) -> None:
        shutil.rmtree(self.place.state)
        self.place.state.mkdir(mode=0o700)
        for name, content in files.items():  # a folder comes before what is in it
            path = self.place.state / name
            if content is None:
                path.mkdir(mode=0o700)
            else:
                path.touch(mode=0o600)
                path.write_bytes(content)

    def _wrong_context(self, operation: Operation, *, is_done: bool) -> str:
        """What is wrong with the context that a restart finds; empty if nothing is."""
        base = self.walk.base(operation)
        found, files = self._context(), snapshots.tree(self.place.state, without="ctx")
        is_valid = found in (base.started["context"], base.made["context"])
        if is_done and (found, files) != (base.made["context"], base.made["files"]):
            return "what was said to be kept is lost"
        if not is_valid and base.started["context"] and ":" not in base.started["context"]:
            return f"the context is lost: {found if ':' in found else 'neither the earlier one nor the new one'}"
        return ""

    def _context(self) -> str:
        return snapshots.context(self.place.state / "ctx")

    def _wrong(self, operation: Operation) -> str:
        """What readers and the same command make of it."""
        base, found = self.walk.base(operation), self._context()
        for arguments in READERS:
            if why := self._wrong_reader(arguments, found):
                return why
        ended = self.place.run(operation.arguments, seed=3)
        if NOISE.search(ended.stderr):
            return kind_of(ended.stderr)
        if operation.name == "quantize" and ended.code == 2 and "is there already" in ended.stderr:
            return "" if ended.told["files"] == base.made["files"] else "config.json is there, and the weights are not"
        if ended.code != 0:
            return f"the same command afterwards: exit code {ended.code}: {ended.stderr[-300:]}"
        if ended.told["context"] != base.made["context"] or ended.told["files"] != base.made["files"]:
            return "the same command afterwards makes something else"
        if ended.stdout != base.stdout and not (operation.name == "questions" and ended.stdout in base.stdout):
            return "the same command afterwards prints something else"
        return ""

    def _wrong_reader(self, arguments: list[str], found: str) -> str:
        path = "state/ctx" if "state/ctx" in arguments else "state/out"
        if not (self.place.top / path).exists():
            return ""
        ended = self.place.run(arguments)
        if NOISE.search(ended.stderr):
            return kind_of(ended.stderr)
        if ended.code not in range(8):
            return f"{arguments[0]}: exit code {ended.code}"
        if arguments[0] == "ask" and found and ":" not in found:
            expected = self._answers.setdefault(found, ended.stdout)
            if ended.code != 0 or ended.stdout != expected:
                return f"ask --context: exit code {ended.code}, {ended.stdout[:60]!r}, not {expected[:60]!r}"
        elif arguments[0] == "ask" and ended.code == 0:
            return "ask --context: an answer from what is not complete"
        return ""


class _First(random.Random):
    """Draws the first of everything."""

    def choice(self, seq):  # type: ignore[no-untyped-def]
        return seq[0]

    def randint(self, a: int, b: int) -> int:
        return a


def each(power: Power, names: Collection[str], cuts: int) -> Iterator[tuple[Operation, Cut]]:
    """As many cuts, one of each operation in turn."""
    operations = [operation for operation in OPERATIONS if operation.name in names]
    lists = [(operation, power.cuts(operation, -(-cuts // len(operations)))) for operation in operations]
    for n in range(cuts):
        operation, some = lists[n % len(lists)]
        yield operation, next(some)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--cuts", type=int, default=5000)
    parser.add_argument("--shard", default="1/1", help="K/N: the K-th of N parts")
    parser.add_argument("--operations", default=",".join(CUT))
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--again", action="store_true", help="make what was bad once more")
    parser.add_argument("--folder", default="/dev/shm" if Path("/dev/shm").is_dir() else None)
    arguments = parser.parse_args()
    shard, shards = (int(part) for part in arguments.shard.split("/"))
    done = {tuple(line["cut"]): line["outcome"] for line in recorded(arguments.results)}
    began, lines = time.monotonic(), []
    with new_place("l4ctx-power-", arguments.folder) as place, open(arguments.results, "a") as results:
        power = Power(Walk(place))
        for number, (operation, cut) in enumerate(each(power, arguments.operations.split(","), arguments.cuts)):
            known = done.get((cut.operation, cut.after, cut.seed))
            if number % shards != shard - 1 or (known != "bad" if arguments.again else known is not None):
                continue
            if time.monotonic() - began > arguments.seconds:
                break
            verdict = power.attempt(operation, cut)
            line = {"operation": operation.name, "cut": [*vars(cut).values()], **vars(verdict)}
            lines.append(line)
            results.write(json.dumps(line) + "\n")
            results.flush()
    print(f"{len(lines):,} cuts in {time.monotonic() - began:.0f} s: {summary(lines)}")


if __name__ == "__main__":
    main()
