"""The vision tower equals `transformers`, alone and through the whole model; what is wrong with it would be seen."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cache.hybrid import HybridKVCache
from model.errors import CheckpointError
from model.transformer import Transformer
from model.vision import tower as tower_module
from model.vision.config import (
    VisionConfig,
    vision_activation_bytes,
    vision_operations,
    vision_parameter_count,
)
from model.vision.tower import VisionTower
from model.weights.loading import checked_vision_sources, load_checkpoint, load_vision
from model.weights.shards import text_tensors
from support.error_budget import difference, in_float64, limit
from support.places import SHARED
from support.toy_checkpoints import BASE, CHUNK, IMAGE_TOKEN, SCOUT, VOCABULARY, Kind, Toy, Toys, write_kind

CAUGHT = 1e-3
STD = 0.25
WIDTH = BASE["hidden_size"]
SINGLE = "model.safetensors"
RELEASED = SHARED / "llama4" / "scout"
SCOUT_VISION: dict[str, Any] = {
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
    "rope_theta": 10000,
}


def shape(
    hidden: int, heads: int, layers: int, image: int, patch: int, joined: int, out: int, **more: Any
) -> dict[str, Any]:
    """A vision configuration that joins squares of `joined` x `joined` patches."""
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "image_size": image,
        "patch_size": patch,
        "pixel_shuffle_ratio": 1 / joined,
        "intermediate_size": hidden * joined**2,
        "vision_output_dim": out,
        "projector_input_dim": out,
        "projector_output_dim": out,
        **more,
    }


def theta(value: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": value}}


SHAPES: dict[str, dict[str, Any]] = {
    "halved": shape(24, 2, 2, 28, 7, 2, 20),
    "not_joined": shape(16, 4, 3, 15, 5, 1, 14),
    "thirds": shape(8, 1, 1, 18, 3, 3, 10, **theta(70.0)),
    "quarters": shape(36, 3, 1, 16, 2, 4, 18),
    "theta_and_eps": shape(40, 2, 3, 30, 5, 2, 26, **theta(50.0), norm_eps=0.1),  # the oracle ignores norm_eps
    "one_token": shape(32, 8, 2, 22, 11, 2, 12),
    "grid_of_scout": shape(48, 6, 1, 96, 4, 2, 28),
}
LAYOUTS: dict[str, tuple[int, ...]] = {  # tokens of text; 0 is a tile
    "one_tile": (5, 0, 4),
    "several_tiles": (3, 0, 1, 0, 1, 0, 1, 0, 2),
    "several_images": (2, 0, 9, 0, 1, 0, 6, 0, 0, 3),
    "image_first_and_last": (0, 8, 0),
}
PIECES = (1, 4, 5, CHUNK, 3 * CHUNK - 1)


@dataclasses.dataclass(frozen=True)
class Case:
    """A prompt with images, and what `transformers` makes of it in float64, with the limits of a float32 difference."""

    ids: Tensor  # (1, T)
    pixels: Tensor  # (N, 3, S, S)
    features: Tensor  # (N, tokens_per_tile, C)
    logits: Tensor  # (1, T, V)
    features_limit: float
    logits_limit: float


@dataclasses.dataclass(frozen=True)
class VisionToy:
    toy: Toy
    config: VisionConfig

    def tower(self, dtype: torch.dtype = torch.float32, **options: Any) -> VisionTower:
        return load_vision(self.toy.folder, self.config, WIDTH, dtype=dtype, **options)

    @functools.cache  # noqa: B019 (as long-lived as the session's toys)
    def case(self, layout: str) -> Case:
        generator = torch.Generator().manual_seed(len(layout))
        tile = torch.full((self.config.tokens_per_tile,), IMAGE_TOKEN)
        parts = [
            torch.randint(VOCABULARY - 1, (size,), generator=generator) if size else tile for size in LAYOUTS[layout]
        ]
        size = self.config.image_size
        pixels = torch.rand((LAYOUTS[layout].count(0), 3, size, size), generator=generator) * 2 - 1
        ids = torch.cat(parts)[None]

        def features(oracle: Any, pixels: Tensor) -> Tensor:
            return oracle.multi_modal_projector(oracle.get_image_features(pixels).last_hidden_state)

        def logits(oracle: Any, pixels: Tensor) -> Tensor:
            return oracle(ids, pixel_values=pixels, use_cache=False).logits

        exact = [
            in_float64(self.toy.oracle, lambda oracle, run=run: run(oracle, pixels.double()))  # type: ignore[misc]
            for run in (features, logits)
        ]
        found: list[list[Tensor]] = []
        for attention in ("sdpa", "eager"):
            self.toy.oracle.set_attn_implementation(attention)
            with torch.no_grad():
                found.append([features(self.toy.oracle, pixels), logits(self.toy.oracle, pixels)])
        limits = [limit(right, *theirs) for right, *theirs in zip(exact, *found, strict=True)]
        return Case(ids, pixels, exact[0], exact[1], limits[0], limits[1])


VisionToys = Callable[[str], VisionToy]


@pytest.fixture(scope="module")
def vision_toys(toys: Toys, tmp_path_factory: pytest.TempPathFactory) -> VisionToys:
    """Multimodal toys by name, each written once. `toys` keeps `transformers` quiet."""
    root = tmp_path_factory.mktemp("vision")

    @functools.cache
    def made(name: str) -> VisionToy:
        text = SCOUT | {"num_hidden_layers": 4, "max_position_embeddings": 1024}
        kind = Kind(text, nested=True, vision=SHAPES[name])
        toy = write_kind(root / name, name, kind, STD, seed=list(SHAPES).index(name))
        config = VisionConfig.from_folder(toy.folder)
        assert config is not None and config.image_token_index == IMAGE_TOKEN
        return VisionToy(toy, config)

    return made


@pytest.fixture
def folder(vision_toys: VisionToys, tmp_path: Path) -> Path:
    """A copy of a toy in one file, to be changed by a test."""
    return Path(shutil.copytree(vision_toys("halved").toy.folder, tmp_path / "toy"))


def spliced(model: Transformer, case: Case, features: Tensor) -> Tensor:
    """The prompt's embeddings (1, T, C), those of image tokens replaced in order."""
    embeddings = model.model.embed_tokens(case.ids)
    return embeddings.masked_scatter((case.ids == IMAGE_TOKEN)[..., None], features.to(embeddings.dtype))


