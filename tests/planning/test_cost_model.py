"""The time left, on runs whose costs are known, and the line that shows it."""

from __future__ import annotations

import itertools
import math
import random
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial

import pytest

from cache.residency import KVBytes
from l4ctx.cli.console import shortened
from l4ctx.cli.progress import Reading, _rate
from l4ctx.cli.wrapping import cells
from l4ctx.engine.prefill import PrefillProgress
from l4ctx.planning.cost_model import CHANGE_STEPS, CostModel
from l4ctx.spans import Span
from model.config import TextConfig
from model.costs import reading_operations

SCOUT = TextConfig.from_dict({"model_type": "llama4_text"})  # attention costs as much as the rest at 150,000 tokens
LINEAR_ONLY = replace(SCOUT, num_hidden_layers=4, no_rope_layers=(1, 1, 1, 0), moe_layers=(0, 1, 2, 3))
SECONDS = 1e-12  # of one operation
SHARES = (0.25, 0.5, 0.75)


def cost_model(config: TextConfig, start: int, stop: int) -> CostModel:
    return CostModel(partial(reading_operations, config), start, stop)


@dataclass(frozen=True)
class Run:
    """A machine on which operations of full attention cost `ratio` times as much as others, and what happens there."""

    tokens: int = 2**20
    ratio: float = 1.0
    config: TextConfig = SCOUT
    start: int = 0
    noise: float = 0.08  # standard deviation of a step's time, as a share of it
    first: float = 1.0  # slowness of the first step,
    late: float = 1.0  # of the second half,
    hiccups: float = 0.0  # and, of this share of the steps, four times
    step: int = 8192

    def steps(self, seed: int) -> list[tuple[int, int, float]]:
        """(start, stop, seconds) of every step."""
        rng = random.Random(seed)
        cuts = [*range(self.start, self.tokens, self.step), self.tokens]
        found = []
        for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
            work = reading_operations(self.config, start, stop)
            seconds = SECONDS * (work.linear + work.chunked_attention + self.ratio * work.full_attention)
            seconds *= math.exp(rng.gauss(0, self.noise))
            seconds *= self.first if number == 0 else 4 if rng.random() < self.hiccups else 1
            found.append((start, stop, seconds * (self.late if 2 * number >= len(cuts) - 1 else 1)))
        return found

    def predictions(self, seed: int, shares: tuple[float, ...] = SHARES) -> list[float]:
        """Predicted by true seconds left after these shares of the steps."""
        cost, steps, found = cost_model(self.config, self.start, self.tokens), self.steps(seed), []
        asked = [round(share * len(steps)) for share in shares]
        for number, step in enumerate(steps, 1):
            cost.observe(*step)
            if number in asked:
                found.append(cost.seconds_left / sum(seconds for _, _, seconds in steps[number:]))
        return found


Bounds = tuple[float, float]  # of predicted by true seconds
ANY = (0.0, math.inf)
RUNS: dict[str, tuple[Run, tuple[Bounds, Bounds, Bounds]]] = {  # after a quarter, a half, three quarters of the steps
    "one rate": (Run(), ((0.87, 1.15), (0.9, 1.1), (0.93, 1.07))),
    "ten million tokens": (Run(10 * 2**20), ((0.96, 1.04), (0.97, 1.03), (0.98, 1.02))),
    "attention ten times dearer": (Run(ratio=10), ((0.88, 1.1), (0.93, 1.07), (0.94, 1.06))),
    "attention ten times cheaper": (Run(ratio=0.1), ((0.85, 1.3), (0.88, 1.13), (0.93, 1.1))),
    "attention free": (Run(ratio=0), ((0.9, 1.4), (0.95, 1.2), (0.95, 1.12))),
    "a slow first step": (Run(first=3), ((0.87, 1.15), (0.9, 1.1), (0.93, 1.07))),
    "half the speed from the middle": (Run(late=2), (ANY, ANY, (0.95, 1.12))),
    "half the speed, attention dearer": (Run(late=2, ratio=10), (ANY, ANY, (0.93, 1.1))),
    "twice the speed from the middle": (Run(late=0.5), (ANY, ANY, (0.9, 1.05))),
    "hiccups": (Run(hiccups=0.03), ((0.65, 1.5), (0.75, 1.2), (0.7, 1.15))),
    "much noise": (Run(noise=0.25), ((0.65, 1.4), (0.75, 1.2), (0.83, 1.2))),
    "32 steps": (Run(2**18), ((0.75, 1.3), (0.85, 1.25), (0.88, 1.2))),
    "32 steps, a slow first one": (Run(2**18, first=3), ((0.75, 1.3), (0.85, 1.25), (0.88, 1.2))),
    "8 steps": (Run(2**16), ((0.8, 1.25), (0.8, 1.3), (0.8, 1.25))),
    "8 steps, a slow first one": (Run(2**16, first=3), ((0.8, 1.25), (0.8, 1.3), (0.8, 1.25))),
    "behind what was there": (Run(start=2**19 + 100, first=3), ((0.9, 1.1), (0.92, 1.08), (0.93, 1.1))),
    "no quadratic work": (Run(config=LINEAR_ONLY), ((0.93, 1.06), (0.95, 1.05), (0.95, 1.06))),
    "no noise": (Run(noise=0), ((0.9999, 1.0001),) * 3),
}


