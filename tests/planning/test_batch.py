"""How many answers at a time a plan has: as many as fit, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cache.residency import fork_bytes
from l4ctx.planning.batch import MOST_ROWS, plan_rows
from l4ctx.planning.fitting import plan_memory
from l4ctx.planning.memory_plan import MARGIN_BYTES, MemoryPlan, MemoryPlanError
from l4ctx.planning.remedies import check
from l4ctx.planning.workload import Capacity, Rows, Workload
from model.config import TextConfig
from model.costs import activation_bytes

CONFIG = TextConfig.from_dict(
    {
        "model_type": "llama4_text",
        "vocab_size": 97,
        "hidden_size": 42,
        "intermediate_size": 22,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "num_local_experts": 3,
        "attention_chunk_size": 64,
        "max_position_embeddings": 4096,
        "no_rope_layer_interval": 2,
    }
)
WORKLOAD = Workload(CONFIG, 1000, 90, weights=10_000, weights_are_mapped=False, dtype="float32", prefill_chunk_size=256)
ROWS = Rows(count=50, question=20, room=90)
ROW_BYTES = fork_bytes(WORKLOAD.layout, 90) + 4 * CONFIG.vocab_size
FREE = Capacity()


def needed(count: int) -> int:
    plan = plan_memory(replace(WORKLOAD, rows=replace(ROWS, count=count)), FREE)
    return plan.needed + MARGIN_BYTES


def test_each_row_costs_its_own_tokens_alone() -> None:
    without = plan_memory(WORKLOAD, FREE)
    for count in (1, 2, 7):
        assert needed(count) == without.needed + MARGIN_BYTES + count * ROW_BYTES
    assert fork_bytes(WORKLOAD.layout, 90) == 5 * 90 * 2 * 2 * 10 * 4


def test_questions_of_all_rows_are_read_at_once() -> None:
    """Also where nothing else is read: the activations are those of the longest questions, up to a prefill chunk."""
    read = replace(WORKLOAD, new_tokens=3)
    for count, step in ((1, 20), (3, 60), (50, 256)):
        plan = plan_memory(replace(read, rows=replace(ROWS, count=count)), FREE)
        assert plan.activations == activation_bytes(CONFIG, step, 4)


@pytest.mark.parametrize("fitting", [1, 2, 3, 17, MOST_ROWS])
def test_as_many_as_fit(fitting: int) -> None:
    capacity = Capacity(host=needed(fitting) + ROW_BYTES // 2)
    plan = plan_rows(WORKLOAD, capacity, ROWS, is_chosen=False)
    assert plan.workload.rows == replace(ROWS, count=fitting) and not plan.shortfalls(capacity)
    chosen = replace(ROWS, count=fitting)
    assert plan_rows(WORKLOAD, capacity, chosen, is_chosen=True).workload.rows == chosen
    too_many = replace(ROWS, count=fitting + 1)
    with pytest.raises(MemoryPlanError, match=f"--batch {fitting + 1}: .* --batch {fitting} fits"):
        plan_rows(WORKLOAD, capacity, too_many, is_chosen=True)


def test_no_more_than_pay_or_are_asked() -> None:
    assert plan_rows(WORKLOAD, FREE, ROWS, is_chosen=False).workload.rows == replace(ROWS, count=MOST_ROWS)
    few = replace(ROWS, count=3)
    assert plan_rows(WORKLOAD, FREE, few, is_chosen=False).workload.rows == few
    assert plan_rows(WORKLOAD, FREE, ROWS, is_chosen=True).workload.rows == ROWS


@pytest.mark.parametrize("is_chosen", [False, True])
def test_where_not_even_one_fits(is_chosen: bool) -> None:
    capacity = Capacity(host=needed(1) - 1)
    plan = plan_rows(WORKLOAD, capacity, ROWS, is_chosen=is_chosen)
    assert plan.workload.rows == replace(ROWS, count=1)
    with pytest.raises(MemoryPlanError, match="this run needs"):
        check(plan, capacity)


def test_rows_take_accelerator_memory() -> None:
    def plan(count: int) -> MemoryPlan:
        capacity = Capacity(host=2**40, accelerator=2**40)
        return plan_rows(WORKLOAD, capacity, replace(ROWS, count=count), is_chosen=True)

    assert plan(9).needed_on_accelerator - plan(4).needed_on_accelerator == 5 * ROW_BYTES
    assert plan(9).needed == plan(4).needed
