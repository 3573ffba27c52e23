"""Kills prefills into a saved context at random moments, and checks what they leave behind.

    python tests/soak/kill_prefill.py --kills 1000

Each trial creates a context, or changes the documents of one, with a toy model. The process is killed (SIGKILL) at some
point of the prefill; the context is then asked, resumed, perhaps killed again. In the end, the bytes of its blocks and
the logits of a question must equal those of an uninterrupted prefill. Until then, readers must never see a partial set
of documents. The documents include images: cards of several tiles each, which block boundaries cut. One of the changes
replaces a card with another that has the same token ids. Torch is imported once, and each process is a fork. The models
are so small that most of the time is spent on files.
"""

from __future__ import annotations

import argparse
import functools
import io
import os
import pickle
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # forking a process with threads may hang
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for samples
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for support

import torch

from cache.grid import grid_period
from l4ctx.checkpoint.image_processor import ImageProcessing
from l4ctx.contexts.folder import FILE as MANIFEST
from l4ctx.contexts.folder import HEAD
from l4ctx.contexts.reader import Context
from l4ctx.documents.images import DocumentImage, read_image
from l4ctx.errors import ContextError
from l4ctx.vision.features import ImageFeatures
from l4ctx.vision.prompter import ImagePrompter, PlacedImage
from l4ctx.vision.tokens import ImageTokens
from model.vision.config import VisionConfig
from model.vision.tower import VisionTower
from samples.tasks.cards import draw_card, draw_cards, random_size
from support import context_toys
from support.context_toys import BLOCK, CHUNK, CONFIG, VOCABULARY, Kind, answer, block_digests, changed

VISION: Any = VisionConfig.from_dict(
    {
        "image_token_index": VOCABULARY - 1,
        "vision_config": {
            "hidden_size": 24,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "image_size": 42,
            "patch_size": 7,
            "pixel_shuffle_ratio": 0.5,
            "intermediate_size": 96,
            "vision_output_dim": 20,
            "projector_input_dim": 20,
            "projector_output_dim": 20,
        },
    }
)
PROMPTER = ImagePrompter(
    ImageProcessing(size=VISION.image_size, max_patches=9),
    ImageTokens(
        image_start=91,
        image_end=92,
        tile_x_separator=93,
        tile_y_separator=94,
        image=95,
        patch=VOCABULARY - 1,
        tokens_per_tile=VISION.tokens_per_tile,
    ),
    "0f" * 32,
)
LENGTH = 10 * BLOCK + 23  # tokens of the documents, unless there are many images
TEXT_BEFORE_IMAGE = 9
WAYS = {
    "one block a step": Kind(prefill_chunk_size=BLOCK),
    "int8, five blocks a step": Kind("int8", prefill_chunk_size=5 * BLOCK),
}
MOST_KILLS = 4  # per trial
MOMENTS = (
    "before the manifest",
    "before the documents",
    "while reading",
    "inside an image",
    "while finishing",
    "after the end",
)


@dataclass(frozen=True)
class Documents:
    """The documents of a prefill: text as random token ids, images as their placeholder tokens."""

    ids: array[int]
    images: list[PlacedImage]

    @property
    def tiles(self) -> list[range]:
        """The positions of each image tile."""
        size = PROMPTER.tokens.tokens_per_tile
        return [
            range(placed.span.start + start, placed.span.start + start + size)
            for placed in self.images
            for start in PROMPTER.tokens.tile_starts(placed.layout)
        ]


def draw_documents(cards: list[DocumentImage]) -> Documents:
    """Some tokens of text before each card, and the rest of LENGTH, at least 23 tokens, after the last."""
    chance, ids, images = random.Random(0), array("i"), []
    for card in cards:
        ids.extend(chance.randrange(VOCABULARY) for _ in range(TEXT_BEFORE_IMAGE))
        images.append(PROMPTER.encode(card, ids))
    ids.extend(chance.randrange(VOCABULARY) for _ in range(max(LENGTH - len(ids), 23)))
    return Documents(ids, images)


