"""Which form of a model fits this machine: what each takes, how it would run, and what reads less from the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from l4ctx.formatting import human_bytes
from l4ctx.planning.fitting import plan_memory
from l4ctx.planning.memory_plan import MemoryPlan
from l4ctx.planning.published import PUBLISHED, plain, quantizing
from l4ctx.planning.remedies import QUANTIZED
from l4ctx.planning.workload import Capacity, Workload
from model.quantization.choice import Quantization

Seconds = Callable[[MemoryPlan], float | None]

WORTH_SAYING = 0.9
"""A smaller form is proposed if it reads less than this share of what is read now."""


@dataclass(frozen=True)
class FormPlan:
    """One form of the model for the same tokens on the same machine."""

    name: str
    plan: MemoryPlan
    fits: bool
    seconds: float | None  # to read the prompt; None: no rate is known

    @property
    def read_a_step(self) -> int:
        """Bytes of weights that each prefill step reads again."""
        return self.plan.weight_residency.read_a_step

    @property
    def is_held(self) -> bool:
        """Whether memory, or the accelerator's, holds all layers."""
        return self.fits and not self.plan.weight_residency.is_streamed and self.plan.device_weights is None

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "weights": self.plan.workload.weights,
            "fits": self.fits,
            "in_memory": self.is_held,
            "streamed_a_step": self.read_a_step,
            "seconds": self.seconds,
        }


def form_plans(workload: Workload, capacity: Capacity, seconds: Seconds) -> Iterator[FormPlan]:
    """All published forms, the largest first. `seconds`: that a plan takes to read its prompt."""
    on_accelerator = capacity.accelerator is not None
    found = [(form.name, form.weights(workload.config)) for form in PUBLISHED]
    for name, weights in sorted(found, key=lambda form: -form[1].num_bytes):
        plan = plan_memory(workload.with_weights(weights, on_accelerator=on_accelerator), capacity)
        yield FormPlan(name, plan, not plan.shortfalls(capacity), seconds(plan))


def reading_less(plan: MemoryPlan, capacity: Capacity, forms: Sequence[FormPlan]) -> list[str]:
    """What a user can do about weights that are read again and again, one line each."""
    residency, workload = plan.weight_residency, plan.workload
    if not residency.is_streamed:
        return []
    found, now = [], human_bytes(residency.read_a_step)
    unlimited = plan_memory(workload, replace(capacity, weights=None))
    if capacity.weights is not None and (left := unlimited.weight_residency.read_a_step) < residency.read_a_step:
        less = f"{human_bytes(left)} instead of {now} a chunk" if left else "memory holds all"
        found.append(f"a larger --weights-memory, or none: {less}")
    smaller = [form for form in forms if form.fits and form.plan.weights < plan.weights]
    held = next((form for form in smaller if form.is_held), None)
    if held is not None:
        found.append(f"a checkpoint in {held.name}: memory holds its {human_bytes(held.plan.weights)}")
    elif smaller and smaller[-1].read_a_step < WORTH_SAYING * residency.read_a_step:
        least = smaller[-1]
        found.append(f"a checkpoint in {least.name}: {human_bytes(least.read_a_step)} instead of {now} a chunk")
    for kind in QUANTIZED if workload.stored is not None and workload.stored.is_plain else ():
        form = quantizing(Quantization(kind), plain(workload.stored_dtype or "bfloat16"))
        made = workload.with_weights(form.weights(workload.config), on_accelerator=False)
        if not plan_memory(made, capacity).shortfalls(capacity):
            found.append(f"--quantize {kind}: memory holds the {human_bytes(made.weights)} that it makes")
            break
    return found


def read_a_token(plan: MemoryPlan) -> int:
    """The most bytes of weights that generating a token reads again: of the experts, those that it uses."""
    config, residency, total = plan.workload.config, plan.weight_residency, 0
    for number, layer in enumerate(residency.layers if residency.is_streamed else ()):
        streamed = residency.streamed(number)
        experts = min(streamed, layer.experts)
        total += streamed - experts + experts * config.num_experts_per_tok // max(1, config.num_local_experts)
    return total
