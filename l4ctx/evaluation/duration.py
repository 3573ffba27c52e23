"""How long a recall run takes: closed forms of everything that is read and answered, at the speed of this machine.

Of a CPU. Where the speed comes from is left to the caller.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from l4ctx.planning.speed import Speed
from l4ctx.run.forms import read_a_token
from model.costs import Operations, answering_operations, reading_operations

if TYPE_CHECKING:
    from l4ctx.evaluation.needle import Prepared, Text
    from l4ctx.evaluation.recall import Work
    from l4ctx.planning.memory_plan import MemoryPlan
    from l4ctx.planning.workload import Capacity

A_LAYER = 0.0015
"""Seconds of one layer and one answer in a forward beside its products: steps of Python and PyTorch. Measured on two
models with one thread."""

MEMORY_RATE = 10e9
"""Bytes of weights that a forward reads from memory in a second: that of ordinary machines, rounded down."""


class Duration(NamedTuple):
    """Seconds."""

    reading: float
    answering: float  # if every answer is as long as it may be


def duration(prepared: Prepared, work: Work, plan: MemoryPlan, speed: Speed, capacity: Capacity) -> Duration:
    """All texts with all questions about them; `plan` is that of the longest."""
    each = [_of(prepared, text, plan, speed, capacity) for text in work.texts]
    return Duration(sum(one.reading for one in each), sum(one.answering for one in each))


def _of(prepared: Prepared, text: Text, plan: MemoryPlan, speed: Speed, capacity: Capacity) -> Duration:
    config, start, rows = prepared.config, text.length - prepared.room, plan.workload.rows
    assert rows is not None
    sealed = plan.layout.sealed_rows(start)
    on_disk = plan.residency.split(sealed)[2] * plan.layout.row_bytes  # read again by each forward behind all of it
    steps = -(-start // plan.prefill_chunk_size)
    fetched = plan.weight_residency.read_a_step * steps + on_disk * steps // 2
    reading = max(speed.seconds(reading_operations(config, 0, start)), fetched / capacity.reading)

    questions = [prepared.question_tokens(case.needle.question) for case in text.cases]
    tokens = len(questions) * prepared.options.max_new_tokens
    forwards = -(-len(questions) // rows.count) * prepared.options.max_new_tokens
    computing = sum(speed.seconds(reading_operations(config, start, start + one)) for one in questions)
    computing += tokens * speed.seconds(_answering(prepared, text.length))
    computing += tokens * config.num_hidden_layers * A_LAYER + forwards * plan.workload.weights / MEMORY_RATE
    return Duration(reading, max(computing, forwards * (read_a_token(plan) + on_disk) / capacity.reading))


def _answering(prepared: Prepared, length: int) -> Operations:
    """Of one token of an answer, behind a whole text."""
    linear = answering_operations(prepared.config, 0)
    return Operations(linear, 0, answering_operations(prepared.config, length) - linear)