def in_pieces(model: Transformer, embeddings: Tensor, size: int) -> Tensor:
    tokens = embeddings.shape[1]
    cache = HybridKVCache(model.config, length=tokens)
    logits = [model(embeddings[:, start : start + size], cache=cache) for start in range(0, tokens, size)]
    assert cache.offset == tokens and all(part is not None for part in logits)
    return torch.cat([part for part in logits if part is not None], 1)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("layout", ["one_tile", "several_images"])
def test_features_equal_transformers(vision_toys: VisionToys, name: str, layout: str) -> None:
    toy = vision_toys(name)
    case = toy.case(layout)
    before = case.pixels.clone()
    features = toy.tower()(case.pixels)
    assert features.shape == (len(case.pixels), toy.config.tokens_per_tile, WIDTH)
    assert difference(features, case.features) <= case.features_limit
    assert torch.equal(case.pixels, before)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_transformers(vision_toys: VisionToys, name: str, layout: str) -> None:
    """In one forward, and through the cache with cuts at and inside images, tiles and attention chunks.

    Which sizes of pieces are tried turns with the shape and the layout.
    """
    toy = vision_toys(name)
    case, model = toy.case(layout), load_checkpoint(toy.toy.folder, dtype=torch.float32)
    embeddings = spliced(model, case, toy.tower()(case.pixels))
    full = model(embeddings)
    assert full is not None
    found = {"full": difference(full, case.logits)}
    sizes = PIECES[2:] if case.ids.shape[1] > 100 else PIECES
    turn = list(SHAPES).index(name) + 2 * list(LAYOUTS).index(layout)
    for size in {sizes[turn % len(sizes)], sizes[(turn + 1) % len(sizes)]}:
        found[f"pieces of {size}"] = difference(in_pieces(model, embeddings, size), case.logits)
    wrong = {path: value for path, value in found.items() if not value <= case.logits_limit}
    assert not wrong


def test_prompts_are_cut_inside_tiles(vision_toys: VisionToys) -> None:
    """Of the test above, and that what it compares depends on the pixels."""
    toy = vision_toys("theta_and_eps")
    case, model = toy.case("several_images"), load_checkpoint(toy.toy.folder, dtype=torch.float32)
    is_image = case.ids[0] == IMAGE_TOKEN
    for size in PIECES:
        assert any(is_image[cut - 1] and is_image[cut] for cut in range(size, len(is_image), size)), size
    swapped = model(spliced(model, case, toy.tower()(case.pixels.flip(0))))
    assert swapped is not None and difference(swapped, case.logits) > CAUGHT


