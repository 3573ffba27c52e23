"""Makes a failing input smaller: hypothesis draws the changes, and shrinks what they were drawn from."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis import strategies as st

from fuzz.inputs import Files, Reader, mutated

QUIET: dict[str, Any] = {
    "database": None,
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "verbosity": Verbosity.quiet,
}


def by_seed(examples: int) -> settings:
    """The same examples in every run."""
    return settings(max_examples=examples, derandomize=True, phases=[Phase.generate, Phase.shrink], **QUIET)


@st.composite
def changed(draw: st.DrawFn, reader: Reader, most_changes: int = 3) -> tuple[str, Files]:
    """The name of a valid input, and that input with changes."""
    seeds = reader.seeds()
    name = draw(st.sampled_from(sorted(seeds)))
    draws = draw(st.lists(st.randoms(use_true_random=False), min_size=1, max_size=most_changes))
    return name, mutated(reader, seeds[name], draws)
