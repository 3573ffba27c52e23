"""The vision part of config.json: every published form, the defaults, and refusals that name the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.errors import ConfigError
from model.vision.config import VisionConfig, vision_activation_bytes, vision_operations, vision_parameter_count
from support.places import SHARED

VISION: dict[str, Any] = {
    "hidden_size": 1408,
    "num_hidden_layers": 34,
    "num_attention_heads": 16,
    "intermediate_size": 5632,
    "vision_output_dim": 4096,
    "image_size": 336,
    "patch_size": 14,
    "pixel_shuffle_ratio": 0.5,
    "num_channels": 3,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
    "rope_theta": 10000,
    "hidden_act": "gelu",
    "multi_modal_projector_bias": False,
    "norm_eps": 1e-5,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
}


def raw(**changes: Any) -> dict[str, Any]:
    """A config.json's content; fields changed to `...` are left out."""
    vision = {name: value for name, value in (VISION | changes).items() if value is not ...}
    return {"model_type": "llama4", "image_token_index": 200092, "text_config": {}, "vision_config": vision}


def parsed(content: dict[str, Any]) -> VisionConfig:
    config = VisionConfig.from_dict(content)
    assert config is not None
    return config


def test_released_shape() -> None:
    config = parsed(raw())
    assert (config.patches_per_tile, config.tokens_per_tile, config.head_dim, config.shuffle) == (576, 144, 88, 2)
    assert (config.rope_theta, config.image_token_index) == (10000.0, 200092)


@pytest.mark.parametrize("name", ["scout", "maverick"])
@pytest.mark.skipif(not (SHARED / "llama4").exists(), reason="without the released configurations")
def test_released_files(name: str) -> None:
    assert VisionConfig.from_folder(SHARED / "llama4" / name) == parsed(raw())


