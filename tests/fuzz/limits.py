"""Limits of time and memory for one input, in this process; and processes that end with an input that breaks them."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from mmap import mmap
from pathlib import Path
from types import FrameType
from typing import Any

from fuzz.inputs import Failure, Files, Folder, Reader, check, mutated

SECONDS = 5.0  # of processor time
WAITING = 60.0  # seconds without an end, on however busy a machine: it waits for something
GROWTH = 500 << 20  # bytes
COUNTS = (1, 1, 1, 1, 2, 2, 3, 5, 8)
"""How many changes an input gets."""

_PAGE = resource.getpagesize()
_PLACE = struct.Struct("=Q?")  # the number of the input that is being read, and whether all are done


class _TooLong(BaseException):
    """Not an Exception: no reader may take it for one of its own."""


def seed_and_draws(reader: Reader, seed: int, number: int) -> tuple[str, list[random.Random]]:
    """The name of the valid input that input `number` is made of, and a source of chance for each of its changes."""
    draw = random.Random(f"{reader.name}:{seed}:{number}")
    name = draw.choice(sorted(reader.seeds()))
    return name, [random.Random(draw.getrandbits(64)) for _ in range(draw.choice(COUNTS))]


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raises Failure for more than SECONDS of processor time, or GROWTH of memory. Limits are soft, and put back."""

    def stop(_: int, frame: FrameType | None) -> None:
        raise _TooLong("".join(traceback.format_stack(frame, limit=12)))

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + GROWTH, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    except _TooLong as error:
        raise Failure(f"more than {SECONDS:g} s in {_place(str(error))}", str(error)) from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _place(stack: str) -> str:
    ours = [line for line in stack.splitlines() if "File" in line and ("/l4ctx/" in line or "/model/" in line)]
    return ours[-1].strip() if ours else "?"


def _address_space() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * _PAGE


def attempt(reader: Reader, folder: Folder, files: Files) -> str:
    """Reads an input within the limits. Returns how that ended; raises Failure."""
    place, before = folder.hold(files), _seconds_of_children()
    with limited():
        end = check(reader, place)
    if _seconds_of_children() - before > SECONDS:
        raise Failure(f"more than {SECONDS:g} s in a process of its own", "")
    return end


def _seconds_of_children() -> float:
    """Processor time of processes that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@dataclass
class Tally:
    """Of one reader: how its inputs ended, and the first failing input of each kind."""

    inputs: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    failures: dict[str, tuple[int, int, str]] = field(default_factory=dict)  # kind: how often, input, details

    def count(self, end: str) -> None:
        self.inputs += 1
        self.ends[end] = self.ends.get(end, 0) + 1

    def fail(self, failure: Failure, number: int) -> None:
        self.count("failed")
        often, first, details = self.failures.get(failure.kind, (0, number, failure.details))
        self.failures[failure.kind] = (often + 1, first, details)


@functools.cache
def prepare(reader: Reader) -> dict[str, str]:
    """Reads the valid inputs, without limits: what they import does not count. Returns how each ended."""
    ends = {}
    for name, files in reader.seeds().items():
        with tempfile.TemporaryDirectory() as place:
            ends[name] = check(reader, Folder(Path(place)).hold(files))
    return ends


def _end_children() -> None:
    """Ends the confined processes that run: two forks cannot share one."""
    from l4ctx.confinement.process import Confined

    for each in gc.get_objects():
        if type(each) is Confined:  # isinstance would ask lazy modules
            each.end()


def run(reader: Reader, seed: int, start: int, stop: int, *, most_failures: int = 1000) -> Tally:
    """Reads inputs start .. stop - 1 of a reader in processes of their own: one that ends costs one input."""
    prepare(reader)
    _end_children()
    tally, shared = Tally(), mmap(-1, _PAGE)
    while start < stop and sum(often for often, _, _ in tally.failures.values()) < most_failures:
        _PLACE.pack_into(shared, 0, start, False)
        with tempfile.TemporaryFile() as results:
            child = os.fork()
            if child == 0:
                _child(reader, seed, range(start, stop), shared, results.fileno())
            why = _watched(child, shared)
            results.seek(0)
            for line in results.read().decode().splitlines():
                _take(tally, line)
        number, is_done = _PLACE.unpack_from(shared)
        if is_done:
            break
        if why is not None:
            tally.fail(Failure(why, ""), number)
            number += 1
        start = number
    return tally


def _watched(child: int, shared: mmap) -> str | None:
    """Waits for a process; ends it where an input takes too long. Why it ended, if not by itself."""
    last, since, used = -1, time.monotonic(), 0.0
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return None if code == 0 else f"the process ended with {code}"
        number, _ = _PLACE.unpack_from(shared)
        if number != last:
            last, since, used = number, time.monotonic(), _processor_seconds(child)
        elif _processor_seconds(child) - used > 2 * SECONDS or time.monotonic() - since > WAITING:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"no end within {2 * SECONDS:g} s, and no signal is heard"
        time.sleep(0.05)


def _processor_seconds(process: int) -> float:
    with contextlib.suppress(OSError), open(f"/proc/{process}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _child(reader: Reader, seed: int, numbers: range, shared: mmap, results: int) -> None:
    """Never returns."""
    code, parent = 1, os.getppid()
    try:
        noise = _quiet()
        with tempfile.TemporaryDirectory(prefix="fuzz-", dir=_memory()) as place, open(results, "wb") as target:
            folder, base = Folder(Path(place)), _peak()
            seeds = reader.seeds()
            for number in numbers:
                if os.getppid() != parent:
                    os._exit(code)
                _PLACE.pack_into(shared, 0, number, False)
                name, draws = seed_and_draws(reader, seed, number)
                try:
                    files = mutated(reader, seeds[name], draws)
                    end = attempt(reader, folder, files)
                    _check_noise(noise)
                    line = f"{number} + {end}"
                except Failure as failure:
                    line = f"{number} - {failure.kind}\t{failure.details!r}"
                target.write(line.encode("utf-8", "replace") + b"\n")
                target.flush()
                if _peak() - base > GROWTH:  # a fresh process goes on
                    target.write(f"{number} ! grew by {_peak() - base >> 20} MiB\n".encode())
                    _PLACE.pack_into(shared, 0, number + 1, number + 1 == numbers.stop)
                    break
            else:
                _PLACE.pack_into(shared, 0, numbers.stop, True)
        code = 0
    except BaseException:  # a fault of the harness
        traceback.print_exc(limit=-2, file=sys.__stdout__)
        sys.__stdout__.flush()
    finally:
        os._exit(code)


def _take(tally: Tally, line: str) -> None:
    number, sign, rest = line.split(" ", 2)
    if sign == "+":
        tally.count(rest)
    else:
        kind, _, details = rest.partition("\t")
        tally.fail(Failure("more than 500 MB" if sign == "!" else kind, details or kind), int(number))


def _memory() -> str | None:
    """A folder in memory, if there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _quiet() -> Any:
    """Standard error goes to a file from now on: whatever a library prints there is a failure."""
    noise = tempfile.TemporaryFile()  # noqa: SIM115 (until the process ends)
    os.dup2(noise.fileno(), 2)
    return noise


def _check_noise(noise: Any) -> None:
    if os.fstat(noise.fileno()).st_size:
        noise.seek(0)
        text = noise.read(2000).decode("utf-8", "replace")
        noise.truncate(0)
        noise.seek(0)
        os.lseek(2, 0, os.SEEK_SET)
        raise Failure(f"noise on standard error: {' '.join(text.split())[:60]}", text)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
