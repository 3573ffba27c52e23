"""Reads many mutated inputs, for all readers or some, and writes down what failed. Goes on where it was stopped.

    python tests/fuzz/campaign.py --inputs 1000000 --state DIR
    python tests/fuzz/campaign.py --show config 1 4711     # one input: reader, seed, number

DIR gets a file for each reader with counts and failures. Also run by `pytest -m fuzz`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads do not outlive a fork

from fuzz.limits import Tally, run, seed_and_draws  # noqa: E402
from fuzz.readers import READERS  # noqa: E402
from support import torchvision_oracle  # noqa: E402

torchvision_oracle.prepare()  # before a reader imports what imports torchvision

TURNS = 100  # of each reader: so often it is saved how far the run is


def share_of(name: str, inputs: int, names: list[str]) -> int:
    """How many of all inputs are this reader's."""
    return -(-inputs * READERS[name].share // sum(READERS[other].share for other in names))


def campaign(names: list[str], inputs: int, seed: int, state: Path | None) -> dict[str, Tally]:
    """Reads `inputs` in all, those that `state` has not counted; all readers take turns, so that it can be stopped."""
    tallies = {name: _held(state, seed, name) for name in names}
    for turn in range(1, TURNS + 1):
        for name, tally in tallies.items():
            target = share_of(name, inputs, names) * turn // TURNS
            if tally.inputs < target:
                _add(tally, run(READERS[name], seed, tally.inputs, target))
                if state is not None:
                    _file(state, seed, name).write_text(json.dumps(asdict(tally), indent=1), encoding="utf-8")
    return tallies


def _add(tally: Tally, more: Tally) -> None:
    tally.inputs += more.inputs
    for end, count in more.ends.items():
        tally.ends[end] = tally.ends.get(end, 0) + count
    for kind, (often, first, details) in more.failures.items():
        before, earliest, told = tally.failures.get(kind, (0, first, details))
        tally.failures[kind] = (before + often, earliest, told)


def _file(state: Path, seed: int, name: str) -> Path:
    return state / f"{name}-{seed}.json"


def _held(state: Path | None, seed: int, name: str) -> Tally:
    if state is None or not _file(state, seed, name).is_file():
        return Tally()
    fields = json.loads(_file(state, seed, name).read_text(encoding="utf-8"))
    return Tally(fields["inputs"], fields["ends"], {k: tuple(v) for k, v in fields["failures"].items()})  # type: ignore[misc]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--reader", action="append", choices=sorted(READERS))
    parser.add_argument("--show", nargs=3, metavar=("READER", "SEED", "NUMBER"))
    given = parser.parse_args()
    if given.show:
        return show(READERS[given.show[0]].name, int(given.show[1]), int(given.show[2]))
    if given.state is not None:
        given.state.mkdir(parents=True, exist_ok=True)
    names = given.reader or list(READERS)
    began = time.monotonic()
    tallies = campaign(names, given.inputs, given.seed, given.state)
    for name, tally in tallies.items():
        print(f"{name}: {tally.inputs:,} inputs, {tally.ends}")
        for kind, (often, first, _) in tally.failures.items():
            print(f"    {often} x {kind} (input {first})")
    print(f"{sum(tally.inputs for tally in tallies.values()):,} inputs in {time.monotonic() - began:.0f} s")
    return int(any(tally.failures for tally in tallies.values()))


def show(name: str, seed: int, number: int) -> int:
    """Reads one input, after printing what differs from the valid one."""
    import tempfile

    from fuzz.inputs import Failure, Folder, mutated
    from fuzz.limits import attempt

    reader = READERS[name]
    origin, draws = seed_and_draws(reader, seed, number)
    valid = reader.seeds()[origin]
    files = mutated(reader, valid, draws)
    for file in sorted({*files, *valid}):
        if files.get(file) != valid.get(file):
            print(f"{origin}: {file}: {files.get(file, b'gone')[:3000]!r}")
    with tempfile.TemporaryDirectory() as place:
        try:
            print(attempt(reader, Folder(Path(place)), files))
        except Failure as failure:
            print(failure.kind, failure.details, sep="\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