def draw_file(size: tuple[int, int], chance: random.Random) -> DocumentImage:
    """A card as a PNG file."""
    (card,) = draw_cards(chance, 1)
    file = io.BytesIO()
    draw_card(card, size, chance).image.save(file, "PNG")
    return read_image(f"{card.entity}.png", file.getvalue(), None)[0]


def changes(cards: list[DocumentImage], chance: random.Random) -> dict[str, Documents]:
    """The same documents with one text token changed, and with one card replaced by another of as many tokens."""
    documents, number = draw_documents(cards), len(cards) // 2
    place = documents.images[number].span.start - 1 if cards else 2 * BLOCK + 19
    found = {"a change of text": Documents(changed(documents.ids, place), documents.images)}
    if cards:
        other = draw_file((cards[number].width, cards[number].height), chance)
        found["another image"] = draw_documents([*cards[:number], other, *cards[number + 1 :]])
        assert found["another image"].ids == documents.ids
    return found


@functools.cache
def tower() -> VisionTower:
    return context_toys.randomized(VisionTower(VISION, CONFIG.hidden_size), seed=1)


def keep(folder: Path, documents: Documents, kind: Kind) -> None:
    """A complete run of `l4ctx prefill`."""
    context_toys.keep(
        folder,
        documents.ids,
        kind,
        images=[placed.span for placed in documents.images],
        features=ImageFeatures(tower(), PROMPTER, documents.images),
    )


@dataclass
class Case:
    """A prefill into an existing context (`base`) or a new one, and its expected outcome."""

    name: str
    kind: Kind
    documents: Documents
    base: Path | None
    digests: list[str]
    answers: list[bytes]  # logits by number of complete sets of documents
    seconds: float

    @property
    def complete(self) -> int:
        """The number of sets of documents that are complete in the end."""
        return len(self.answers) - 1


