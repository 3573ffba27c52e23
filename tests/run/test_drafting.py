"""What one more token of a step costs, by what the model and the prompt are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cache.residency import Residency
from l4ctx.planning.fitting import plan_memory
from l4ctx.planning.memory_plan import MemoryPlan
from l4ctx.planning.workload import Workload
from l4ctx.run.drafting import CPU_OPERATIONS, row_cost
from model.config import TextConfig
from model.costs import parameter_count

CONFIG = TextConfig.from_dict(
    {
        "model_type": "llama4_text",
        "hidden_size": 512,
        "intermediate_size": 1024,
        "intermediate_size_mlp": 2048,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_local_experts": 1,
        "vocab_size": 1000,
        "moe_layers": [],
        "max_position_embeddings": 2**24,
    }
)


def plan(bits: int, tokens: int = 1000, config: TextConfig = CONFIG, kv_dtype: str = "float32") -> MemoryPlan:
    weights = parameter_count(config) * bits // 8
    return plan_memory(Workload(config, tokens, 100, weights, False, "float32", kv_dtype=kv_dtype))


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_of_short_prompts_by_the_weights(bits: int) -> None:
    """Two operations a weight, for as many bytes as it has."""
    computed = 2 / CPU_OPERATIONS
    assert row_cost(plan(bits, 1)) == pytest.approx(computed / (bits / 8 + computed), rel=0.05)


@pytest.mark.parametrize(("kv_dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_of_long_prompts_by_keys_and_values(kv_dtype: str, size: int) -> None:
    """Each element is multiplied with one of every query head of its group: here two."""
    computed = 2 * 2 / CPU_OPERATIONS
    found = row_cost(plan(16, 2**23, kv_dtype=kv_dtype))
    assert found == pytest.approx(computed / (size + computed), rel=0.02)


def test_less_where_reading_is_slow_or_computing_is_quick() -> None:
    here = plan(16, 2**20)
    on_disk = replace(here, residency=Residency(host_rows=0))
    on_accelerator = replace(here, residency=Residency(on_accelerator=True, device_rows=10**6))
    assert 0 < row_cost(on_accelerator) < row_cost(on_disk) < row_cost(here) / 2 < 0.5


def test_more_where_another_token_reads_experts_of_its_own() -> None:
    experts = replace(CONFIG, moe_layers=(0, 1, 2, 3), num_local_experts=16)
    alike = replace(experts, num_local_experts=1)
    assert row_cost(plan(16, config=alike)) < row_cost(plan(16, config=experts)) < 1
