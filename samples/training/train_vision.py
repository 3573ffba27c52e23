"""Trains the vision tower of `samples/tiny`, so that its text model can look up codes in images of cards.

    python -m samples.training.train_vision --output samples/tiny --minutes 32
    python -m samples.training.train_vision --output samples/tiny --minutes 19 --resume --seed 1 --lr 8e-4 \\
        --batch 36 --hint 0.5

The text model stays unchanged. The target of a tile that shows one whole card is the embeddings of the sentence that
describes it, in as many tokens as a tile has; the target of any other tile is those of empty lines, which lead to no
answer. So the training does not run the text model: the loss compares with rows of its embedding table. A second,
auxiliary loss asks an early layer which digit each patch shows. `--resume` continues from the last saved state, with a
new time limit. Imports nothing from l4ctx, model or cache.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from samples.tasks.cards import COLOURS, SHAPES, Box, Card, draw_card, draw_cards, draw_sheet, random_size, soften
from samples.tasks.lookup import fact
from samples.training.tiny_vision import SIDE, TILE, TILE_TOKENS, VISION_CONFIG, VisionForTraining, to_pixels

NEUTRAL = "\n\n"  # the sentence of a tile without a whole card; a single newline disturbs the text model
SHARPNESS = 2.0  # logits are -SHARPNESS times squared distances from the embedding rows
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


class Example(NamedTuple):
    tile: Image.Image
    card: Card | None  # the one whole card that it shows
    code: Box | None = None  # where its digits are; None: not known to the auxiliary loss


def sentence(card: Card | None) -> str:
    return f"\n{fact(card.entity, card.code)}\n" if card else NEUTRAL * TILE_TOKENS


def make_example(rng: random.Random, freedom: float, evaluation: bool) -> Example:
    """A tile; with a freedom below 1, mostly cards of a tile's size that look alike."""
    if rng.random() < (0.72 if freedom == 1 else 0.97):
        return _whole_card(rng, freedom, evaluation)
    while True:
        example = rng.choices((_part_of_an_image, _small_cards, _between_cards, _no_card), (45, 25, 10, 20))[0](
            rng, evaluation
        )
        if example is not None:
            return example


def _whole_card(rng: random.Random, freedom: float, evaluation: bool) -> Example:
    (card,) = draw_cards(rng, 1, evaluation=evaluation)
    draw = rng.random() if rng.random() < freedom else 0.0
    if draw < 0.45:  # a cell of a sheet, or a single-tile image
        size = target = TILE, TILE
    elif draw < 0.85:  # a global tile: the whole image, distorted
        size, target = random_size(rng, TILE, 420), (TILE, TILE)
    else:  # a small image that does not fill its tile
        width, height = random_size(rng, 84, TILE)
        scale = TILE / max(width, height)
        target = round(width * scale), round(height * scale)
        size = (width, height) if scale > 1 else target
    drawing = draw_card(card, size, rng, freedom=freedom)
    tile = drawing.image if freedom < 1 or size == target else soften(drawing.image, rng)
    tile = tile.resize(target, Image.Resampling.BILINEAR)
    if target != (TILE, TILE):
        tile, fitted = Image.new("RGB", (TILE, TILE)), tile
        tile.paste(fitted, (0, 0))
    left, top, right, bottom = drawing.cards[0][2]
    across, down = target[0] / size[0], target[1] / size[1]
    code = left * across, top * down, right * across, bottom * down
    return Example(tile if freedom < 1 else soften(tile, rng), card, code)


def hints(examples: list[Example]) -> Tensor:
    """Which digit each patch shows, for the auxiliary loss: (B, patches), 10 for none, -100 (ignored) if unknown."""
    hint = torch.full((len(examples), SIDE, SIDE), -100)
    size = TILE / SIDE
    for i, (_, card, box) in enumerate(examples):
        if card is None or box is None:
            continue
        left, top, right, bottom = box
        for row in range(SIDE):
            for column in range(SIDE):
                x, y = (column + 0.5) * size, (row + 0.5) * size
                at = (x - left) / (right - left) * len(card.code)
                if abs(at - round(at)) < 0.12 and 0.5 < at < 4.5:
                    continue  # between two digits
                inside = 0 < at < len(card.code) and top - 1 < y < bottom + 1
                hint[i, row, column] = int(card.code[int(at)]) if inside else 10
    return hint.flatten(1)


