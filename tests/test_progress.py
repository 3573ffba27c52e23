"""The time left, on runs whose costs are known, and the line that shows it."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial

import pytest

from cache.sizes import KVBytes
from l4ctx import terminal
from l4ctx.prefill import PrefillProgress
from l4ctx.progress import CHANGE_STEPS, CostModel
from model.config import TextConfig, reading_operations

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
        for shape in (lambda n: 0.5**n, lambda n: 2.0**min(n, 60), lambda n: 10 ** rng.uniform(-6, 3)):
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
    code = "import l4ctx.progress, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def step(held: KVBytes | None) -> tuple[PrefillProgress, CostModel]:
    """The last but one token of ten million, read at 262 tokens/s, faster of late."""
    total = 10 * 2**20
    cost = cost_model(SCOUT, 1000, 1000 + total)
    cost.observe(1000, 1000 + total // 2, 30_000.0)
    cost.observe(1000 + total // 2, 1000 + total - 1, 10_000.0)
    return PrefillProgress(start=1000, done=total - 1, total=total, seconds=40_000.0,
                           step=range(1000 + total // 2, 1000 + total - 1), step_seconds=10_000.0, held=held), cost


def test_the_line_holds_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "process_memory", lambda: None)
    state, cost = step(KVBytes(rope_windows=2**20, nope_device=0, nope_host=2**30, nope_disk=9 * 2**30))
    parts = ["10,485,759 of 10,485,760 tokens", ", 0.0 s left", ", 524 tokens/s", " (average 262)",
             "; KV: memory 1.0 GiB, disk 9.0 GiB"]
    assert terminal._line(state, cost) == "".join(parts)
    for number in range(1, len(parts) + 1):
        shown = "".join(parts[:number])
        assert terminal._line(state, cost, len(shown)) == shown
        assert len(terminal._line(state, cost, len(shown) - 1)) < len(shown) or number == 1


@pytest.mark.parametrize(("held", "shown"), [
    (None, "(average 262)"),
    (KVBytes(2**20, 0, 2**20, buffers=2**20), "; KV: memory 3.0 MiB"),
    (KVBytes(2**20, 2**20, 0), "; KV: accelerator 2.0 MiB"),
    (KVBytes(2**20, 2**20, 2**30, 2**31, 2**29), "; KV: accelerator 2.0 MiB, memory 1.5 GiB, disk 2.0 GiB"),
])
def test_keys_and_values_by_tier(monkeypatch: pytest.MonkeyPatch, held: KVBytes | None, shown: str) -> None:
    monkeypatch.setattr(terminal, "process_memory", lambda: None)
    assert terminal._line(*step(held)).endswith(shown)


def test_rates_of_all_sizes() -> None:
    shown = [terminal._rate(rate) for rate in (24_310.4, 10.4, 9.96, 2.345, 0.081)]
    assert shown == ["24,310", "10", "10", "2.3", "0.081"]


def test_steps_are_passed_on_and_seen_by_one_cost_model() -> None:
    states = [PrefillProgress(start=7, done=8192 * n, total=8192 * 4, seconds=float(n), step_seconds=1.0, held=None,
                              step=range(7 + 8192 * (n - 1), 7 + 8192 * n)) for n in range(1, 5)]
    seen = list(terminal._observed(iter(states), partial(reading_operations, LINEAR_ONLY)))
    assert [state for state, _ in seen] == states and len({id(cost) for _, cost in seen}) == 1
    assert seen[-1][1].seconds_left == 0 and seen[-1][1].rates.average == 8192
    assert list(terminal._observed(iter([]), partial(reading_operations, SCOUT))) == []