def test_tiles_are_independent(vision_toys: VisionToys) -> None:
    toy = vision_toys("theta_and_eps")
    case, tower = toy.case("several_images"), toy.tower()
    alone = torch.cat([tower(tile[None]) for tile in case.pixels])
    assert difference(alone, case.features) <= case.features_limit


def test_pixels_of_another_size_are_refused(vision_toys: VisionToys) -> None:
    tower = vision_toys("halved").tower()
    for wrong in ((1, 3, 28, 21), (1, 1, 28, 28), (3, 28, 28)):
        with pytest.raises(AssertionError):
            tower(torch.zeros(wrong))


def rotation(change: Callable[[Tensor, VisionConfig], Tensor]) -> Callable[[VisionConfig], Tensor]:
    right = tower_module.grid_rotation
    return lambda config: change(right(config), config)


def counted_from_0(table: Tensor, config: VisionConfig) -> Tensor:
    """All patches turned back by that of the first one."""
    return torch.cat([table[:-1] * table[0].conj(), table[-1:]])


def class_token_first(model: tower_module.VisionModel, pixels: Tensor) -> Tensor:
    patches = model.patch_embedding(pixels)
    classes = model.class_embedding.expand(len(patches), 1, -1)
    return torch.cat([classes, patches], 1) + model.positional_embedding_vlm


