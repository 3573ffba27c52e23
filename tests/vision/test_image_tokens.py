"""The tokens of images against transformers' `Llama4Processor`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from PIL import Image
from transformers import Llama4ImageProcessor, Llama4Processor

from l4ctx.checkpoint.image_processor import ImageProcessing
from l4ctx.checkpoint.tokenizer import Tokenizer, TokenizerError
from l4ctx.vision.tiles import TileLayout, tile_layout
from l4ctx.vision.tokens import ImageTokens
from support.places import TINY
from support.tokenizer_fixtures import LLAMA4_TOKENIZER, loaded_tokenizer, toy_tokenizer_folder, transformers_tokenizer

LAYOUTS = [TileLayout(rows, columns) for rows in range(1, 17) for columns in range(1, 17) if rows * columns <= 16]
FOLDERS = [
    TINY,
    pytest.param(
        LLAMA4_TOKENIZER,
        marks=pytest.mark.skipif(not LLAMA4_TOKENIZER.is_dir(), reason="the real tokenizer is not at ../shared"),
    ),
]


def processor(folder: Path, side: int) -> Llama4Processor:
    image_processor = Llama4ImageProcessor(size={"height": side, "width": side})
    return Llama4Processor(image_processor, transformers_tokenizer(folder), patch_size=14)


def tokens(folder: Path, per_tile: int) -> ImageTokens:
    tokenizer = loaded_tokenizer(folder)
    patch = tokenizer.special_id("<|patch|>")
    assert patch is not None
    return ImageTokens.from_tokenizer(tokenizer, per_tile, patch)


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_layout_as_transformers_writes_it(folder: Path) -> None:
    side, per_tile = 84, 9  # 6 x 6 patches, of which pixel shuffle makes 3 x 3
    theirs, ours, control = processor(folder, side), tokens(folder, per_tile), loaded_tokenizer(folder)
    for layout in LAYOUTS:
        written = theirs._prompt_split_image(list(layout), per_tile)
        assert ours.ids(layout) == control.encode_control(written)
        image = Image.new("RGB", (layout.columns * side, layout.rows * side))
        assert tile_layout(*image.size, ImageProcessing(size=side)) == layout
        found = theirs(images=[image], text="<|image|>", add_special_tokens=False)["input_ids"]
        assert ours.ids(layout) == list(found[0])


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS)
def test_texts_with_several_images(folder: Path) -> None:
    side, per_tile = 56, 4
    theirs, ours, control = processor(folder, side), tokens(folder, per_tile), loaded_tokenizer(folder)
    rng = random.Random(3)
    for count in range(1, 9):
        images = [Image.new("RGB", (rng.randint(1, 300), rng.randint(1, 300))) for _ in range(count)]
        texts = [rng.choice(("What is on page 7?", "", "\n\n", "and then\n", " ")) for _ in range(count + 1)]
        found = theirs(images=images, text="<|image|>".join(texts), add_special_tokens=False)["input_ids"][0]
        expected = control.encode_control(texts[0])
        for image, text in zip(images, texts[1:], strict=True):
            expected += ours.ids(tile_layout(*image.size, ImageProcessing(size=side)))
            expected += control.encode_control(text)
        assert expected == list(found)


@pytest.mark.parametrize("per_tile", [1, 9, 144])
def test_counts_and_places(per_tile: int) -> None:
    ours = ImageTokens(1, 2, 3, 4, 5, 6, per_tile)
    for layout in LAYOUTS:
        ids = ours.ids(layout)
        assert ours.count(layout) == len(ids)
        starts = ours.tile_starts(layout)
        assert len(starts) == layout.tiles == len(set(starts)) and starts == sorted(starts)
        assert all(ids[start - 1] != 6 and ids[start : start + per_tile] == [6] * per_tile for start in starts)
        assert ids.count(6) == layout.tiles * per_tile and ids[starts[-1] - 1] == 5
    assert ours.count(TileLayout(4, 4)) == 16 * (per_tile + 1) + per_tile + 3


@pytest.mark.skipif(not LLAMA4_TOKENIZER.is_dir(), reason="the real tokenizer is not at ../shared")
def test_the_ids_of_llama_4() -> None:
    ours = ImageTokens.from_tokenizer(loaded_tokenizer(LLAMA4_TOKENIZER), 144, 200092)
    assert ours.patch == 200092 and ours.count(TileLayout(1, 1)) == 147 and ours.count(TileLayout(4, 4)) == 2467


def test_tokenizers_that_do_not_go_with_images(tmp_path: Path) -> None:
    plain = Tokenizer.from_folder(toy_tokenizer_folder(tmp_path))
    with pytest.raises(TokenizerError, match=r"no token <\|image_start\|>"):
        ImageTokens.from_tokenizer(plain, 144, 200092)
    tiny = Tokenizer.from_folder(TINY)
    with pytest.raises(TokenizerError, match=r"<\|patch\|> is token \d+ .* image_token_index of config.json is 200092"):
        ImageTokens.from_tokenizer(tiny, 144, 200092)