@pytest.mark.parametrize("name", RUNS)
def test_time_left(name: str) -> None:
    run, bounds = RUNS[name]
    for seed in range(12 if run.tokens < 2**21 else 2):
        for share, (low, high), found in zip(SHARES, bounds, run.predictions(seed), strict=True):
            assert low <= found <= high, (seed, share, found)


def test_a_change_of_speed_is_noticed_within_a_few_steps() -> None:
    run = Run(late=2)
    half = len(run.steps(0)) // 2
    for seed in range(12):
        before, after = run.predictions(seed, (0.5, 0.5 + (CHANGE_STEPS + 1) / half / 2))
        assert 0.45 < before < 0.55 and 0.9 < after < 1.25, (before, after)


def test_costs_are_learned() -> None:
    """Also where it began: the price of what is to come is predicted, not only of the rest."""
    for ratio in (0.1, 1.0, 10.0):
        cost, run = cost_model(SCOUT, 0, 2**20), Run(ratio=ratio, noise=0, first=3)
        for step in run.steps(0)[:64]:
            cost.observe(*step)
        for start, stop, seconds in run.steps(0)[1::9]:
            assert cost.seconds(start, stop) == pytest.approx(seconds, rel=0.1)
        assert cost.seconds(5, 5) == 0


def test_after_one_step_both_kinds_cost_the_same() -> None:
    cost = cost_model(SCOUT, 0, 2**20)
    cost.observe(0, 8192, 8.0)
    expected = 8.0 * reading_operations(SCOUT, 8192, 2**20).total / reading_operations(SCOUT, 0, 8192).total
    assert cost.seconds_left == pytest.approx(expected, rel=0.01)
    cost.observe(8192, 2**20, 0.0)  # a clock that stands still
    assert cost.seconds_left == 0 and cost.rates.now > 0


def test_time_left_is_never_negative_or_endless() -> None:
    """Whatever the steps take: faster and faster, or anything at all."""
    rng = random.Random(0)
    for config in (SCOUT, LINEAR_ONLY):
        for shape in (lambda n: 0.5**n, lambda n: 2.0 ** min(n, 60), lambda n: 10 ** rng.uniform(-6, 3)):
            cost = cost_model(config, 0, 100 * 512)
            for number in range(100):
                cost.observe(512 * number, 512 * (number + 1), shape(number))
                assert 0 <= cost.seconds_left < math.inf and (number == 99 or cost.seconds_left > 0)


def test_rates() -> None:
    cost = cost_model(SCOUT, 0, 10**6)
    for number in range(1000):
        cost.observe(100 * number, 100 * (number + 1), 0.1)
    assert cost.rates == pytest.approx((1000, 1000))
    for number in range(1000, 1100):
        cost.observe(100 * number, 100 * (number + 1), 0.2)
    assert cost.rates.now == pytest.approx(500, rel=0.05) and cost.rates.average == pytest.approx(110_000 / 120)
    cost.observe(110_000, 120_000, 100.0)
    assert cost.rates.now == pytest.approx(100, rel=0.05)  # a step that takes longer is the present


def test_it_imports_no_torch() -> None:
    code = "import l4ctx.planning.cost_model, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The line that shows it

SPAN = Span("notes/a rather long name of a document.md", 1000, 9 * 2**20, "")
STOP = 1000 + 10 * 2**20
TIERS = KVBytes(rope_windows=2**20, nope_device=0, nope_host=2**30, nope_disk=9 * 2**30)


def read(reading: Reading, start: int, stop: int, seconds: float, held: KVBytes | None = None) -> None:
    reading.observe(
        PrefillProgress(
            start=start,
            done=stop - start,
            total=stop - start,
            seconds=seconds,
            step=range(start, stop),
            step_seconds=seconds,
            held=held,
        )
    )


def half_read(held: KVBytes | None = TIERS, stop: int = STOP, documents: tuple[Span, ...] = (SPAN,)) -> Reading:
    """Half of ten million tokens behind a thousand that were there, at 175 tokens/s, faster of late."""
    reading = Reading(partial(reading_operations, LINEAR_ONLY), 1000, stop, documents)
    read(reading, 1000, 1000 + 2**21, 20_000.0)
    read(reading, 1000 + 2**21, 1000 + 5 * 2**20, 10_000.0, held)
    return reading


