"""Predicts how long the rest of a prefill takes, by a cost model fitted to the steps that are done."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from model.costs import Operations

FORGETTING = 2
"""Of n steps, the i-th weighs (i / n) ** FORGETTING in the fit: the last third more than all before it, however many
there are, so that noise is averaged over ever more steps while old ones fade."""

PRIOR_WEIGHT = 0.005
"""Of ((a - b) / rate) ** 2 in the fit, beside the squared relative error of each step: costs of both kinds that are as
far apart as the one rate for both weigh like one step missed by 7 %. It decides only where steps cannot."""

OUTLIER = 2.0
"""Outliers are clipped: a step counts as at most this many times longer or shorter than expected."""

CHANGE, CHANGE_STEPS = 1.3, 5
"""If this many steps in a row are all slower, or all faster, than expected by more than this factor, the speed of the
machine has changed."""

NOW_SECONDS = 5.0
"""The current rate averages about the last so many seconds, or the last step if it took longer."""


class Rates(NamedTuple):
    """Tokens per second."""

    now: float
    average: float


class _Step(NamedTuple):
    """Operations of both kinds, seconds taken, and seconds expected by the fit to the steps before."""

    linear: float
    full: float
    seconds: float
    expected: float


Work = Callable[[int, int], Operations]
"""The operations to read positions start .. stop - 1."""


class CostModel:
    """Predicts seconds = a * linear operations + b * operations of full attention, for a run over start .. stop - 1.

    Chunked attention is linear in the length and counts as such. a, b >= 0 minimise the squares of relative errors over
    the steps so far, the recent ones above all, drawn a little towards a = b; running sums hold all that is needed. The
    first step, which warms up, counts only until there is a second one. When the speed of the machine changes, the sums
    are scaled to the new speed: what was learned of b / a stays.
    """

    def __init__(self, work: Work, start: int, stop: int) -> None:
        assert start < stop
        self._work, self._done, self._stop = work, start, stop
        self._steps = 0
        self._sums = _Sums()
        self._costs = (math.nan, math.nan)  # seconds an operation
        self._last: deque[_Step] = deque(maxlen=CHANGE_STEPS)
        self._tokens, self._seconds = 0, 0.0
        self._recent_tokens, self._recent_seconds = 0.0, 0.0

    def observe(self, start: int, stop: int, seconds: float) -> None:
        """A finished step over positions start .. stop - 1."""
        assert start < stop
        seconds = max(seconds, 1e-9)  # of a clock that did not move
        self._observe_rate(stop - start, seconds)
        self._done = stop
        self._steps += 1
        linear, full = self._operations(start, stop)
        if self._steps <= 2:
            self._sums, expected = _Sums(), seconds
        else:
            self._follow_change(_Step(linear, full, seconds, self._predict(linear, full)))
            expected = self._predict(linear, full)
            seconds = min(max(seconds, expected / OUTLIER), expected * OUTLIER)
        self._sums.fade((1 - 1 / self._steps) ** FORGETTING)
        self._sums.add(linear / expected, full / expected, seconds / expected)
        self._costs = self._sums.solve()

    def seconds(self, start: int, stop: int) -> float:
        """Seconds to read positions start .. stop - 1 at the current speed."""
        assert self._steps, "nothing is known before the first step"
        return self._predict(*self._operations(start, stop))

    @property
    def seconds_left(self) -> float:
        """Seconds from the last step observed to the end of the run."""
        return self.seconds(self._done, self._stop)

    @property
    def rates(self) -> Rates:
        assert self._steps, "nothing is known before the first step"
        return Rates(self._recent_tokens / self._recent_seconds, self._tokens / self._seconds)

    def _operations(self, start: int, stop: int) -> tuple[float, float]:
        """Those that grow linearly and quadratically with the length; the latter may be none at all."""
        operations = self._work(start, stop)
        return float(operations.linear + operations.chunked_attention), float(operations.full_attention)

    def _predict(self, linear: float, full: float) -> float:
        return self._costs[0] * linear + self._costs[1] * full

    def _follow_change(self, step: _Step) -> None:
        """Scales the sums when enough steps in a row say that everything takes longer, or less long, than it did."""
        self._last.append(step)
        slowness = [seen.seconds / seen.expected for seen in self._last]
        if len(slowness) == CHANGE_STEPS and (min(slowness) > CHANGE or max(slowness) < 1 / CHANGE):
            self._sums.slow_down(
                statistics.median(seen.seconds / self._predict(seen.linear, seen.full) for seen in self._last)
            )
            self._costs = self._sums.solve()
            self._last.clear()

    def _observe_rate(self, tokens: int, seconds: float) -> None:
        self._tokens += tokens
        self._seconds += seconds
        kept = math.exp(-seconds / NOW_SECONDS)
        self._recent_tokens = self._recent_tokens * kept + tokens
        self._recent_seconds = self._recent_seconds * kept + seconds


class _Sums:
    """Of weighted least squares in two unknowns: x and y of a step are its work of both kinds in operations per
    expected second, t its time as a share of the expected one."""

    def __init__(self) -> None:
        self.xx = self.xy = self.yy = self.xt = self.yt = 0.0

    def add(self, x: float, y: float, t: float) -> None:
        self.xx += x * x
        self.xy += x * y
        self.yy += y * y
        self.xt += x * t
        self.yt += y * t

    def fade(self, kept: float) -> None:
        self._scale(kept, kept)

    def slow_down(self, factor: float) -> None:
        """As if every step so far had taken, and been expected to take, `factor` times as long."""
        self._scale(factor**-2, 1 / factor)

    def solve(self) -> tuple[float, float]:
        """(a, b), both at least 0, that minimise the sum of (a x + b y - t) ** 2 and PRIOR_WEIGHT's term."""
        work = self.xx + 2 * self.xy + self.yy
        time = self.xt + self.yt
        prior = PRIOR_WEIGHT * (work / time) ** 2  # time / work is the best a = b
        determinant = self.xx * self.yy - self.xy**2 + prior * work
        a = (self.yy * self.xt - self.xy * self.yt + prior * time) / determinant
        b = (self.xx * self.yt - self.xy * self.xt + prior * time) / determinant
        if a < 0:  # the least of a convex function lies on the border that the free one is beyond
            return 0.0, self.yt / (self.yy + prior)
        if b < 0:
            return self.xt / (self.xx + prior), 0.0
        return a, b

    def _scale(self, squares: float, times: float) -> None:
        self.xx, self.xy, self.yy = self.xx * squares, self.xy * squares, self.yy * squares
        self.xt, self.yt = self.xt * times, self.yt * times
