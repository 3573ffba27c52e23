"""The sample checkpoint has the published format, and finds facts."""

from __future__ import annotations

import importlib
import io
import json
import random
import re
from collections.abc import Iterable

import pytest
import torch

from cache.hybrid import HybridKVCache
from l4ctx.checkpoint.image_processor import ImageProcessing
from l4ctx.checkpoint.tokenizer import Tokenizer
from l4ctx.documents.document import Document
from l4ctx.documents.images import read_image
from l4ctx.engine.prefill import as_batch
from l4ctx.prompt.builder import build_prompt
from l4ctx.vision.tiles import image_tiles, normalized
from model.config import TextConfig
from model.costs import parameter_count
from model.vision.config import VisionConfig, vision_parameter_count
from model.weights.loading import checked_vision_sources, load_checkpoint, load_vision
from model.weights.shards import text_tensors
from support.places import ROOT, TINY


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(TINY)


def own_sources() -> str:
    """Text that training has not seen: this repository's own code."""
    return "\n".join(
        file.read_text(encoding="utf-8")
        for folder in ("l4ctx", "model", "cache")
        for file in sorted((ROOT / folder).rglob("*.py"))
    )


def test_the_checkpoint_has_the_published_form() -> None:
    config = TextConfig.from_folder(TINY)
    assert config.max_position_embeddings == 10485760
    assert config.use_qk_norm and config.attn_temperature_tuning and len(config.moe_layers) == config.num_hidden_layers
    assert 0 < config.num_nope_layers < config.num_rope_layers
    elements = {name: torch.Size(tensor.shape).numel() for name, tensor in text_tensors(TINY).items()}
    assert sum(elements.values()) == parameter_count(config)
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 12_000_000
    names = {file.name for file in TINY.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
    }
    vision = VisionConfig.from_folder(TINY)
    assert vision is not None
    stored = checked_vision_sources(TINY, vision, config.hidden_size)
    assert sum(torch.Size(tensor.shape).numel() for tensor in stored.values()) == vision_parameter_count(
        vision, config.hidden_size
    )


def test_the_tokenizer_has_the_llama_4_pattern_with_single_digits(tokenizer: Tokenizer) -> None:
    split = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))["pre_tokenizer"]["pretokenizers"][0]
    real = ROOT.parent / "shared" / "llama4-tokenizer" / "tokenizer.json"
    if real.exists():
        theirs = json.loads(real.read_text(encoding="utf-8"))["pre_tokenizer"]["pretokenizers"][0]
        assert split["pattern"]["Regex"] == theirs["pattern"]["Regex"].replace(r"\p{N}{1,3}", r"\p{N}")
    assert len(tokenizer.encode_data("48213").ids) == 5
    for token in ("<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>", "<|image|>", "<|patch|>"):
        assert tokenizer.special_id(token) is not None


def test_logits_equal_those_of_transformers(tokenizer: Tokenizer) -> None:
    """Trained weights over several attention chunks of real text, read in pieces."""
    from transformers import Llama4ForCausalLM

    model = load_checkpoint(TINY, dtype=torch.float32)
    length = 2 * model.config.attention_chunk_size + 137
    ids = as_batch(tokenizer.encode_data(own_sources()).ids[:length], model.device)
    assert ids.shape[1] == length
    with torch.inference_mode():
        theirs = Llama4ForCausalLM.from_pretrained(TINY, dtype=torch.float32)(ids, use_cache=False).logits
    cache = HybridKVCache(model.config, length=length)
    for step in range(0, length, 300):
        ours = model(ids[:, step : step + 300], cache)
        assert ours is not None
        expected = theirs[:, step : step + 300]
        assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()  # the oracle's phases are float32