def shuffled(order: tuple[int, ...]) -> Callable[[Tensor, int], Tensor]:
    """Pixel shuffle whose axes (image, row, row in the square, column, column in it, channel) come in this order."""

    def shuffle(patches: Tensor, side: int) -> Tensor:
        grid = round(patches.shape[1] ** 0.5)
        squares = patches.unflatten(1, (grid // side, side, grid // side, side)).permute(order)
        return squares.reshape(len(patches), -1, side**2 * patches.shape[2])

    return shuffle


def halves_rotated(x: Tensor, table: Tensor) -> Tensor:
    """The pairs are (i, i + D / 2) instead of (2i, 2i + 1)."""
    turned = torch.complex(*x.chunk(2, -1)) * table[:, None]
    return torch.cat([turned.real, turned.imag], -1)


def channels_last(embedding: tower_module.PatchEmbedding, pixels: Tensor) -> Tensor:
    size = embedding.patch_size
    squares = pixels.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 3, 5, 1)
    return embedding.linear(squares.flatten(3).flatten(1, 2))


MUTATIONS: dict[str, tuple[object, str, Callable[..., Tensor]]] = {
    "height before width": (
        tower_module,
        "grid_rotation",
        rotation(lambda table, _: table.roll(table.shape[1] // 2, 1)),
    ),
    "positions from 0": (tower_module, "grid_rotation", rotation(counted_from_0)),
    "rotated class token": (
        tower_module,
        "grid_rotation",
        rotation(lambda table, _: torch.cat([table[:-1], table[-2:-1]])),
    ),
    "another theta": (tower_module, "grid_rotation", rotation(lambda _, config: vision_rotation(config, 10000.0))),
    "no rotation": (tower_module, "rotate", lambda x, table: x),
    "halves rotated": (tower_module, "rotate", halves_rotated),
    "class token first": (tower_module.VisionModel, "embed", class_token_first),
    "columns before rows": (tower_module, "pixel_shuffle", shuffled((0, 3, 1, 2, 4, 5))),
    "no transpose": (tower_module, "pixel_shuffle", shuffled((0, 1, 2, 3, 4, 5))),
    "columns first in a square": (tower_module, "pixel_shuffle", shuffled((0, 1, 3, 4, 2, 5))),
    "channels last": (tower_module.PatchEmbedding, "forward", channels_last),
    "no activation after fc2": (tower_module.AdapterMLP, "forward", lambda mlp, x: mlp.fc2(F.gelu(mlp.fc1(x)))),
    "no activation after fc1": (tower_module.AdapterMLP, "forward", lambda mlp, x: F.gelu(mlp.fc2(mlp.fc1(x)))),
}


def vision_rotation(config: VisionConfig, rope_theta: float) -> Tensor:
    return RIGHT_ROTATION(dataclasses.replace(config, rope_theta=rope_theta))


RIGHT_ROTATION = tower_module.grid_rotation


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_what_would_be_wrong_is_caught(vision_toys: VisionToys, monkeypatch: pytest.MonkeyPatch, mutation: str) -> None:
    toy = vision_toys("theta_and_eps")
    case = toy.case("several_images")
    assert difference(toy.tower()(case.pixels), case.features) <= case.features_limit < CAUGHT / 10
    monkeypatch.setattr(*MUTATIONS[mutation])
    assert difference(toy.tower()(case.pixels), case.features) > CAUGHT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["halved", "theta_and_eps"])
def test_low_precision_is_about_as_good_as_the_oracles(vision_toys: VisionToys, name: str, dtype: torch.dtype) -> None:
    toy = vision_toys(name)
    case = toy.case("several_images")
    theirs: Any = type(toy.toy.oracle).from_pretrained(toy.toy.folder, dtype=dtype)
    with torch.no_grad():
        hidden = theirs.get_image_features(case.pixels.to(dtype)).last_hidden_state
        budget = (theirs.multi_modal_projector(hidden).float() - case.features).abs().mean()
    features = toy.tower(dtype)(case.pixels)
    assert features.dtype == dtype
    assert 0 < (features.float() - case.features).abs().mean() <= 1.5 * budget


def test_the_rotation_follows_the_weights(vision_toys: VisionToys) -> None:
    """It is neither a parameter nor a buffer, and a tower that was built without numbers has one all the same."""
    toy = vision_toys("halved")
    case = toy.case("one_tile")
    right = toy.tower()
    with torch.device("meta"):
        tower = VisionTower(toy.config, WIDTH)
    assert tower.state_dict().keys() == right.state_dict().keys()
    tower.load_state_dict(right.state_dict(), assign=True)
    for device in ("cpu", "meta"):
        assert tower.to(device)(case.pixels).device.type == device
    tower.to_empty(device="cpu").load_state_dict(right.state_dict())
    assert torch.equal(tower(case.pixels), right(case.pixels))


def test_true_shape() -> None:
    config = VisionConfig.from_dict({"model_type": "llama4", "vision_config": SCOUT_VISION})
    if RELEASED.exists():
        assert VisionConfig.from_folder(RELEASED) == config
    assert config is not None
    with torch.device("meta"):
        tower = VisionTower(config, 5120)
        assert tower(torch.empty(2, 3, 336, 336)).shape == (2, 144, 5120)
    assert vision_parameter_count(config, 5120) == sum(p.numel() for p in tower.parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_closed_forms(vision_toys: VisionToys, name: str) -> None:
    toy = vision_toys(name)
    tower, pixels = toy.tower(), toy.case("several_images").pixels
    assert vision_parameter_count(toy.config, WIDTH) == sum(p.numel() for p in tower.parameters())
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # the fused kernel is not counted on a CPU
        tower(pixels)
    assert vision_operations(toy.config, WIDTH, len(pixels)) == counter.get_total_flops()


def test_each_tensor_is_where_it_belongs(vision_toys: VisionToys, folder: Path) -> None:
    stored = {
        name: tensor for name, tensor in load_file(folder / SINGLE).items() if not name.startswith("language_model.")
    }
    config = vision_toys("halved").config
    for dtype, is_mapped in itertools.product((torch.float32, torch.bfloat16, torch.float16), (True, False)):
        tower = load_vision(str(folder), config, WIDTH, dtype=dtype, is_mapped=is_mapped)
        loaded = dict(tower.named_parameters())
        assert loaded.keys() == stored.keys() == checked_vision_sources(folder, config, WIDTH).keys()
        assert all(torch.equal(loaded[name], stored[name].to(dtype)) for name in stored)
        assert not any(p.requires_grad for p in loaded.values()) and not tower.training
        assert tower.dtype == dtype and tower.device == torch.device("cpu")
    assert load_vision(folder, config, WIDTH, dtype="auto").dtype == torch.float32
    with pytest.raises(CheckpointError, match="int8"):
        load_vision(folder, config, WIDTH, dtype=torch.int8)


def test_names_with_the_prefix_of_the_base_model(vision_toys: VisionToys, folder: Path) -> None:
    """`transformers` reads them, too."""
    toy = vision_toys("halved")
    case = toy.case("one_tile")
    tensors = load_file(folder / SINGLE)
    text = text_tensors(folder).keys()
    save_file(
        {name if name.startswith("language_model.") else f"model.{name}": tensor for name, tensor in tensors.items()},
        folder / SINGLE,
        {"format": "pt"},
    )
    assert text_tensors(folder).keys() == text
    assert (
        difference(load_vision(folder, toy.config, WIDTH, dtype=torch.float32)(case.pixels), case.features)
        <= case.features_limit
    )
    again: Any = type(toy.toy.oracle).from_pretrained(folder)
    with torch.no_grad():
        logits = again(case.ids, pixel_values=case.pixels, use_cache=False).logits
    assert difference(logits, case.logits) <= case.logits_limit


def edited(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / SINGLE).items()}
    change(tensors)
    save_file(tensors, folder / SINGLE, {"format": "pt"})


FC1 = "vision_model.vision_adapter.mlp.fc1.weight"
LINEAR = "multi_modal_projector.linear_1.weight"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda t: t.pop(FC1), ["missing", FC1]),
        (lambda t: t.pop("vision_model.class_embedding"), ["missing", "vision_model.class_embedding"]),
        (lambda t: t.pop(LINEAR), ["missing", LINEAR]),
        (
            lambda t: t.update({"vision_model.model.layers.2.mlp.fc1.weight": torch.ones(3)}),
            [SINGLE, "extra", "vision_model.model.layers.2.mlp.fc1.weight"],
        ),
        (
            lambda t: t.update({"multi_modal_projector.linear_1.bias": torch.ones(WIDTH)}),
            [SINGLE, "extra", "multi_modal_projector.linear_1.bias"],
        ),
        (lambda t: t.update({FC1: t[FC1].t().contiguous()}), [SINGLE, FC1, "[96, 20] instead of [20, 96]"]),
        (
            lambda t: t.update({"vision_model.positional_embedding_vlm": torch.ones(16, 24)}),
            [SINGLE, "vision_model.positional_embedding_vlm", "[16, 24] instead of [17, 24]"],
        ),
        (lambda t: t.update({FC1: t[FC1].to(torch.int8)}), [SINGLE, FC1, "I8"]),
        (lambda t: t.update({f"model.{FC1}": t[FC1].clone()}), [SINGLE, FC1, "twice"]),
    ],
)
def test_damage_is_named(
    vision_toys: VisionToys, folder: Path, change: Callable[[dict[str, Tensor]], Any], parts: list[str]
) -> None:
    """The text model loads nevertheless."""
    edited(folder, change)
    config = vision_toys("halved").config
    reads: list[Callable[[], object]] = [
        lambda: load_vision(folder, config, WIDTH, dtype=torch.float32),
        lambda: checked_vision_sources(folder, config, WIDTH),
    ]
    for read in reads:
        with pytest.raises(CheckpointError) as caught:
            read()
        message = str(caught.value)
        assert "\n" not in message and all(part in message for part in [str(folder), *parts]), message
    assert load_checkpoint(folder).config.num_hidden_layers == 4


