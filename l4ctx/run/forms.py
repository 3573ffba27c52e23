"""Which published form of a model fits this machine: what each takes, and how it would run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from l4ctx.planning.memory_plan import MemoryPlan
from l4ctx.planning.published import PUBLISHED
from l4ctx.planning.workload import Capacity, Workload
from l4ctx.run.weights import Weights

Seconds = Callable[[MemoryPlan], float | None]


@dataclass(frozen=True)
class FormPlan:
    """One form of the model for the same tokens on the same machine."""

    name: str
    plan: MemoryPlan
    fits: bool
    seconds: float | None  # to read the prompt; None: no rate is known

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "weights": self.plan.workload.weights,
            "fits": self.fits,
            "streamed_a_step": self.plan.weight_residency.read_a_step,
            "seconds": self.seconds,
        }


def form_plans(workload: Workload, capacity: Capacity, seconds: Seconds) -> Iterator[FormPlan]:
    """All published forms, the largest first. `seconds`: that a plan takes to read its prompt."""
    for form in PUBLISHED:
        weights = Weights.in_form(form, workload.config, "bfloat16")
        other = replace(
            workload,
            weights=weights.bytes_in(workload.dtype),
            weights_are_mapped=capacity.accelerator is None,
            stored=weights.stored,
            stored_dtype="bfloat16",
        )
        plan = MemoryPlan.of(other, capacity)
        yield FormPlan(form.name, plan, not plan.shortfalls(capacity), seconds(plan))
