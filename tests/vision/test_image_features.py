"""Images of a prompt through the driver equal `transformers`' whole forward, wherever chunks cut them."""

from __future__ import annotations

import dataclasses
import io
import random
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from cache.hybrid import HybridKVCache
from l4ctx.checkpoint.image_processor import ImageProcessing
from l4ctx.documents.images import DocumentImage, ImageError, read_image
from l4ctx.engine.prefill import as_batch, prefill
from l4ctx.spans import same_until
from l4ctx.vision.features import TILES_AT_A_TIME, ImageFeatures
from l4ctx.vision.prompter import ImagePrompter, PlacedImage, count_image_tokens
from l4ctx.vision.tiles import image_tiles, normalized
from l4ctx.vision.tokens import ImageTokens
from model.transformer import Transformer
from model.vision.config import VisionConfig
from model.weights.loading import load_checkpoint, load_vision
from support.error_budget import difference, in_float64, limit
from support.toy_checkpoints import CHUNK, IMAGE_TOKEN, MAVERICK, SCOUT, VOCABULARY, Kind, Toy, Toys, write_kind

SIDE = 28
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "image_size": SIDE,
    "patch_size": 7,
    "pixel_shuffle_ratio": 0.5,
    "intermediate_size": 96,
    "vision_output_dim": 20,
    "projector_input_dim": 20,
    "projector_output_dim": 20,
}
TOKENS = ImageTokens(
    image_start=VOCABULARY - 2,
    image_end=VOCABULARY - 3,
    tile_x_separator=VOCABULARY - 4,
    tile_y_separator=VOCABULARY - 5,
    image=VOCABULARY - 6,
    patch=IMAGE_TOKEN,
    tokens_per_tile=4,
)
PROMPTER = ImagePrompter(ImageProcessing(size=SIDE, max_patches=9), TOKENS, "made with this")
SIZES = {  # of images in pixels, with texts between: what a prompt shows
    "one tile": [(28, 28)],
    "several tiles": [(80, 52)],
    "several images": [(20, 20), (84, 84), (150, 20), (28, 10)],
}
KINDS = {"scout": Kind(SCOUT, nested=True, vision=VISION), "maverick": Kind(MAVERICK, nested=True, vision=VISION)}
CHUNK_SIZES = (1, 3, CHUNK - 1, CHUNK, 2 * CHUNK, 16, 500)


@dataclasses.dataclass
class Case:
    """A checkpoint, a prompt that shows images, and `transformers`' logits in float64 for its end."""

    model: Transformer
    features: ImageFeatures
    ids: array[int]
    images: list[PlacedImage]
    logits: Tensor  # (V,)
    limit: float  # of the difference from them

    def again(self) -> ImageFeatures:
        return ImageFeatures(self.features.tower, PROMPTER, self.images)

    def read(self, size: int, *, resumed_at: int | None = None) -> Tensor:
        """The last position's logits (V,) after a reading in prefill chunks of `size`, perhaps by two processes."""
        cache = HybridKVCache(self.model.config, length=len(self.ids))
        cuts = [len(self.ids) - 1] if resumed_at is None else [resumed_at, len(self.ids) - 1]
        for stop in cuts:
            for _ in prefill(
                self.model, cache, self.ids[cache.offset : stop], prefill_chunk_size=size, features=self.again()
            ):
                pass
        logits = self.model(as_batch(self.ids[-1:], torch.device("cpu")), cache)
        assert logits is not None
        return logits[0, -1]


def image(size: tuple[int, int], seed: int) -> DocumentImage:
    """Noise, in colours."""
    shades = random.Random(seed).randbytes(3 * size[0] * size[1])
    stream = io.BytesIO()
    Image.frombytes("RGB", size, shades).save(stream, "PNG")
    return read_image(f"noise {seed}.png", stream.getvalue(), None)[0]