def test_a_projector_of_another_width(vision_toys: VisionToys, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=LINEAR):
        checked_vision_sources(folder, vision_toys("halved").config, WIDTH + 1)


def test_a_checkpoint_without_its_vision_tensors(vision_toys: VisionToys, folder: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if not name.startswith("language_model.")]:
            tensors.pop(name)

    edited(folder, drop)
    config = json.loads((folder / "config.json").read_text())
    assert config["vision_config"]
    with pytest.raises(CheckpointError, match=r"vision model.*; --no-images reads the text alone$"):
        load_vision(folder, vision_toys("halved").config, WIDTH, dtype=torch.float32)
    assert load_checkpoint(folder).config.num_hidden_layers == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes", [shape(176, 2, 2, 56, 7, 2, 96), shape(64, 4, 1, 64, 16, 1, 32), shape(32, 2, 1, 96, 4, 3, 512)]
)
def test_activations_are_bounded_by_their_estimate(sizes: dict[str, Any], dtype: torch.dtype) -> None:
    from support.storages import LiveStorages

    config = VisionConfig.from_dict({"model_type": "llama4", "vision_config": sizes})
    assert config is not None
    tower = VisionTower(config, WIDTH).to(dtype)
    pixels = torch.zeros(3, 3, config.image_size, config.image_size)
    with LiveStorages() as storages:
        result = tower(pixels)
    estimate = vision_activation_bytes(config, 3, dtype.itemsize)
    peak = storages.peak + (pixels.nbytes if pixels.dtype == dtype else 0)  # else converted within
    assert peak - result.nbytes <= estimate <= 2 * peak