def forked(work: Callable[[], object], moment: float | None = None) -> tuple[int, float]:
    """Does the work in a fork, killed `moment` seconds after it begins; returns exit code and time."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reading)
            os.write(writing, b"!")
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    began = time.perf_counter()
    if moment is not None:
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), time.perf_counter() - began


def in_a_fork(work: Callable[[], object], scratch: Path) -> object:
    """What the work returns. It runs in a fork, so that this process starts no threads."""
    file = scratch / "result"
    code, _ = forked(lambda: file.write_bytes(pickle.dumps(work())))
    if code:
        raise SystemExit("the context of an uninterrupted prefill cannot be used")
    return pickle.loads(file.read_bytes())  # noqa: S301 (our own file)


def outcome(folder: Path, kind: Kind) -> tuple[list[str], bytes]:
    return block_digests(folder), answered(folder, kind)


def answered(folder: Path, kind: Kind) -> bytes:
    return bytes(answer(folder, kind).flatten().view(torch.uint8).tolist())


def prepare(images: int, scratch: Path) -> list[Case]:
    """Draws the documents, and measures uninterrupted prefills."""
    chance, cases = random.Random(0), []
    cards = [draw_file(random_size(chance, 50, 84), chance) for _ in range(images)]
    for way, kind in WAYS.items():
        new = measured(f"a new context, {way}", kind, draw_documents(cards), None, scratch)
        cases.append(new)
        for what, documents in changes(cards, chance).items():
            cases.append(measured(f"{what}, {way}", kind, documents, new, scratch))
    return cases


def measured(name: str, kind: Kind, documents: Documents, before: Case | None, scratch: Path) -> Case:
    """Measures a prefill of new documents, or of documents that differ from those of the case `before`."""
    seconds, base = [], None if before is None else scratch / before.name
    for n in range(3):
        folder = scratch / f"{name}{f', {n}' * (n > 0)}"
        if base is not None:
            shutil.copytree(base, folder)
        code, took = forked(lambda: keep(folder, documents, kind))  # noqa: B023 (called at once)
        if code:
            raise SystemExit("the uninterrupted prefill fails")
        seconds.append(took)
    digests, logits = in_a_fork(lambda: outcome(folder, kind), scratch)
    answers = [b""] if before is None else before.answers
    assert before is None or (digests != before.digests and logits != before.answers[-1]), "a change without effect"
    return Case(name, kind, documents, base, digests, [*answers, logits], statistics.median(seconds))


def moment_of(folder: Path, case: Case) -> str:
    """How far a killed prefill got, judged by what it left behind."""
    if not (folder / MANIFEST).exists():
        return "before the manifest"
    try:
        states = Context.read(folder).states
    except ContextError:
        return "and cannot be read"  # `check_readers` will find out why
    complete = sum(state.is_complete for state in states)
    if complete == case.complete:
        return "after the end"
    if len(states) == complete:
        return "before the documents"
    if len(states[-1].blocks) == len(case.digests):
        return "while finishing"
    period = grid_period(case.kind.prefill_chunk_size, CHUNK, BLOCK)
    goes_on_at = max(states[-1].start, len(states[-1].blocks) * BLOCK // period * period)
    is_inside = any(placed.span.start < goes_on_at < placed.span.stop for placed in case.documents.images)
    return "inside an image" if is_inside else "while reading"


def check_readers(folder: Path, case: Case) -> None:
    """A reader gets the answer from the newest complete set of documents, or the error that there is none."""
    is_there = (folder / MANIFEST).exists()
    complete = sum(state.is_complete for state in Context.read(folder).states) if is_there else 0
    if complete:
        assert answered(folder, case.kind) == case.answers[complete], f"a wrong answer after {complete} ends"
        return
    try:
        answer(folder, case.kind)
    except ContextError as error:
        said = str(error)
        assert any(text in said for text in ("no such folder", "no manifest", "was read yet", "was interrupted")), said
    else:
        raise AssertionError("an answer of what is not complete")


def check_end(folder: Path, case: Case) -> None:
    digests, logits = outcome(folder, case.kind)
    assert digests == case.digests, "other block bytes"
    assert logits == case.answers[case.complete], "other logits"
    assert (folder / HEAD).exists()


def trial(folder: Path, case: Case, chance: random.Random, most: int, moments: Counter[str]) -> bool:
    """Kills one context until it is complete, at most `most` times; whether all was right. Counts kills by moment."""
    if case.base is not None:
        shutil.copytree(case.base, folder)
    kills = []
    for _ in range(chance.randint(1, most)):
        code, _ = forked(lambda: keep(folder, case.documents, case.kind), chance.uniform(0, case.seconds))
        if code != -signal.SIGKILL:
            break
        kills.append(moment_of(folder, case))
        if forked(lambda: check_readers(folder, case))[0]:
            code = 1
            break
    else:
        code = 0
    moments.update(kills)
    if code == 0:
        code = forked(lambda: keep(folder, case.documents, case.kind))[0] or forked(lambda: check_end(folder, case))[0]
    if code:
        print(f"wrong: {case.name}, killed {', then '.join(kills) or 'never'}: {folder}", flush=True)
    return code == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--images", type=int, default=4, help="cards among the documents")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    context_toys.model(), tower()
    began, chance = time.perf_counter(), random.Random(args.seed)
    moments: Counter[str] = Counter()
    scratch = Path(tempfile.mkdtemp(prefix="l4ctx-kills-"))
    cases = prepare(args.images, scratch)
    wrong = trials = 0
    while moments.total() < args.kills:
        folder = scratch / f"trial {trials}"
        if trial(folder, cases[trials % len(cases)], chance, min(MOST_KILLS, args.kills - moments.total()), moments):
            shutil.rmtree(folder)
        else:
            wrong += 1
        trials += 1
    where = ", ".join(f"{moments[name]:,} {name}" for name in MOMENTS)
    tiles = cases[0].documents.tiles
    cut = sum(tile.start // BLOCK != (tile.stop - 1) // BLOCK for tile in tiles)
    took = ", ".join(f"{case.seconds * 1000:.0f}" for case in cases)
    print(
        f"{moments.total():,} kills in {trials:,} trials: {where}; {wrong:,} mismatches "
        f"({time.perf_counter() - began:.0f} s; uninterrupted prefills take {took} ms; {args.images} images of "
        f"{len(tiles)} tiles, {cut} of them cut by a block boundary)"
    )
    if wrong:
        raise SystemExit(1)
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