@pytest.fixture(scope="module", params=KINDS)
def toy(toys: Toys, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Toy:
    """`toys` keeps `transformers` quiet."""
    return write_kind(tmp_path_factory.mktemp("images") / "toy", request.param, KINDS[request.param], 0.25, seed=3)


def make_case(toy: Toy, shown: str) -> Case:
    model, config = load_checkpoint(toy.folder), VisionConfig.from_folder(toy.folder)
    assert config is not None and config.tokens_per_tile == TOKENS.tokens_per_tile
    tower = load_vision(toy.folder, config, model.config.hidden_size, dtype="float32")
    chance, ids, images = random.Random(len(shown)), array("i"), []
    for number, size in enumerate(SIZES[shown]):
        ids.extend(chance.randrange(VOCABULARY - 6) for _ in range(5 * number % 8))
        images.append(PROMPTER.encode(image(size, number), ids))
    ids.extend(chance.randrange(VOCABULARY - 6) for _ in range(3))
    pixels = torch.cat(
        [
            normalized(image_tiles(placed.image.decode(), PROMPTER.processing), PROMPTER.processing, torch.float32)
            for placed in images
        ]
    )

    def run(oracle: Any, pixels: Tensor) -> Tensor:
        return oracle(torch.tensor([ids.tolist()]), pixel_values=pixels, use_cache=False).logits[0]

    exact = in_float64(toy.oracle, lambda oracle: run(oracle, pixels.double()))
    with torch.no_grad():
        allowed = limit(exact, run(toy.oracle, pixels))  # by all positions: one alone may be computed with luck
    end = exact[-1]
    return Case(
        model,
        ImageFeatures(tower, PROMPTER, images),
        ids,
        images,
        end,
        allowed * (exact.abs().max() / end.abs().max()).item(),
    )


@pytest.mark.parametrize("shown", SIZES)
def test_logits_equal_transformers_however_the_reading_is_cut(toy: Toy, shown: str) -> None:
    case = make_case(toy, shown)
    for size in CHUNK_SIZES:
        assert difference(case.read(size), case.logits) <= case.limit, size


def test_a_resumed_reading_has_the_same_bits(toy: Toy) -> None:
    """A cut in the middle of a tile, and one between the tiles that the tower sees together."""
    case = make_case(toy, "several images")
    big = case.images[1]
    starts = [big.span.start + offset for offset in TOKENS.tile_starts(big.layout)]
    assert len(starts) > TILES_AT_A_TIME
    for cut in (starts[1] + 2, starts[TILES_AT_A_TIME - 1], starts[TILES_AT_A_TIME] + 1):
        whole = cut - cut % CHUNK  # where a step ends in either case
        assert torch.equal(case.read(CHUNK), case.read(CHUNK, resumed_at=whole))
        assert difference(case.read(CHUNK, resumed_at=cut), case.logits) <= case.limit


def test_images_are_decoded_once_each_and_not_kept(toy: Toy) -> None:
    case = make_case(toy, "several images")
    decoded: list[str] = []

    def counting(shown: DocumentImage) -> DocumentImage:
        def decode() -> Image.Image:
            decoded.append(shown.source)
            return shown.decode()

        return dataclasses.replace(shown, decode=decode)

    images = [dataclasses.replace(placed, image=counting(placed.image)) for placed in case.images]
    features = ImageFeatures(case.features.tower, PROMPTER, images)
    cache = HybridKVCache(case.model.config, length=len(case.ids))
    for step in prefill(case.model, cache, case.ids[:-1], prefill_chunk_size=5, features=features):
        if features._tiles is not None:
            assert features._tiles[0].span.start < step.step.stop < features._tiles[0].span.stop
    assert decoded == [placed.image.source for placed in images]
    assert features._tiles is None and features._group is None


def test_a_mismatch_names_the_image(toy: Toy) -> None:
    case = make_case(toy, "several tiles")
    (placed,) = case.images
    spoiled = case.ids[:]
    spoiled[placed.span.start + 2] = 1  # a patch token
    cache = HybridKVCache(case.model.config, length=len(spoiled))
    with pytest.raises(ImageError, match=r"^noise 0\.png: \d+ features for \d+ patch tokens$"):
        list(prefill(case.model, cache, spoiled, features=case.again()))
    assert cache.offset == 0
    other = dataclasses.replace(placed, image=image((28, 28), 5))
    with pytest.raises(ImageError, match=r"^noise 5\.png: 1 tiles instead of 7$"):
        list(prefill(case.model, cache, case.ids, features=ImageFeatures(case.features.tower, PROMPTER, [other])))


def test_a_file_that_changes_before_it_is_reached_is_an_error(toy: Toy, tmp_path: Path) -> None:
    case = make_case(toy, "one tile")
    file = tmp_path / "chart.png"
    case.images[0].image.decode().save(file)
    shown, _ = read_image("chart.png", file.read_bytes(), str(file))
    images = [dataclasses.replace(case.images[0], image=shown)]
    image((28, 28), 6).decode().save(file)
    cache = HybridKVCache(case.model.config, length=len(case.ids))
    with pytest.raises(ImageError, match=r"^chart\.png: changed since it was first read$"):
        list(prefill(case.model, cache, case.ids, features=ImageFeatures(case.features.tower, PROMPTER, images)))


def test_digests_follow_from_pixels_and_from_what_sees_them() -> None:
    first, second = (PROMPTER.encode(image((28, 28), seed), array("i")) for seed in (1, 2))
    assert first.span.sha256 != second.span.sha256
    assert first.span == PROMPTER.encode(image((28, 28), 1), array("i")).span
    other = dataclasses.replace(PROMPTER, provenance="made with that")
    assert other.encode(image((28, 28), 1), array("i")).span.sha256 != first.span.sha256


def test_spans_are_counted_and_compared() -> None:
    ids = array("i", [1, 2, 3])
    images = [PROMPTER.encode(image((28, 28), 1), ids), PROMPTER.encode(image((56, 28), 2), ids)]
    (start, middle, _), (again, stop, _) = (placed.span for placed in images)
    assert (start, middle) == (3, 3 + TOKENS.tokens_per_tile + 3) and again == middle and stop == len(ids)
    assert count_image_tokens(images, 0, 3) == 0 and count_image_tokens(images, 0, stop) == stop - 3
    assert count_image_tokens(images, middle - 1, middle + 2) == 3
    spans = [placed.span for placed in images]
    assert same_until(spans, spans) is None and same_until([], []) is None
    assert same_until(spans, spans[:1]) == same_until(spans[:1], spans) == again
    assert same_until([spans[0]._replace(sha256="other"), spans[1]], spans) == start
