"""One prefill step on a mesh of tensor x context ranks, played event by event.

Each rank has processes of three kinds: one computes layer by layer and exchanges with other ranks, two bring weights
that the GPU does not hold into two buffers, and two bring segments of keys and values through a ring of buffers; what
is on disk comes through pinned memory. How long a step takes follows from the order of events alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from samples.simulations.events import Clock, Event, Inbox, Link, Process, Slots
from samples.simulations.work import RankWork, Step

RING = 4
"""Segments of keys and values on their way to a GPU or being attended there."""

PINNED = 3
"""Segments, and pieces of weights, on their way from disk."""

WEIGHT_BUFFERS = 2
"""Layers whose weights are on their way or being computed with."""

WEIGHT_PIECE = 32 * 2**20
"""Bytes of weights that are copied as one."""


@dataclass(frozen=True)
class Machine:
    """Rates of one rank, a second, and the seconds that an exchange takes beside its bytes."""

    compute: float  # floating-point operations
    link: float  # bytes to other ranks
    host_link: float
    disk: float
    latency: float


@dataclass(frozen=True)
class Played:
    """How a step went. Bytes are those of the rank with the most."""

    seconds: float
    computing: float  # of the rank that computed longest
    sent: int
    copied: int
    read: int


class _Copies:
    """What comes to one GPU: weights layer by layer, and segments of the NoPE layers."""

    def __init__(self, clock: Clock, machine: Machine, step: Step, context: int) -> None:
        config, last = step.config, step.config.num_hidden_layers - 1
        self.host_link, self.disk = Link(clock, machine.host_link), Link(clock, machine.disk)
        self.weights_there = [Event(clock) for _ in range(config.num_hidden_layers)]
        self.weight_buffers, self.ring = Slots(clock, WEIGHT_BUFFERS), Slots(clock, RING)
        self._weights = [[(size, Event(clock)) for size in _pieces(weights)] for weights in step.weights]
        self._weights_on_disk = step.weights_on_disk
        self._pinned, self._pinned_weights = Slots(clock, PINNED), Slots(clock, PINNED)
        self._segment_bytes = step.held[context].segment_bytes
        self.segments = {
            layer: [(tokens, on_disk, Event(clock), Event(clock)) for tokens, on_disk in step.held[context].segments]
            for layer in range(last)
            if not config.uses_rope(layer)
        }  # in each layer: tokens, whether they are on disk, and when they are read and there

    def processes(self) -> Iterator[Process]:
        yield from (self._read_weights(), self._bring_weights(), self._read_segments(), self._bring_segments())

    def _read_weights(self) -> Process:
        for pieces in self._weights:
            for size, read in pieces:
                if self._weights_on_disk:
                    yield self._pinned_weights.acquire()
                    yield self.disk.transfer(size)
                read.happen()

    def _bring_weights(self) -> Process:
        for layer, pieces in enumerate(self._weights):
            if pieces:
                yield self.weight_buffers.acquire()
            for size, read in pieces:
                yield read
                yield self.host_link.transfer(size)
                if self._weights_on_disk:
                    self._pinned_weights.release()
            self.weights_there[layer].happen()

    def _read_segments(self) -> Process:
        for segments in self.segments.values():
            for _, on_disk, read, _ in segments:
                if on_disk:
                    yield self._pinned.acquire()
                    yield self.disk.transfer(self._segment_bytes)
                read.happen()

    def _bring_segments(self) -> Process:
        for segments in self.segments.values():
            for _, on_disk, read, there in segments:
                yield read
                yield self.ring.acquire()
                yield self.host_link.transfer(self._segment_bytes)
                if on_disk:
                    self._pinned.release()
                there.happen()


class _Rank:
    """One rank: what it computes, and what it tells the others."""

    def __init__(self, clock: Clock, machine: Machine, step: Step, tensor: int, context: int) -> None:
        self._clock, self._machine, self._step = clock, machine, step
        self.tensor, self.context = tensor, context
        self.work, self.copies = RankWork(step, context), _Copies(clock, machine, step, context)
        self.link = Link(clock, machine.link)
        self.sums, self.exchanges = Inbox(clock), Inbox(clock)
        self.busy, self._turn, self._round = 0.0, 0, 0

    def compute(self, ranks: Sequence[_Rank]) -> Process:
        """Layer by layer. `ranks` are all of the mesh."""
        following = (self.tensor + 1) % self._step.tensor
        next_one = next(rank for rank in ranks if (rank.tensor, rank.context) == (following, self.context))
        peers = [rank for rank in ranks if rank.tensor == self.tensor and rank is not self]
        config, work, last = self._step.config, self.work, self._step.config.num_hidden_layers - 1
        yield from self._sum(next_one)  # the embeddings
        for layer in range(config.num_hidden_layers):
            yield self.copies.weights_there[layer]
            yield self._busy(work.keys_values)
            if layer != last:
                if config.uses_rope(layer):
                    yield self._busy(work.in_chunks)
                else:
                    yield from self._attend(layer, peers)
                yield self._busy(work.queries_and_output)
                yield from self._sum(next_one)
                yield self._busy(work.feed_forward(layer))
                yield from self._sum(next_one)
            if self._step.weights[layer]:
                self.copies.weight_buffers.release()

    def _attend(self, layer: int, peers: Sequence[_Rank]) -> Process:
        """A NoPE layer: all queries of the step with this rank's keys, or its own queries with all keys."""
        yield from self._send(peers, [self.work.sent_before for _ in peers])
        for tokens, _, _, there in self.copies.segments[layer]:
            yield there
            yield self._busy(self.work.to_older(tokens))
            self.copies.ring.release()
        yield self._busy(self.work.to_the_rest)
        if self._step.queries_travel:
            yield from self._send(peers, [self.work.sent_back(peer.work) for peer in peers])

    def _sum(self, next_one: _Rank) -> Process:
        """A ring: each rank sends a part to the next one, as often as it takes for all to have all sums."""
        turns = 2 * (self._step.tensor - 1)
        for _ in range(turns):
            self._turn += 1
            yield self.link.transfer(self.work.sum_bytes // self._step.tensor, self._machine.latency / turns)
            next_one.sums.deliver(self._turn)
            yield self.sums.expect(self._turn, 1)

    def _send(self, peers: Sequence[_Rank], sizes: Sequence[int]) -> Process:
        """To each of them, and on when all of theirs have come."""
        if not peers:
            return
        self._round += 1
        for peer, size in zip(peers, sizes, strict=True):
            sent = self.link.transfer(size, self._machine.latency / 2)
            self._clock.start(_deliver(sent, peer.exchanges, self._round))
        yield self.exchanges.expect(self._round, len(peers))

    def _busy(self, operations: int) -> float:
        seconds = operations / self._machine.compute
        self.busy += seconds
        return seconds


def play(machine: Machine, step: Step) -> Played:
    """The step from the moment at which all ranks begin it until the last one has ended it."""
    clock = Clock()
    ranks = [_Rank(clock, machine, step, t, c) for c in range(step.context) for t in range(step.tensor)]
    for rank in ranks:
        for process in (rank.compute(ranks), *rank.copies.processes()):
            clock.start(process)
    return Played(
        clock.run(),
        max(rank.busy for rank in ranks),
        max(rank.link.carried for rank in ranks),
        max(rank.copies.host_link.carried for rank in ranks),
        max(rank.copies.disk.carried for rank in ranks),
    )


def _deliver(sent: Event, inbox: Inbox, number: int) -> Process:
    yield sent
    inbox.deliver(number)


def _pieces(num_bytes: int) -> list[int]:
    return [min(WEIGHT_PIECE, num_bytes - start) for start in range(0, num_bytes, WEIGHT_PIECE)]