def test_forms_of_5x_files() -> None:
    in_5x = raw(rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    assert parsed(in_5x) == parsed(raw())
    assert parsed(raw(image_size=[336, 336], patch_size=[14, 14])) == parsed(raw())
    both = raw(rope_theta=10000, rope_parameters={"rope_theta": 70.0})
    assert parsed(both).rope_theta == 70.0


def test_absent_fields_have_the_defaults_of_transformers() -> None:
    fitting = {"hidden_size": 1408, "projector_output_dim": 7680, "projector_input_dim": 7680}
    config = parsed({"model_type": "llama4", "vision_config": fitting})
    assert config == VisionConfig(
        hidden_size=1408,
        num_hidden_layers=34,
        num_attention_heads=16,
        num_channels=3,
        intermediate_size=5632,
        vision_output_dim=7680,
        image_size=448,
        patch_size=14,
        pixel_shuffle_ratio=0.5,
        projector_input_dim=7680,
        projector_output_dim=7680,
        rope_theta=10000.0,
        image_token_index=200092,
    )
    assert parsed(raw(**dict.fromkeys(("image_size", "patch_size", "hidden_act", "rope_theta")))).image_size == 448
    fields = {"hidden_size": 768, "intermediate_size": 5632, "projector_input_dim": 4096, "projector_output_dim": 4096}
    with pytest.raises(ConfigError, match="intermediate_size: 5632 is not 3072"):  # all defaults: they do not fit
        parsed({"model_type": "llama4", "vision_config": fields})
    with pytest.raises(ConfigError, match="intermediate_size: 5632 is not 3072"):
        parsed({"model_type": "llama4", "vision_config": {}})


def test_defaults_are_those_of_transformers() -> None:
    from transformers import Llama4Config, Llama4VisionConfig

    theirs = Llama4VisionConfig(hidden_size=1408, projector_output_dim=7680, projector_input_dim=7680)
    ours = parsed(
        {
            "model_type": "llama4",
            "vision_config": {"hidden_size": 1408, "projector_output_dim": 7680, "projector_input_dim": 7680},
        }
    )
    for name in VisionConfig.__dataclass_fields__.keys() - {"rope_theta", "image_token_index"}:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.image_token_index == Llama4Config().image_token_index
    again = parsed({"model_type": "llama4", "vision_config": json.loads(theirs.to_json_string(use_diff=False))})
    assert again == ours


def test_text_only_checkpoints(tmp_path: Path) -> None:
    for content in (
        {"model_type": "llama4_text", "hidden_size": 5120},
        {"model_type": "llama4", "text_config": {}},
        {"model_type": "llama4", "text_config": {}, "vision_config": None},
    ):
        assert VisionConfig.from_dict(content) is None
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert VisionConfig.from_folder(tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 1408.0}, "hidden_size: 1408.0 is not a positive integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers: True is not"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0 is not"),
        ({"num_hidden_layers": 1001}, "num_hidden_layers: 1001 is more than 1,000"),
        ({"num_attention_heads": "16"}, "num_attention_heads: '16' is not"),
        ({"num_attention_heads": 15}, r"hidden_size: 1408 is not a multiple of num_attention_heads \(15\)"),
        ({"num_attention_heads": 64}, "hidden_size: 1408 in 64 heads of 22, which is not a multiple of 4"),
        ({"num_channels": 1}, "num_channels: 1 is not supported"),
        ({"image_size": 337}, r"image_size: 337 is not a multiple of patch_size \(14\)"),
        ({"image_size": [336, 672]}, r"image_size: \[336, 672\] is not a square"),
        ({"patch_size": [14]}, r"patch_size: \[14\] is not a square"),
        ({"patch_size": ["14", "14"]}, "patch_size: '14' is not a positive integer"),
        ({"image_size": 336.5}, "image_size: 336.5 is not"),
        ({"image_size": 14_350}, "image_size: 14350 is more than 1024 patches of 14"),
        ({"image_size": 322}, "pixel_shuffle_ratio: 0.5 does not divide a side of 23 patches"),
        ({"pixel_shuffle_ratio": 0.4}, "pixel_shuffle_ratio: 0.4 is not 1/n"),
        ({"pixel_shuffle_ratio": 0.3333}, "pixel_shuffle_ratio: 0.3333 is not 1/n"),
        ({"pixel_shuffle_ratio": 2}, "pixel_shuffle_ratio: 2.0 is not 1/n"),
        ({"pixel_shuffle_ratio": 0}, "pixel_shuffle_ratio: 0.0 is not 1/n"),
        ({"pixel_shuffle_ratio": 5e-324}, "pixel_shuffle_ratio: 5e-324 is not 1/n"),
        ({"pixel_shuffle_ratio": float("nan")}, "pixel_shuffle_ratio: nan is not"),
        ({"pixel_shuffle_ratio": "0.5"}, "pixel_shuffle_ratio: '0.5' is not"),
        ({"pixel_shuffle_ratio": 0.25}, "intermediate_size: 5632 is not 22528"),
        ({"intermediate_size": 5631}, "intermediate_size: 5631 is not 5632"),
        ({"projector_input_dim": 4095}, r"projector_input_dim: 4095 is not projector_output_dim \(4096\)"),
        ({"vision_output_dim": 7680}, r"vision_output_dim: 7680 is not projector_output_dim \(4096\)"),
        ({"hidden_act": "gelu_tanh"}, "hidden_act: 'gelu_tanh' is not supported; must be gelu"),
        ({"hidden_act": ["gelu"]}, "hidden_act: .* is not supported; must be gelu"),
        ({"multi_modal_projector_bias": True}, "multi_modal_projector_bias: true is not supported"),
        ({"multi_modal_projector_bias": "no"}, "multi_modal_projector_bias: 'no' is neither"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy: 'full' is not supported"),
        ({"rope_theta": 0}, "rope_theta: 0.0 is not a positive number"),
        ({"rope_theta": "big"}, "rope_theta: 'big' is not"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta: -1 is not"),
        ({"rope_parameters": [1]}, "rope_parameters: not an object"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type: 'yarn' is not supported"),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^vision_config.{message}"):
        VisionConfig.from_dict(raw(**changes))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(raw(**changes)))
    with pytest.raises(ConfigError, match=message) as caught:
        VisionConfig.from_folder(tmp_path)
    assert str(caught.value).startswith(f"{file}: vision_config.") and "\n" not in str(caught.value)


def test_refusals_outside_the_vision_part(tmp_path: Path) -> None:
    for content, message in (
        ([], "the top level is not an object"),
        (raw() | {"vision_config": [1]}, "^vision_config: not an object"),
        (raw() | {"image_token_index": "x"}, "^image_token_index: 'x' is not"),
    ):
        with pytest.raises(ConfigError, match=message):
            VisionConfig.from_dict(content)
    with pytest.raises(ConfigError, match=r"no config\.json there"):
        VisionConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read as JSON"):
        VisionConfig.from_folder(tmp_path)


def test_closed_forms_by_hand() -> None:
    """One layer of two heads of 4, four patches of 2 x 2 pixels joined into one token, a text width of 5."""
    config = parsed(
        raw(
            hidden_size=8,
            num_attention_heads=2,
            num_hidden_layers=1,
            image_size=4,
            patch_size=2,
            intermediate_size=32,
            vision_output_dim=3,
            projector_input_dim=3,
            projector_output_dim=3,
        )
    )
    layer = 4 * 64 + 2 * 8 * 32
    adapter = 32 * 3 + 3 * 3 + 3 * 5
    biases = 4 * 8 + 32 + 8
    assert vision_parameter_count(config, 5) == 12 * 8 + 8 + 5 * 8 + 4 * 8 + layer + biases + 4 * 8 + adapter
    one = 2 * (4 * 12 * 8 + 5 * layer + 2 * 5 * 5 * 8 + adapter)
    assert vision_operations(config, 5, 1) == one
    assert vision_operations(config, 5, 17) == 17 * one
    for itemsize in (2, 4):
        few, many = (vision_activation_bytes(config, tiles, itemsize) for tiles in (1, 17))
        assert few < many <= 17 * few


def test_sizes_of_the_released_shape() -> None:
    config = parsed(raw())
    assert vision_parameter_count(config, 5120) == 871_932_416
