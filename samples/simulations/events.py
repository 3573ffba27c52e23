"""A discrete-event simulation: processes that wait for one another, links, buffers and messages. Knows no model.

A process is a generator: it yields the seconds that something takes, or an `Event` that it waits for.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Generator
from itertools import count


class Event:
    """Something that happens once; processes wait for it."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self.has_happened = clock, False
        self._waiting: list[Process] = []

    def happen(self) -> None:
        self.has_happened = True
        for process in self._waiting:
            self._clock.resume(process, 0.0)
        self._waiting.clear()

    def wait(self, process: Process) -> None:
        if self.has_happened:
            self._clock.resume(process, 0.0)
        else:
            self._waiting.append(process)


Process = Generator["Event | float", None, None]


class Clock:
    """The time, and what is due."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Process | Event]] = []
        self._order = count()

    def start(self, process: Process) -> None:
        self.resume(process, 0.0)

    def resume(self, process: Process, delay: float) -> None:
        heapq.heappush(self._due, (self.now + delay, next(self._order), process))

    def at(self, time: float) -> Event:
        """An event that happens then."""
        event = Event(self)
        heapq.heappush(self._due, (time, next(self._order), event))
        return event

    def run(self) -> float:
        """Until nothing is due; returns the time."""
        while self._due:
            self.now, _, due = heapq.heappop(self._due)
            if isinstance(due, Event):
                due.happen()
                continue
            try:
                awaited = next(due)
            except StopIteration:
                continue
            if isinstance(awaited, Event):
                awaited.wait(due)
            else:
                self.resume(due, awaited)
        return self.now


class Link:
    """Carries one thing after another, in the order in which they are given to it."""

    def __init__(self, clock: Clock, rate: float) -> None:
        self._clock, self._rate, self._free = clock, rate, 0.0  # bytes a second
        self.carried = 0

    def transfer(self, num_bytes: int, latency: float = 0.0) -> Event:
        """Happens when all of it has arrived; the link is free for others while the latency passes."""
        self.carried += num_bytes
        self._free = max(self._free, self._clock.now) + num_bytes / self._rate
        return self._clock.at(self._free + latency)


class Slots:
    """A ring of buffers."""

    def __init__(self, clock: Clock, number: int) -> None:
        self._clock, self._free = clock, number
        self._waiting: deque[Event] = deque()

    def acquire(self) -> Event:
        """Happens when one is free, and takes it."""
        event = Event(self._clock)
        if self._free:
            self._free -= 1
            event.happen()
        else:
            self._waiting.append(event)
        return event

    def release(self) -> None:
        if self._waiting:
            self._waiting.popleft().happen()
        else:
            self._free += 1


class Inbox:
    """Messages to one rank, by the number of the exchange that they belong to."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._there: Counter[int] = Counter()
        self._expected: dict[int, tuple[int, Event]] = {}

    def deliver(self, number: int) -> None:
        self._there[number] += 1
        self._look(number)

    def expect(self, number: int, messages: int) -> Event:
        """Happens when so many have come."""
        event = Event(self._clock)
        self._expected[number] = messages, event
        self._look(number)
        return event

    def _look(self, number: int) -> None:
        if number in self._expected and self._there[number] == self._expected[number][0]:
            del self._there[number]
            self._expected.pop(number)[1].happen()