def test_the_training_twin_computes_the_same(tokenizer: Tokenizer) -> None:
    from samples.training.tiny_model import TinyForTraining, simulated_temperature

    model = load_checkpoint(TINY, dtype=torch.float32)
    twin = TinyForTraining(model.config.vocab_size)
    twin.load_state_dict(load_checkpoint(TINY).state_dict())  # in the stored dtype: no weight is in another form
    chunk = model.config.attention_chunk_size
    ids = as_batch(tokenizer.encode_data(own_sources()).ids[: 2 * chunk], model.device)
    with torch.inference_mode():
        hidden = twin(ids, chunk, torch.zeros(ids.shape), simulated_temperature(torch.tensor([float(ids.shape[1])])))
        theirs = twin.lm_head(hidden)
    ours = model(ids)
    assert ours is not None
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_the_training_twin_of_the_tower_computes_the_same() -> None:
    from samples.tasks.cards import draw_card, draw_cards
    from samples.training.tiny_vision import VisionForTraining

    config = VisionConfig.from_folder(TINY)
    assert config is not None
    tower = load_vision(TINY, config, 128, dtype="float32")
    twin = VisionForTraining(128)
    twin.load_state_dict(tower.state_dict())
    rng = random.Random(2)
    size, processing = (config.image_size, config.image_size), ImageProcessing.from_folder(TINY, config.image_size)
    drawn = [draw_card(card, size, rng).image for card in draw_cards(rng, 2)]
    pixels = normalized(torch.cat([image_tiles(image, processing) for image in drawn]), processing, torch.float32)
    with torch.inference_mode():
        theirs = twin(pixels)
    assert (tower(pixels) - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_cards_are_the_same_for_the_same_seed() -> None:
    from samples.tasks.cards import draw_card, draw_cards

    def drawn(seed: int) -> bytes:
        rng = random.Random(seed)
        return draw_card(draw_cards(rng, 1)[0], (150, 120), rng).image.tobytes()

    assert drawn(1) == drawn(1) != drawn(2)


def codes_found(documents: list[Document], entities: Iterable[str]) -> list[list[str]]:
    """The numbers in the answer about each entity; the documents are read once."""
    from samples.evaluation.evaluate_images import Setup, read_documents
    from samples.evaluation.evaluate_tiny import answer_to
    from samples.tasks.lookup import question

    setup = Setup.from_folder(TINY, "float32")
    prompts = [
        build_prompt(setup.tokenizer, setup.template, documents, question(entity), images=setup.reading.prompter)
        for entity in entities
    ]
    end, read = prompts[0].documents_stop, read_documents(setup, prompts[0])
    answers = [
        answer_to(setup.model, read.fork(), setup.tokenizer, prompt.ids[end:], setup.stop_tokens) for prompt in prompts
    ]
    return [re.findall(r"\d+", answer) for answer in answers]


@pytest.mark.slow
def test_it_finds_facts_in_text_it_has_not_seen(tokenizer: Tokenizer) -> None:
    """The text ends inside an attention chunk, so that no boundary separates questions from answers."""
    from samples.evaluation.evaluate_tiny import make_document
    from samples.tasks.lookup import draw_entities, random_code

    rng = random.Random(4)
    codes = {entity: random_code(rng) for entity in draw_entities(rng, 10, evaluation=True)}
    tokens = 59 * TextConfig.from_folder(TINY).attention_chunk_size // 2
    text = make_document(tokenizer, codes, tokens, [ROOT / name for name in ("l4ctx", "model", "cache")], rng)
    found = codes_found([Document("a.py", "", text)], codes)
    assert sum(numbers == [code] for numbers, code in zip(found, codes.values(), strict=True)) >= 9


def test_it_reads_cards_in_images() -> None:
    """A dozen images of many sizes in one prompt; a chunk boundary may cut one of them."""
    from samples.tasks.cards import draw_card, draw_cards, random_size

    rng, documents = random.Random("not the training's"), []
    cards = draw_cards(rng, 12)
    for card in cards:
        file = io.BytesIO()
        draw_card(card, random_size(rng, 90, 500), rng).image.save(file, "PNG")
        image, _ = read_image("card.png", file.getvalue(), None)
        documents.append(Document("card.png", image.sha256, (image,)))
    found = codes_found(documents, [card.entity for card in cards])
    assert sum(numbers == [card.code] for numbers, card in zip(found, cards, strict=True)) >= 10


SCRIPTS = [file for file in (ROOT / "samples").rglob("*.py") if file.parent.name != "code"]


@pytest.mark.parametrize("name", sorted(".".join(file.relative_to(ROOT).with_suffix("").parts) for file in SCRIPTS))
def test_scripts_can_be_imported(name: str) -> None:
    importlib.import_module(name)
