"""The closed form of `l4ctx plan` for GPUs against a simulation of the same steps by events, and DESIGN.md's tables."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from l4ctx.planning.mesh import Mesh
from l4ctx.planning.mesh_time import Rates
from l4ctx.planning.workload import Capacity
from samples.simulations.events import Clock, Event, Inbox, Link, Process, Slots
from samples.simulations.scaling import GIB, PEAK, Case, hiding, hiding_rows, scaling, scaling_rows
from support.places import ROOT

SLOW = Rates(compute=593e12, link=50e9, host_link=10e9, disk=2e9)
QUICK = Rates(compute=2e15, link=400e9, host_link=50e9, disk=10e9)


def case(form: str, mesh: Mesh, rates: Rates, chunk: int | None = None, tokens: int = 500_000, **options: int) -> Case:
    kv_dtype = "int8" if form == "w4a16" else "auto"
    capacity = Capacity(disk_folder="disk", **{"accelerator": 141 * GIB, **options})
    return Case(form, form, tokens, mesh, capacity, rates, kv_dtype, chunk)


CASES = [
    case("bfloat16", Mesh(8, 1), SLOW),
    case("bfloat16", Mesh(2, 4), SLOW, kv_device=0),
    case("bfloat16", Mesh(1, 2), QUICK),  # weights are streamed
    case("bfloat16", Mesh(4, 1), QUICK, 2048, kv_device=2 * GIB),  # one half of the blocks is streamed
    case("FP8", Mesh(1, 4), QUICK, accelerator=80 * GIB),
    case("FP8", Mesh(1, 3), SLOW, accelerator=80 * GIB, host=48 * GIB),  # weights from their files
    case("FP8", Mesh(), QUICK, 1024, kv_device=0),
    case("w4a16", Mesh(), SLOW, 16384, accelerator=24 * GIB, host=64 * GIB),
    case("w4a16", Mesh(), QUICK, accelerator=48 * GIB, kv_host=2 * GIB),  # blocks from disk
    case("w4a16", Mesh(4, 2), SLOW, accelerator=24 * GIB, kv_device=GIB),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.form}-{case.mesh.tensor}x{case.mesh.context}")
def test_closed_form_and_simulation_agree(case: Case) -> None:
    """Within 10 %, and in the bytes that are copied exactly; of what ranks send the simulation tells the most."""
    for positions in (case.time.positions(case.time.number_of_steps // 3), case.time.positions(-2)):
        closed, played = case.time.step(positions.start, positions.stop), case.played(positions)
        assert math.isclose(closed.total, played.seconds, rel_tol=0.1), (closed, played)
        traffic = case.time.traffic(positions.start, positions.stop)
        assert (traffic.host, traffic.disk) == (played.copied, played.read)
        assert traffic.between_ranks <= played.sent * (1 + 1e-6) <= traffic.between_ranks * 1.1


def test_the_published_cases_agree_closely() -> None:
    for published in scaling()[-2:]:
        seconds, computing = published.simulated(4)
        closed = published.time.prefill()
        assert math.isclose(closed.total, seconds, rel_tol=0.03)
        assert math.isclose(closed.computing, computing, rel_tol=0.03)


def test_the_tables_of_the_design_are_what_the_command_prints() -> None:
    text = (ROOT / "DESIGN.md").read_text(encoding="utf-8")
    for rows in (scaling_rows(), hiding_rows()):
        assert "\n".join(rows) in text, "python -m samples.simulations.scaling prints what belongs there"


def test_without_links_a_step_takes_what_it_computes() -> None:
    at_once = Rates(compute=1e15, link=math.inf, host_link=math.inf, disk=math.inf)
    alone = case("bfloat16", Mesh(), at_once, 4096, kv_device=0, kv_host=GIB)
    played = alone.played(alone.time.positions(-2))
    assert played.copied > 50 * GIB and played.read > 0
    assert math.isclose(played.seconds, played.computing, rel_tol=1e-9)
    closed = alone.time.step(alone.time.positions(-2).start, alone.time.positions(-2).stop)
    assert math.isclose(played.seconds, closed.total, rel_tol=1e-9)


def test_without_computing_a_step_takes_what_is_copied() -> None:
    at_once = Rates(compute=math.inf, link=math.inf, host_link=1e10, disk=math.inf)
    alone = case("FP8", Mesh(), at_once, 4096, kv_device=0)
    played = alone.played(alone.time.positions(-2))
    assert played.computing == 0 and math.isclose(played.seconds, played.copied / 1e10, rel_tol=1e-9)


def test_longer_prefill_chunks_wait_less_until_they_do_not_wait() -> None:
    """About 3,200 queries at 790 TFLOP/s and 50 GB/s."""
    waits = []
    for chunk in (512, 1024, 2048, 2800, 3400):
        streamed = hiding(chunk)
        played = streamed.played(streamed.time.positions(-2))
        waits.append(1 - played.computing / played.seconds)
    assert all(more > less for more, less in pairwise(waits))
    assert waits[0] > 0.8 and 0.05 < waits[3] < 0.15 and waits[4] < 0.01
    assert PEAK.compute == 790e12


def test_events_happen_in_order() -> None:
    clock = Clock()
    link, ring, inbox, seen = Link(clock, 10.0), Slots(clock, 1), Inbox(clock), []

    def sender(name: str, num_bytes: int) -> Process:
        yield ring.acquire()
        yield link.transfer(num_bytes, latency=0.5)
        seen.append((name, clock.now))
        ring.release()
        inbox.deliver(1)

    def receiver() -> Process:
        yield inbox.expect(1, 2)
        seen.append(("both", clock.now))
        yield 2.0
        seen.append(("later", clock.now))

    for process in (receiver(), sender("a", 10), sender("b", 20)):
        clock.start(process)
    assert clock.run() == 6.0
    assert seen == [("a", 1.5), ("b", 4.0), ("both", 4.0), ("later", 6.0)]
    assert link.carried == 30 and not Event(clock).has_happened


def test_a_link_carries_one_thing_after_another() -> None:
    clock = Clock()
    link, seen = Link(clock, 10.0), []

    def waiting(event: Event) -> Process:
        yield event
        seen.append(clock.now)

    for _ in range(3):
        clock.start(waiting(link.transfer(10)))
    clock.run()
    assert seen == [1.0, 2.0, 3.0]
