"""What images add to a memory plan: the tower's weights, its activations, the pixels of the largest one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from l4ctx.planning.fitting import plan_memory
from l4ctx.planning.memory_plan import MARGIN_BYTES, MemoryPlanError
from l4ctx.planning.remedies import check, remedies
from l4ctx.planning.workload import Capacity, ImageWorkload, Workload
from model.config import TextConfig
from model.vision.config import TILES_AT_A_TIME, VisionConfig, vision_activation_bytes
from support.toy_checkpoints import BASE

GIB = 2**30
TEXT = TextConfig.from_dict({"model_type": "llama4_text", **BASE, "max_position_embeddings": 10**6})
VISION = VisionConfig.from_dict(
    {
        "model_type": "llama4",
        "vision_config": {
            "hidden_size": 1408,
            "num_hidden_layers": 34,
            "num_attention_heads": 16,
            "intermediate_size": 5632,
            "vision_output_dim": 4096,
            "image_size": 336,
            "patch_size": 14,
            "pixel_shuffle_ratio": 0.5,
            "projector_input_dim": 4096,
            "projector_output_dim": 4096,
        },
    }
)
assert VISION is not None
IMAGES = ImageWorkload(
    VISION, parameters=10**8, stored_dtype="bfloat16", tokens=500, pixel_bytes=GIB, largest="chart.png"
)


def workload(**changes: Any) -> Workload:
    return Workload(
        TEXT,
        **(
            {
                "prompt_tokens": 2000,
                "max_new_tokens": 10,
                "weights": 10**6,
                "weights_are_mapped": True,
                "dtype": "bfloat16",
                "stored_dtype": "bfloat16",
            }
            | changes
        ),
    )


def test_what_images_add_in_host_memory() -> None:
    capacity = Capacity(host=3 * GIB)  # the tower's weights are more than a quarter of it would be
    alone, seeing = plan_memory(workload(), Capacity()), plan_memory(workload(images=IMAGES), Capacity())
    activations = vision_activation_bytes(IMAGES.vision, TILES_AT_A_TIME, 2)
    assert alone.images == 0 and seeing.images == GIB + activations
    assert seeing.weights == alone.weights + 2 * 10**8
    assert seeing.needed == alone.needed + seeing.images  # weights are pages of files
    held = plan_memory(workload(images=IMAGES, weights_are_mapped=False), Capacity())
    assert held.needed == seeing.needed + held.weights
    assert plan_memory(workload(images=IMAGES), capacity).shortfalls(capacity) == {}


def test_a_tower_that_is_converted_is_held() -> None:
    """Though the text model's weights are mapped."""
    odd = plan_memory(workload(images=replace(IMAGES, stored_dtype="float32")), Capacity())
    assert odd.weights_are_mapped and odd.workload.held_weights == 2 * 10**8
    assert odd.needed == plan_memory(workload(images=IMAGES), Capacity()).needed + 2 * 10**8


def test_on_an_accelerator_the_tower_is_there_and_the_pixels_are_not() -> None:
    capacity = Capacity(host=8 * GIB, accelerator=8 * GIB)
    alone, seeing = (
        plan_memory(workload(images=images, weights_are_mapped=False), capacity) for images in (None, IMAGES)
    )
    activations = vision_activation_bytes(IMAGES.vision, TILES_AT_A_TIME, 2)
    assert seeing.needed == alone.needed + GIB
    assert seeing.needed_on_accelerator == alone.needed_on_accelerator + 2 * 10**8 + activations


def test_another_dtype_changes_the_tower_too() -> None:
    wide = workload(images=IMAGES, dtype="float32", weights=2 * 10**6)
    narrow = wide.in_dtype("bfloat16", on_accelerator=False)
    assert (wide.tower_weights, narrow.tower_weights) == (4 * 10**8, 2 * 10**8)
    assert narrow.tower_activations == vision_activation_bytes(IMAGES.vision, TILES_AT_A_TIME, 2)
    assert narrow.pixel_bytes == wide.pixel_bytes == GIB


def test_leaving_images_out_is_a_remedy() -> None:
    capacity = Capacity(host=MARGIN_BYTES + GIB)
    plan = plan_memory(workload(images=IMAGES), capacity)
    found = remedies(plan, capacity)
    assert "--no-images makes it fit (chart.png takes 1.0 GiB to decode; scaled down it takes less)" in found
    with pytest.raises(MemoryPlanError, match=r"images 1\.\d GiB\); what helps: "):
        check(plan, capacity)
    without = workload(images=IMAGES, new_tokens=700).without_images()
    assert (without.images, without.prompt_tokens, without.read_tokens) == (None, 1500, 200)
    assert not any(
        "--no-images" in remedy for remedy in remedies(plan_memory(workload(weights=GIB), capacity), capacity)
    )
