"""What a checkpoint's files say about its images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Llama4ImageProcessor

from l4ctx.checkpoint.image_processor import ImageProcessing, ImageProcessingError
from l4ctx.vision.tiles import normalized
from support.places import SHARED

SCOUT = SHARED / "llama4" / "scout"
LLAMA4 = ImageProcessing()


def folder_with(path: Path, content: Any, name: str = "preprocessor_config.json") -> Path:
    path.mkdir(exist_ok=True)
    (path / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_defaults_and_what_transformers_writes(tmp_path: Path) -> None:
    assert ImageProcessing.from_folder(tmp_path, 336) == LLAMA4
    assert ImageProcessing.from_folder(tmp_path, 28) == ImageProcessing(size=28)
    processor = Llama4ImageProcessor(
        size={"height": 28, "width": 28},
        max_patches=5,
        resize_to_max_canvas=True,
        image_mean=[0.25, 0.5, 0.75],
        image_std=[0.5, 0.25, 1.0],
        resample=3,
        rescale_factor=0.5,
        do_normalize=True,
    )
    processor.save_pretrained(tmp_path / "flat")
    expected = ImageProcessing(28, 5, True, (0.25, 0.5, 0.75), (0.5, 0.25, 1.0), 0.5, True, True, 3)
    assert ImageProcessing.from_folder(tmp_path / "flat", 28) == expected
    said = json.loads((tmp_path / "flat" / "preprocessor_config.json").read_text())
    folder = folder_with(tmp_path / "nested", {"image_processor": said, "patch_size": 14}, "processor_config.json")
    assert ImageProcessing.from_folder(folder, 28) == expected
    folder_with(folder, {"max_patches": 3})  # transformers 5 does not look at it then
    assert ImageProcessing.from_folder(folder, 28) == expected
    folder = folder_with(tmp_path / "old", {"patch_size": 14}, "processor_config.json")
    assert ImageProcessing.from_folder(folder_with(folder, {"max_patches": 3}), 336) == ImageProcessing(max_patches=3)


@pytest.mark.skipif(not SCOUT.is_dir(), reason="the published configuration is not at ../shared")
def test_the_published_configuration() -> None:
    assert ImageProcessing.from_folder(SCOUT, 336) == LLAMA4


NUMBER = r"is not a number from 1e-06 to 1e\+06"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"size": {"height": 336, "width": 224}}, "size: {.*} is not 336 x 336, the vision tower's image_size"),
        ({"size": {"height": 448, "width": 448}}, "size: .* is not 336 x 336"),
        ({"size": [336, 336]}, "size: "),
        ({"size": {"height": 336.0, "width": 336}}, "size: "),
        ({"size": {}}, "size: {} is not"),
        ({"size": 335}, "size: 335 is not"),
        ({"do_resize": False}, "do_resize: False is not supported; must be true"),
        ({"image_std": [0.5, 0, 0.5]}, f"image_std: 0 {NUMBER}"),
        ({"image_std": 0}, f"image_std: 0 {NUMBER}"),
        ({"image_std": [0.5, 1e-42, 0.5]}, f"image_std: 1e-42 {NUMBER}"),
        ({"image_std": 9e-7}, f"image_std: 9e-07 {NUMBER}"),
        ({"image_std": -0.5}, f"image_std: -0.5 {NUMBER}"),
        ({"image_std": 2e6}, f"image_std: 2000000.0 {NUMBER}"),
        ('{"image_std": [NaN, 1, 1]}', f"image_std: nan {NUMBER}"),
        ({"image_mean": [0.5, 0.5]}, r"image_mean: \[0.5, 0.5\] is not a list of three numbers"),
        ({"image_mean": "0.5"}, "image_mean: '0.5' is not a number"),
        ({"image_mean": [1, 2, True]}, "image_mean: True is not"),
        ({"image_mean": [0, -1e7, 0]}, r"image_mean: -10000000.0 is not a number from -1e\+06 to 1e\+06"),
        ({"image_mean": {"red": 1}}, "image_mean: {'red': 1} is not"),
        ({"image_mean": [[1]] * 3}, r"image_mean: \[1\] is not"),
        ({"max_patches": 0}, "max_patches: 0 is not a positive integer"),
        ({"max_patches": 257}, "max_patches: 257 is more than 256"),
        ({"max_patches": True}, "max_patches: True is not"),
        ({"max_patches": "16"}, "max_patches: '16' is not a positive integer"),
        (
            {"resample": 4},
            r"resample: 4 is not supported; must be one of "
            r"0 \(nearest\), 1 \(lanczos\), 2 \(bilinear\), 3 \(bicubic\)$",
        ),
        ({"resample": True}, "resample: True"),
        ({"resample": "\x1b[2J"}, r"resample: '\\x1b\[2J' is not"),
        ({"rescale_factor": "x" * 999}, "rescale_factor: 'xxx"),
        ({"rescale_factor": 1e999}, f"rescale_factor: inf {NUMBER}"),
        ({"rescale_factor": 0}, f"rescale_factor: 0 {NUMBER}"),
        ({"rescale_factor": 10**400}, "rescale_factor: 1000"),
        ({"do_normalize": "yes"}, "do_normalize: 'yes' is neither true nor false"),
        ({"resize_to_max_canvas": "no"}, "resize_to_max_canvas: 'no' is neither"),
        ({"do_rescale": False}, "do_rescale: False is not supported where do_normalize is true"),
        ("[]", "the top level is not an object"),
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("", "cannot be read as JSON"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(tmp_path: Path, content: Any, named: str) -> None:
    with pytest.raises(ImageProcessingError, match=rf"^.*preprocessor_config\.json: {named}") as raised:
        ImageProcessing.from_folder(folder_with(tmp_path, content), 336)
    message = str(raised.value)
    assert len(message) < len(str(tmp_path)) + 200 and message.isprintable() and message.count(str(tmp_path)) == 1


@pytest.mark.parametrize(
    "content",
    [
        {"image_std": [1e-6, 1, 1e6], "image_mean": [-1e6, 0, 1e6], "rescale_factor": 1e-6},
        {"image_std": 1, "image_mean": 0, "rescale_factor": 1e6},
    ],
)
def test_the_widest_numbers_that_are_accepted_stay_finite(tmp_path: Path, content: Any) -> None:
    processing = ImageProcessing.from_folder(folder_with(tmp_path, content), 336)
    pixels = torch.tensor([0, 1, 254, 255], dtype=torch.uint8).repeat(3).view(1, 3, 2, 2)
    for dtype in (torch.bfloat16, torch.float32):
        assert normalized(pixels, processing, dtype).isfinite().all()


def test_null_and_other_ways_to_write_the_same(tmp_path: Path) -> None:
    nothing = dict.fromkeys(["do_resize", *ImageProcessing.__dataclass_fields__])
    assert ImageProcessing.from_folder(folder_with(tmp_path, nothing), 336) == LLAMA4
    same = {"size": 336, "image_mean": 0.5, "image_std": 0.5, "do_normalize": 1, "do_rescale": 1}
    assert ImageProcessing.from_folder(folder_with(tmp_path, same), 336) == LLAMA4


def test_a_processor_file_that_is_no_object(tmp_path: Path) -> None:
    folder_with(tmp_path, {"image_processor": [1]}, "processor_config.json")
    with pytest.raises(ImageProcessingError, match=r"processor_config\.json: image_processor: not an object$"):
        ImageProcessing.from_folder(tmp_path, 336)


def test_a_processor_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").mkdir()
    with pytest.raises(ImageProcessingError, match=r"preprocessor_config\.json: cannot be read as JSON"):
        ImageProcessing.from_folder(tmp_path, 336)
