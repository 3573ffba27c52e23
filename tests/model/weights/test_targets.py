"""Names, patterns and classes in quantization settings, as compressed-tensors and modelopt spell them."""

from __future__ import annotations

import pytest
import torch

from model.errors import CheckpointError
from model.weights.companions import skipped
from model.weights.targets import matches, weights_settings
from support.groups_in_memory import group

LAYER = "language_model.model.layers.3"
Q_PROJ = f"{LAYER}.self_attn.q_proj"
GATE = f"{LAYER}.feed_forward.experts.7.gate_proj"


@pytest.mark.parametrize(
    ("module", "targets", "expected"),
    [
        (Q_PROJ, [Q_PROJ], 0),
        (Q_PROJ, ["Linear", "re:.*self_attn", Q_PROJ], 0),
        (Q_PROJ, ["Linear", "re:.*self_attn"], 1),
        (Q_PROJ, ["Linear"], 2),
        (Q_PROJ, ["re:self_attn"], None),  # patterns hold from the start
        (Q_PROJ, ["self_attn", "q_proj", "Llama4TextAttention", "Embedding"], None),
        (Q_PROJ, [f"{LAYER}*"], 1),  # modelopt's spelling
        (Q_PROJ, ["vision_model*", "lm_head"], None),
        ("lm_head", ["re:.*lm_head"], 1),
        ("language_model.lm_head", ["re:.*lm_head"], 1),
        (GATE, [r"re:.*\.experts\.\d+\.(gate|up)_proj$"], 1),
        (f"{LAYER}.feed_forward.router", ["re:.*router", "re:.*lm_head"], 1),
        (GATE, None, None),
        (GATE, [], None),
        (GATE, "Linear", None),
        (GATE, [3, None, {"a": 1}], None),
        (GATE, {"re:.*experts": 1}, 1),
    ],
)
def test_targets(module: str, targets: object, expected: int | None) -> None:
    assert matches(module, targets) == expected


@pytest.mark.parametrize("pattern", ["re:(a+)+b", "re:.*.*.*.*.*x", "re:([a-z]*)*q", "re:(x{1,9}){1,9}y"])
def test_patterns_that_could_take_for_ever_are_refused(pattern: str) -> None:
    with pytest.raises(CheckpointError, match="repeats too much"):
        matches(Q_PROJ, [pattern])


@pytest.mark.parametrize("pattern", ["re:(", "re:[", "re:*x", "re:a{99999999999}"])
def test_patterns_that_are_none_are_refused(pattern: str) -> None:
    with pytest.raises(CheckpointError, match="is not one"):
        matches(Q_PROJ, [pattern])


GROUPS = {
    "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8}},
    "group_1": {"targets": ["re:.*experts"], "weights": {"num_bits": 4}},
    "group_2": {"targets": [f"{LAYER}.feed_forward.experts.1.up_proj"], "weights": {"num_bits": 2}},
    "group_3": {"targets": ["re:.*shared"], "weights": None},
}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("self_attn.o_proj", {"num_bits": 8}),
        ("feed_forward.experts.1.down_proj", {"num_bits": 4}),
        ("feed_forward.experts.1.up_proj", {"num_bits": 2}),
        ("feed_forward.shared_expert.up_proj", {}),
        ("self_attn.q_proj", {}),
    ],
)
def test_the_most_specific_group_applies_unless_ignored(path: str, expected: object) -> None:
    settings = {"format": "mixed-precision", "config_groups": GROUPS, "ignore": ["re:.*q_proj"]}
    one = group({".weight": torch.zeros(2, 2)}, (2, 2), settings, f"model.layers.3.{path}")
    assert weights_settings(one) == expected


@pytest.mark.parametrize("groups", [None, [], {"a": None}, {"a": {}}, {"a": {"targets": "Linear"}}, "x", 3])
def test_settings_that_say_nothing(groups: object) -> None:
    assert weights_settings(group({".weight": torch.zeros(2, 2)}, (2, 2), {"config_groups": groups})) == {}


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (f"{Q_PROJ}.input_scale", "static activation scales"),
        (f"{GATE}.input_global_scale", "static activation scales"),
        (f"{LAYER}.feed_forward.experts.gate_up_proj_input_scale", "static activation scales"),
        (f"{LAYER}.self_attn.k_proj.k_scale", "scales of a quantized KV cache"),
        (f"{LAYER}.self_attn.v_proj.v_scale", "scales of a quantized KV cache"),
        (f"{LAYER}.self_attn.k_scale", "scales of a quantized KV cache"),
        (f"{LAYER}.self_attn.v_proj.output_scale", "scales of a quantized KV cache"),
        (f"{GATE}.weight_scale", None),
        (f"{LAYER}.feed_forward.experts.0.activation_fn.scales", None),
        (f"{Q_PROJ}.pre_quant_scale", None),
        (f"{Q_PROJ}.weight", None),
    ],
)
def test_tensors_that_weights_are_read_without(name: str, what: str | None) -> None:
    assert skipped(name) == what
