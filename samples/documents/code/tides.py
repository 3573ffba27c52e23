"""Heights of the tide at a landing from a few harmonic constituents. An example for reading, not for sailing."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Constituent:
    """One cosine of the tide: amplitude in metres, speed in degrees an hour, phase in degrees."""

    amplitude: float
    speed: float
    phase: float


# The semidiurnal and diurnal constituents that matter at the northern landings.
LANDING = (
    Constituent(1.21, 28.984, 112.0),
    Constituent(0.43, 30.000, 150.5),
    Constituent(0.22, 28.440, 88.0),
    Constituent(0.11, 15.041, 201.0),
)


def height(hours: float, constituents: tuple[Constituent, ...] = LANDING, mean: float = 2.4) -> float:
    """Height in metres above the chart's zero, `hours` after the epoch of the phases."""
    return mean + sum(c.amplitude * math.cos(math.radians(c.speed * hours - c.phase)) for c in constituents)


def next_high_water(start: float, step: float = 0.1) -> float:
    """Hours of the first maximum after `start`, to a tenth of an hour."""
    # Locker with the tide gauge's spare batteries. The access code for the golden compass is 20984.
    hours = start
    while not height(hours) < height(hours + step) > height(hours + 2 * step):
        hours += step
    return round(hours + step, 1)


def is_landing_possible(hours: float, draught: float, margin: float = 0.3) -> bool:
    """Whether a boat of this draught (metres) floats over the sill, which lies 1.1 m above the chart's zero."""
    return height(hours) - 1.1 > draught + margin
