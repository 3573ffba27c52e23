"""Measures how well a look-up model reads cards in images that it was not trained on.

    python -m samples.evaluation.evaluate_images --images 200

Images are drawn with seeds that training did not use, saved as files of several formats, and read through the same
modules as in `l4ctx ask`. There are four kinds of prompts: a card that is one tile; a card cut into many tiles, whole
only in the global tile; a sheet of cards, each whole in its own tile; and several images among texts, with questions
about facts in the texts too. Answers that an attention-chunk boundary cuts apart are counted separately.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import sys
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from cache.hybrid import HybridKVCache
from l4ctx.checkpoint.chat_template import ChatTemplate
from l4ctx.checkpoint.generation_config import GenerationConfig
from l4ctx.checkpoint.image_processor import ImageProcessing
from l4ctx.checkpoint.tokenizer import Tokenizer
from l4ctx.documents.document import Document
from l4ctx.documents.images import read_image
from l4ctx.engine.prefill import prefill
from l4ctx.prompt.builder import Prompt, build_prompt
from l4ctx.run.images import ImageReading, ImageUse
from l4ctx.vision.tiles import TileLayout, fitted_size, tile_layout
from model.transformer import Transformer
from model.weights.loading import load_checkpoint
from samples.evaluation.evaluate_tiny import ROOM_FOR_ANSWER, answer_to, find, text_pieces
from samples.tasks.cards import Card, Drawing, draw_card, draw_cards, draw_sheet, random_size, soften
from samples.tasks.lookup import draw_entities, fact, question, random_code

KINDS = ("one tile", "many tiles", "sheet", "among texts")
FORMATS = (("PNG", "png"), ("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"))


@dataclass(frozen=True)
class Asked:
    """One question, and where its answer is: in a tile of an image, or (None) in text."""

    entity: str
    code: str
    image: int | None = None
    tile: int = -1  # -1: the only tile, or the global one


@dataclass
class Case:
    kind: str
    documents: list[Document] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    images: int = 0

    def add_image(self, drawing: Drawing, rng: random.Random) -> None:
        form, suffix = rng.choice(FORMATS)
        file = io.BytesIO()
        drawing.image.save(file, form, quality=90)
        source = f"images/{'sheet' if len(drawing.cards) > 1 else 'card'}-{self.images}.{suffix}"
        image, _ = read_image(source, file.getvalue(), None)
        self.documents.append(Document(source, image.sha256, (image,)))
        self.images += 1

    def add_card(self, card: Card, size: tuple[int, int], rng: random.Random) -> None:
        drawing = draw_card(card, size, rng)
        drawing.image = soften(drawing.image, rng)
        self.asked.append(Asked(card.entity, card.code, self.images))
        self.add_image(drawing, rng)


@dataclass
class Score:
    """Counts by where the answer is: "whole" in an image, in "text", or "cut" by a chunk boundary."""

    right: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0  # for reading and asking


@dataclass(frozen=True)
class Setup:
    """Everything needed to build, read and answer prompts."""

    model: Transformer
    tokenizer: Tokenizer
    template: ChatTemplate | None
    stop_tokens: frozenset[int]
    reading: ImageReading

    @classmethod
    def from_folder(cls, folder: Path, dtype: str) -> Setup:
        model, tokenizer = load_checkpoint(folder, dtype=dtype), Tokenizer.from_folder(folder)
        use = ImageUse(folder, model.config, no_images=False, pdf="text")
        if use.why_not is not None:
            raise SystemExit(f"evaluate_images: {use.why_not}")
        return cls(
            model,
            tokenizer,
            ChatTemplate.from_folder(folder),
            GenerationConfig.from_folder(folder).stop_tokens,
            use.prepare(tokenizer, use.sources()),
        )


def make_case(
    kind: str, images: int, processing: ImageProcessing, texts: Iterator[str], longest_text: int, rng: random.Random
) -> Case:
    """One prompt's documents, with at most `images` images, and the questions about them.

    Texts among images have at most about `longest_text` characters.
    """
    case = Case(kind)
    if kind == "one tile":
        short = rng.randint(processing.size * 3 // 4, processing.size)
        wide = rng.random() < 0.3
        (card,) = draw_cards(rng, 1)
        case.add_card(card, (processing.size, short) if wide else (processing.size, processing.size), rng)
    elif kind == "many tiles":
        (card,) = draw_cards(rng, 1)
        case.add_card(card, _large_size(processing, rng), rng)
    elif kind == "sheet":
        layout, cell = _sheet_size(processing, rng)
        cards = draw_cards(rng, layout.rows * layout.columns)
        case.asked += [Asked(card.entity, card.code, 0, tile) for tile, card in enumerate(cards)]
        case.add_image(draw_sheet(cards, layout.columns, (cell, cell), rng), rng)
        case.asked = rng.sample(case.asked, min(4, len(case.asked)))
    else:
        _add_cards_among_texts(case, images, processing, texts, longest_text, rng)
    return case


def _add_cards_among_texts(
    case: Case, images: int, processing: ImageProcessing, texts: Iterator[str], longest_text: int, rng: random.Random
) -> None:
    """Cards cut into several tiles, and two texts with one fact each, in random order."""
    cards = draw_cards(rng, min(images, rng.randint(2, 5)))
    taken = {card.entity for card in cards}
    entities = [entity for entity in draw_entities(rng, 4, evaluation=True) if entity not in taken][:2]
    for card in cards:
        case.add_card(card, _large_size(processing, rng), rng)
    for number, entity in enumerate(entities):
        code = random_code(rng)
        lines = _text(texts, rng.randint(longest_text // 10, longest_text)).splitlines(keepends=True)
        lines.insert(rng.randint(0, len(lines)), fact(entity, code) + "\n")
        case.documents.append(Document(f"notes-{number}.txt", "", "".join(lines)))
        case.asked.append(Asked(entity, code))
    drawn = [document.source for document in case.documents if document.images]
    rng.shuffle(case.documents)
    shown = [document.source for document in case.documents if document.images]
    case.asked = [
        asked if asked.image is None else replace(asked, image=shown.index(drawn[asked.image])) for asked in case.asked
    ]


def _text(texts: Iterator[str], characters: int) -> str:
    text = ""
    while len(text) < characters:
        text += next(texts)[: characters - len(text)] + "\n"
    return text


def _large_size(processing: ImageProcessing, rng: random.Random) -> tuple[int, int]:
    """The size of an image that is cut into several tiles."""
    if rng.random() < 0.25:
        return rng.choice(((640, 480), (800, 600), (600, 600), (512, 384), (480, 640)))
    return random_size(rng, processing.size + 8, 900)


def _sheet_size(processing: ImageProcessing, rng: random.Random) -> tuple[TileLayout, int]:
    """The layout of a sheet whose cells become tiles, and the side of a cell in pixels."""
    while True:
        layout = TileLayout(rng.randint(1, 4), rng.randint(1, 5))
        cell = rng.choice((processing.size, rng.randint(processing.size, 2 * processing.size)))
        size = layout.columns * cell, layout.rows * cell
        filled = layout.columns * processing.size, layout.rows * processing.size
        if 1 < layout.rows * layout.columns <= processing.max_patches and (
            tile_layout(*size, processing) == layout and fitted_size(*size, layout, processing) == filled
        ):
            return layout, cell


def evaluate(kind: str, setup: Setup, args: argparse.Namespace) -> Score:
    """Reads each prompt of this kind once, then asks each of its questions in a fork of the cache."""
    rng, score, left = random.Random(f"{args.seed} {kind}"), Score(), -(-args.images // len(args.kinds))
    texts = text_pieces(args.text, rng)
    while left > 0:
        case = make_case(kind, left, setup.reading.prompter.processing, texts, args.longest_text, rng)
        left -= case.images
        prompts = [
            build_prompt(
                setup.tokenizer, setup.template, case.documents, question(asked.entity), images=setup.reading.prompter
            )
            for asked in case.asked
        ]
        began = time.perf_counter()
        cache = read_documents(setup, prompts[0])
        for asked, prompt in zip(case.asked, prompts, strict=True):
            ids = array("i", prompt.ids[prompt.documents_stop :])
            answer = answer_to(setup.model, cache.fork(), setup.tokenizer, ids, setup.stop_tokens)
            group = group_of(asked, prompt, setup)
            score.asked[group] += 1
            if re.findall(r"\d+", answer) == [asked.code]:
                score.right[group] += 1
                continue
            score.wrong.append(f"{asked.entity} {asked.code} ({where(asked, prompt)}, {group}): {answer!r}")
            if args.save and asked.image is not None:
                args.save.mkdir(parents=True, exist_ok=True)
                name = f"{kind}-{asked.entity}-{asked.code}".replace(" ", "-")
                prompt.images[asked.image].image.decode().save(args.save / f"{name}.png")
        score.seconds += time.perf_counter() - began
    return score


def read_documents(setup: Setup, prompt: Prompt) -> HybridKVCache:
    """A cache filled with the prompt up to the question, with capacity for the question and an answer."""
    model = setup.model
    features = setup.reading.load(prompt.images, dtype=model.dtype, device=model.device, is_mapped=False)
    cache = HybridKVCache(model.config, length=prompt.documents_stop + ROOM_FOR_ANSWER, dtype=model.dtype)
    for _ in prefill(model, cache, prompt.ids[: prompt.documents_stop], features=features):
        pass
    return cache


def group_of(asked: Asked, prompt: Prompt, setup: Setup) -> str:
    """Where the answer is: "whole" in an image, in "text", or "cut" by a chunk boundary.

    It counts as cut if the boundary falls within its tile or sentence, or between question and answer.
    """
    if asked.image is None:
        spelled = setup.tokenizer.encode_data(fact(asked.entity, asked.code)[:-1]).ids
        first, size = find(prompt.ids, spelled), len(spelled)
    else:
        placed, tokens = prompt.images[asked.image], setup.reading.prompter.tokens
        first = placed.span.start + tokens.tile_starts(placed.layout)[asked.tile]
        size = tokens.tokens_per_tile
    chunk = setup.model.config.attention_chunk_size
    for start, stop in ((first, first + size - 1), (prompt.documents_stop, len(prompt.ids) + 16)):
        if start // chunk != stop // chunk:
            return "cut"
    return "text" if asked.image is None else "whole"


def where(asked: Asked, prompt: Prompt) -> str:
    """A description for debugging a wrong answer."""
    if asked.image is None:
        return "text"
    image = prompt.images[asked.image].image
    return f"{image.width} x {image.height}, tile {asked.tile}"


def report(kind: str, score: Score, as_json: bool) -> None:
    if as_json:
        print(
            json.dumps(
                {
                    "kind": kind,
                    "right": score.right,
                    "asked": score.asked,
                    "wrong": score.wrong,
                    "seconds": round(score.seconds, 1),
                }
            ),
            flush=True,
        )
        return
    names = {"whole": "of images", "text": "of texts", "cut": "of those cut by a chunk boundary"}
    shares = [
        f"{score.right[group]} of {score.asked[group]} {name}" for group, name in names.items() if score.asked[group]
    ]
    print(f"{kind}: {', '.join(shares)} right ({score.seconds:.1f} s)", flush=True)
    for line in score.wrong:
        print(f"    {line}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "tiny")
    parser.add_argument("--images", type=int, default=200, help="number of images, about a quarter for each kind")
    parser.add_argument("--seed", type=int, default=1_000)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--longest-text", type=int, default=4_000, help="maximum characters per text among images")
    parser.add_argument("--text", type=Path, nargs="+", default=[Path(torch.__file__).parent])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--save", type=Path, help="folder to save wrongly read images in")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line instead of text")
    args = parser.parse_args()
    setup = Setup.from_folder(args.model, args.dtype)
    for kind in args.kinds:
        report(kind, evaluate(kind, setup, args), args.json)


if __name__ == "__main__":
    main()