def _part_of_an_image(rng: random.Random, evaluation: bool) -> Example | None:
    (card,) = draw_cards(rng, 1, evaluation=evaluation)
    width, height = random_size(rng, 118, 440)
    if rng.random() < 0.5:
        width = max(TILE, width // TILE * TILE)
    drawing = draw_card(card, (width, height), rng)
    left, top = (rng.randrange(-(-side // TILE)) * TILE for side in (width, height))
    box = (left, top, left + TILE, top + TILE)
    shown, clear = drawing.shows(box)
    return Example(soften(drawing.image.crop(box), rng), shown) if clear else None


def _small_cards(rng: random.Random, evaluation: bool) -> Example:
    columns, rows = rng.choice(((2, 1), (1, 2), (2, 2), (3, 2), (2, 3), (3, 3), (4, 3), (3, 4), (4, 4)))
    are_few = columns * rows <= 8  # the pairs that training never shows are few too
    cards = draw_cards(rng, columns * rows, evaluation=evaluation if are_few else False)
    side = rng.randint(40, TILE)
    sheet = draw_sheet(cards, columns, (side, side), rng).image
    return Example(soften(sheet.resize((TILE, TILE), Image.Resampling.BILINEAR), rng), None)


def _between_cards(rng: random.Random, evaluation: bool) -> Example | None:
    columns, rows = rng.choice(((2, 1), (1, 2), (2, 2)))
    drawing = draw_sheet(draw_cards(rng, columns * rows, evaluation=evaluation), columns, (TILE, TILE), rng)
    left, top = (rng.randrange(8, TILE) if count > 1 else 0 for count in (columns, rows))
    box = (left, top, left + TILE, top + TILE)
    shown, clear = drawing.shows(box)
    return Example(soften(drawing.image.crop(box), rng), shown) if clear else None


def _no_card(rng: random.Random, evaluation: bool) -> Example:
    (card,) = draw_cards(rng, 1, evaluation=evaluation)
    draw = rng.random()
    if draw < 0.15:
        return Example(Image.new("RGB", (TILE, TILE)), None)
    if draw < 0.25:
        return Example(Image.new("RGB", (TILE, TILE), rng.choice(list(COLOURS.values()))), None)
    if draw < 0.4:
        side = rng.choice((4, 8, 16, 56, 112))
        noise = Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side))
        return Example(noise.resize((TILE, TILE), Image.Resampling.BILINEAR), None)
    image = draw_card(card, random_size(rng, TILE, 180), rng, without="code" if draw < 0.7 else "shape").image
    return Example(soften(image.resize((TILE, TILE), Image.Resampling.BILINEAR), rng), None)


class Words:
    """The embedding rows that can be targets of a tile, and the sentences as indices into them."""

    def __init__(self, tokenizer: Tokenizer, embeddings: Tensor) -> None:
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        neutral = self.encode(NEUTRAL)
        samples = [Card(colour, SHAPES[0], "01234") for colour in COLOURS]
        samples += [Card("red", shape, "56789") for shape in SHAPES]
        vocabulary = sorted({token for card in samples for token in self.encode(sentence(card))} | set(neutral))
        assert len(neutral) == 1 and all(len(self.encode(sentence(card))) == TILE_TOKENS for card in samples)
        self.neutral = neutral[0]
        self.index = {token: i for i, token in enumerate(vocabulary)}
        self.rows = embeddings[vocabulary].float()
        spelled = zip(*(self.encode(sentence(card)) for card in samples), strict=True)
        self.told = torch.tensor([len(set(column)) > 1 for column in spelled])  # positions that differ between cards

    def targets(self, cards: list[Card | None]) -> Tensor:
        return torch.tensor(
            [
                [self.index[token] for token in (self.encode(sentence(card)) if card else [self.neutral] * TILE_TOKENS)]
                for card in cards
            ]
        )


def compare(features: Tensor, targets: Tensor, words: Words) -> tuple[Tensor, Tensor]:
    """Loss, and whether each position is nearest to its target; features (B, TILE_TOKENS, text size).

    The loss is the cross-entropy with negative squared distances from the embedding rows as logits, plus the squared
    distance from the right row.
    """
    flat = features.float().flatten(0, 1)
    squares = flat.square().sum(-1, keepdim=True) - 2 * flat @ words.rows.T + words.rows.square().sum(-1)
    wanted = targets.flatten()
    weight = torch.where(words.told, 2.0, 0.5).repeat(targets.shape[0])
    apart = F.cross_entropy(-SHARPNESS * squares, wanted, reduction="none")
    off = squares.gather(1, wanted[:, None])[:, 0]
    loss = ((apart + 0.4 * off) * weight).mean()
    return loss, (squares.argmin(-1) == wanted).view_as(targets)


def shares_right(right: Tensor, cards: list[Card | None], words: Words) -> dict[str, float]:
    """Accuracy on digits, colours and shapes, and sentences of whole cards; and of tiles that show no whole card."""
    shown = torch.tensor([card is not None for card in cards])
    told = right[shown][:, words.told]
    values = {
        "digits": told[:, 2:],
        "names": told[:, :2],
        "sentences": right[shown].all(1),
        "neutral": right[~shown].all(1),
    }
    return {name: float(value.float().mean()) if value.numel() else 1.0 for name, value in values.items()}


def evaluate(model: VisionForTraining, words: Words, examples: list[Example]) -> dict[str, float]:
    rights, cards = [], [example.card for example in examples]
    with torch.no_grad():
        for i in range(0, len(examples), 64):
            part = examples[i : i + 64]
            targets = words.targets([example.card for example in part])
            rights.append(compare(model(to_pixels([example.tile for example in part])), targets, words)[1])
    return shares_right(torch.cat(rights), cards, words)


def train(model: VisionForTraining, words: Words, args: argparse.Namespace) -> None:
    hint_head = torch.nn.Linear(VISION_CONFIG["hidden_size"], 11)  # for the auxiliary loss, in training only
    groups = [
        {"params": [p for m in (model, hint_head) for p in m.parameters() if p.ndim > 1], "weight_decay": 0.03},
        {"params": [p for m in (model, hint_head) for p in m.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    state_file, step = args.state or args.output / "training.pt", 0
    saved = {"model": model, "hint_head": hint_head, "optimizer": optimizer}
    if args.resume:
        state = torch.load(state_file, weights_only=True)
        for name, owner in saved.items():
            owner.load_state_dict(state[name])
        step = state["step"]
    rng, judge = random.Random(args.seed * 1_000_003 + step), random.Random(-1 - args.seed)
    seen = [make_example(judge, 1.0, evaluation=False) for _ in range(384)]
    unseen = [make_example(judge, 1.0, evaluation=True) for _ in range(384)]
    began, first, progress, recent = time.monotonic(), step, 0.0, 0.0
    while progress < 1:
        progress = min(1.0, (time.monotonic() - began) / (args.minutes * 60))
        warm_up = min(1.0, (step - first + 1) / 200)
        rate = args.lr * warm_up * (0.5 + 0.5 * math.cos(math.pi * progress)) + 1e-6
        for group in optimizer.param_groups:
            group["lr"] = rate
        freedom = 1.0 if args.resume else min(1.0, progress / args.easy)
        examples = [make_example(rng, freedom, evaluation=False) for _ in range(args.batch)]
        targets = words.targets([example.card for example in examples])
        with torch.autocast("cpu", torch.bfloat16, enabled=progress < 0.7):
            features = model(to_pixels([example.tile for example in examples]))
        loss, right = compare(features, targets, words)
        hint = F.cross_entropy(hint_head(model.hinted.float()).flatten(0, 1), hints(examples).flatten())
        loss = loss + args.hint * hint
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        recent += (loss.item() - recent) * (0.02 if step > first + 1 else 1.0)
        if step % 100 == 0:
            shares = shares_right(right, [example.card for example in examples], words)
            told = " ".join(f"{name} {share:.3f}" for name, share in shares.items())
            print(
                f"step {step} loss {recent:.4f} hint {hint.item():.3f} {told} lr {rate:.6f} "
                f"minutes {(time.monotonic() - began) / 60:.1f}",
                flush=True,
            )
        if step % 1000 == 0 or progress == 1.0:
            torch.save({name: owner.state_dict() for name, owner in saved.items()} | {"step": step}, state_file)
            for name, judged in (("pairs of training", seen), ("other pairs", unseen)):
                shares = evaluate(model, words, judged)
                print(f"   {name}: " + " ".join(f"{k} {v:.4f}" for k, v in shares.items()), flush=True)


def text_tensors(folder: Path) -> dict[str, Tensor]:
    """The text model's tensors by their text-only names, from a folder with or without a vision tower."""
    whole = folder / "model.safetensors"
    stored = load_file(whole if whole.exists() else folder / SHARDS[0])
    return {name.removeprefix("language_model."): tensor.clone() for name, tensor in stored.items()}  # copies


def export(model: VisionForTraining, text: dict[str, Tensor], source: Path, output: Path) -> None:
    """Writes the checkpoint in the published format: two shards, an index, and the nested configuration."""
    output.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Any]] = [{f"language_model.{name}": p for name, p in text.items()}]
    shards.append({name: p.detach().to(torch.bfloat16).contiguous() for name, p in model.state_dict().items()})
    for name, tensors in zip(SHARDS, shards, strict=True):
        save_file(tensors, output / name, metadata={"format": "pt"})
    places = {tensor: name for name, tensors in zip(SHARDS, shards, strict=True) for tensor in tensors}
    size = sum(p.numel() * p.element_size() for tensors in shards for p in tensors.values())
    _write(output / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": places})
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    config = json.loads((source / "config.json").read_text())
    config = config.get("text_config", config)
    config.pop("architectures", None)
    _write(
        output / "config.json",
        {
            "architectures": ["Llama4ForConditionalGeneration"],
            "model_type": "llama4",
            "boi_token_index": tokenizer.token_to_id("<|image_start|>"),
            "eoi_token_index": tokenizer.token_to_id("<|image_end|>"),
            "image_token_index": tokenizer.token_to_id("<|patch|>"),
            "text_config": config,
            "vision_config": VISION_CONFIG,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
    )
    size = {"height": TILE, "width": TILE}
    _write(
        output / "preprocessor_config.json",
        {
            "crop_size": None,
            "data_format": "channels_first",
            "default_to_square": True,
            "device": None,
            "do_center_crop": None,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5] * 3,
            "image_processor_type": "Llama4ImageProcessorFast",
            "image_std": [0.5] * 3,
            "input_data_format": None,
            "max_patches": 16,
            "processor_class": "Llama4Processor",
            "resample": 2,
            "rescale_factor": 1 / 255,
            "resize_to_max_canvas": False,
            "return_tensors": None,
            "size": size,
        },
    )
    if source.resolve() == output.resolve():
        (output / "model.safetensors").unlink(missing_ok=True)  # the first shard has its tensors now
        return
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, output / name)


def _write(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent
    parser.add_argument("--text-model", type=Path, default=here / "tiny", help="the checkpoint to add a tower to")
    parser.add_argument("--output", type=Path, default=here / "tiny")
    parser.add_argument("--state", type=Path, help="state to resume (default: training.pt in the output folder)")
    parser.add_argument("--minutes", type=float, default=32.0)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--easy", type=float, default=0.3, help="share of the time over which cards become varied")
    parser.add_argument("--hint", type=float, default=1.0, help="weight of the auxiliary loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    text = text_tensors(args.text_model)
    embeddings = text["model.embed_tokens.weight"]
    words = Words(Tokenizer.from_file(str(args.text_model / "tokenizer.json")), embeddings)
    model = VisionForTraining(embeddings.shape[1])
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {len(words.rows)} words", flush=True)
    train(model, words, args)
    export(model, text, args.text_model, args.output)


if __name__ == "__main__":
    main()