@pytest.fixture(autouse=True)
def frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that stands still, and a process without memory."""
    monkeypatch.setattr("l4ctx.cli.progress.time.monotonic", lambda: 5.0)
    monkeypatch.setattr("l4ctx.cli.progress.process_memory", lambda: None)


def test_the_line_says_all_of_it() -> None:
    line = half_read().line(None, 5.0)
    assert re.fullmatch(
        r"read 5,243,880 of 10,486,760 tokens, \d:\d\d:\d\d h left, 315 tokens/s \(average 175\), "
        r"in notes/a rather long name of a document\.md; KV: memory 1\.0 GiB, disk 9\.0 GiB",
        line,
    )


def test_what_goes_first_when_it_is_narrow() -> None:
    """Whatever the width: the time left is there as long as anything is, then what matters more than the rest."""
    reading, full = half_read(), half_read().line(None, 5.0)
    order = ("left", "tokens/s", ", in ", "KV: ", "average")
    for width in range(15, len(full) + 1):
        line = reading.line(width, 5.0)
        shown = [re.search(part, line) is not None for part in order]
        assert len(line) <= width and shown == sorted(shown, reverse=True), (width, line)
    assert reading.line(len(full), 5.0) == full
    assert re.fullmatch(r"5,243,880 of 10,486,760, \d:\d\d:\d\d h left", reading.line(40, 5.0))
    assert re.fullmatch(r"50%, \d:\d\d:\d\d h left", reading.line(20, 5.0))


def test_before_the_first_step_there_are_numbers() -> None:
    reading = Reading(partial(reading_operations, SCOUT), 0, 500_000, (Span("a.md", 10, 400_000, ""),))
    assert reading.line(None, 17.5) == "reading 0 of 500,000 tokens, 0:12 so far"
    assert reading.line(30, 17.5) == "0 of 500,000, 0:12 so far" and reading.share == 0
    assert reading.line(None, 5.0 + 3725) == "reading 0 of 500,000 tokens, 1:02:05 so far"


def test_what_was_there_already_counts_as_done() -> None:
    reading = Reading(partial(reading_operations, SCOUT), 131_072, 500_000)
    assert reading.line(None, 5.0).startswith("reading 131,072 of 500,000 tokens")
    read(reading, 131_072, 139_264, 4.0)
    assert reading.line(None, 5.0).startswith("read 139,264 of 500,000 tokens, ") and reading.share == 139_264 / 500_000


def test_the_time_left_runs_down_within_a_step() -> None:
    reading = Reading(partial(reading_operations, LINEAR_ONLY), 0, 40_000)
    read(reading, 0, 10_000, 10.0)
    read(reading, 10_000, 20_000, 10.0)
    assert ", 20 s left" in reading.line(None, 5.0) and ", 12 s left" in reading.line(None, 13.0)
    assert ", 0.0 s left" in reading.line(None, 99.0)


def test_a_long_step_says_which_layer_it_has_reached() -> None:
    reading = Reading(partial(reading_operations, LINEAR_ONLY), 0, 40_000, layer=lambda: "layer 3 of 48")
    assert reading.line(None, 9.9) == "reading 0 of 40,000 tokens, 0:04 so far"
    assert reading.line(None, 65.0) == "reading 0 of 40,000 tokens, layer 3 of 48, 1:00 so far"
    assert reading.line(40, 65.0) == "reading 0 of 40,000 tokens, 1:00 so far"
    read(reading, 0, 10_000, 60.0)
    assert "layer" not in reading.line(None, 9.0)
    assert reading.line(None, 15.0).startswith("read 10,000 of 40,000 tokens, layer 3 of 48, ")


def test_the_document_that_is_being_read() -> None:
    documents = (Span("first.md", 10, 100, ""), Span("second.md", 100, 250, ""))
    reading = Reading(partial(reading_operations, SCOUT), 0, 300, documents)
    for stop, name in ((10, "first.md"), (90, "first.md"), (100, "second.md"), (249, "second.md"), (250, None)):
        read(reading, reading._done, stop, 0.1)
        line = reading.line(None, 5.0)
        assert (f", in {name}" in line) if name else (", in " not in line)


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("short.md", 8, "short.md"),
        ("docs/chapter one.md", 12, "docs/…one.md"),
        ("docs/chapter one.md", 1, "…"),
        ("文件夾/文件.md", 9, "文件….md"),
        ("abc", 2, "…c"),
    ],
)
def test_names_are_shortened_in_the_middle(text: str, width: int, expected: str) -> None:
    assert shortened(text, width) == expected and cells(expected) <= width


@pytest.mark.parametrize(
    ("held", "shown"),
    [
        (None, "document.md"),
        (KVBytes(2**20, 0, 2**20, buffers=2**20), "; KV: memory 3.0 MiB"),
        (KVBytes(2**20, 2**20, 0), "; KV: accelerator 2.0 MiB"),
        (KVBytes(2**20, 2**20, 2**30, 2**31, 2**29), "; KV: accelerator 2.0 MiB, memory 1.5 GiB, disk 2.0 GiB"),
    ],
)
def test_keys_and_values_by_tier(held: KVBytes | None, shown: str) -> None:
    assert half_read(held).line(None, 5.0).endswith(shown)


def test_rates_of_all_sizes() -> None:
    shown = [_rate(rate) for rate in (24_310.4, 10.4, 9.96, 2.345, 0.081)]
    assert shown == ["24,310", "10", "10", "2.3", "0.081"]
