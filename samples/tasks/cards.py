"""Images for the look-up task: cards that show a coloured shape with a five-digit code below it, and sheets of cards.

Drawn with Pillow only; the same `random.Random` state gives the same image. A card is readable from a part of an image
that shows its whole shape and code; `Drawing.shows` tells which card that is. Knows nothing of tokens and models.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from samples.tasks.lookup import ADJECTIVES, NOUNS, held_out, random_code

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]  # left, top, right, bottom

COLOURS: dict[str, Colour] = {
    "red": (214, 32, 40),
    "amber": (250, 148, 10),
    "yellow": (246, 228, 40),
    "green": (34, 150, 62),
    "azure": (96, 196, 246),
    "blue": (28, 70, 210),
    "purple": (132, 38, 168),
    "brown": (118, 68, 30),
    "grey": (132, 132, 136),
    "white": (248, 248, 248),
}
SHAPES = "star moon circle arrow cloud crown kite mountain window ladder tower planet".split()

assert set(COLOURS) <= set(ADJECTIVES) and set(SHAPES) <= set(NOUNS)

LEAST_CONTRAST = 105  # RGB distance between the colours of shape and background


class Card(NamedTuple):
    colour: str
    shape: str
    code: str

    @property
    def entity(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass
class Drawing:
    """An image, and the boxes of its cards' shapes and codes, in pixels."""

    image: Image.Image
    cards: list[tuple[Card, Box, Box]] = field(default_factory=list)

    def shows(self, box: Box) -> tuple[Card | None, bool]:
        """The only card that lies wholly within `box`, and whether that is certain (no part barely cut or kept)."""
        whole, clear = [], True
        for card, *parts in self.cards:
            overlaps = [_overlap(part, box) for part in parts]
            if min(overlaps) > 0.995:
                whole.append(card)
            elif min(overlaps) > 0.93:
                clear = False
        return (whole[0] if len(whole) == 1 else None), clear and len(whole) < 2


def _overlap(part: Box, box: Box) -> float:
    """The share of the part's width or height, whichever is less, that lies within the box."""
    across = (min(part[2], box[2]) - max(part[0], box[0])) / (part[2] - part[0])
    down = (min(part[3], box[3]) - max(part[1], box[1])) / (part[3] - part[1])
    return max(0.0, min(across, down))


def draw_cards(rng: random.Random, count: int, *, evaluation: bool | None = None) -> list[Card]:
    """`count` cards of different entities.

    `evaluation`: True for pairs that training never shows, False for those that it does, None for any.
    """
    pairs = [(c, s) for c in COLOURS for s in SHAPES if evaluation is None or held_out(f"{c} {s}") == evaluation]
    return [Card(*pair, random_code(rng)) for pair in rng.sample(pairs, count)]


Paint = Callable[[list[tuple[float, float]] | Box, bool], None]
"""Fills the outline (True) or cuts it out (False): a polygon's points, or the box of an ellipse."""


POLYGONS: dict[str, list[tuple[float, float]]] = {
    "star": [
        (0.5 + r * math.sin(i * math.pi / 5), 0.53 - r * math.cos(i * math.pi / 5))
        for i in range(10)
        for r in [0.21 if i % 2 else 0.52]
    ],
    "arrow": [(0, 0.36), (0.52, 0.36), (0.52, 0.1), (1, 0.5), (0.52, 0.9), (0.52, 0.64), (0, 0.64)],
    "crown": [(0, 0.16), (0.25, 0.5), (0.5, 0.06), (0.75, 0.5), (1, 0.16), (0.92, 0.9), (0.08, 0.9)],
    "kite": [(0.5, 0), (0.86, 0.38), (0.5, 1), (0.14, 0.38)],
    "mountain": [(0, 0.92), (0.34, 0.12), (0.52, 0.5), (0.68, 0.3), (1, 0.92)],
    "tower": [
        (0.2, 0),
        (0.36, 0),
        (0.36, 0.14),
        (0.42, 0.14),
        (0.42, 0),
        (0.58, 0),
        (0.58, 0.14),
        (0.64, 0.14),
        (0.64, 0),
        (0.8, 0),
        (0.8, 0.3),
        (0.7, 0.36),
        (0.7, 1),
        (0.3, 1),
        (0.3, 0.36),
        (0.2, 0.3),
    ],
}
"""Shapes that are a single polygon in a box from (0, 0) to (1, 1)."""


def _paint_shape(name: str, paint: Paint) -> None:
    """Paints a shape in a box from (0, 0) to (1, 1)."""
    if name in POLYGONS:
        paint(POLYGONS[name], True)
    elif name == "moon":
        paint((0.08, 0.0, 1.08, 1.0), True)
        paint((0.36, -0.1, 1.36, 0.9), False)
    elif name == "circle":
        paint((0.04, 0.04, 0.96, 0.96), True)
    elif name == "cloud":
        for ellipse in ((0.0, 0.42, 0.42, 0.84), (0.2, 0.14, 0.7, 0.66), (0.54, 0.34, 1.0, 0.84)):
            paint(ellipse, True)
        paint([(0.2, 0.5), (0.76, 0.5), (0.78, 0.84), (0.2, 0.84)], True)
    elif name == "window":
        paint([(0.06, 0.04), (0.94, 0.04), (0.94, 0.96), (0.06, 0.96)], True)
        for x in (0.17, 0.55):
            for y in (0.15, 0.55):
                paint([(x, y), (x + 0.28, y), (x + 0.28, y + 0.3), (x, y + 0.3)], False)
    elif name == "ladder":
        for x in (0.18, 0.68):
            paint([(x, 0), (x + 0.14, 0), (x + 0.14, 1), (x, 1)], True)
        for y in (0.14, 0.44, 0.74):
            paint([(0.2, y), (0.8, y), (0.8, y + 0.13), (0.2, y + 0.13)], True)
    elif name == "planet":
        paint(
            [
                (
                    0.5 + 0.52 * math.cos(a) * 0.94 + 0.13 * math.sin(a) * 0.34,
                    0.5 - 0.52 * math.cos(a) * 0.34 + 0.13 * math.sin(a) * 0.94,
                )
                for a in (i * math.pi / 16 for i in range(32))
            ],
            True,
        )
        paint((0.2, 0.2, 0.8, 0.8), True)
    else:
        raise AssertionError(name)


def _shape_mask(name: str, side: int, degrees: float) -> Image.Image:
    """A slightly rotated shape of `side` pixels, drawn at three times the size for smooth edges."""
    scale = 3 * side
    mask = Image.new("L", (scale, scale))
    draw = ImageDraw.Draw(mask)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))

    def place(x: float, y: float) -> tuple[float, float]:
        x, y = x - 0.5, y - 0.5
        return scale * (0.5 + 0.9 * (x * cos - y * sin)), scale * (0.5 + 0.9 * (x * sin + y * cos))

    def paint(outline: list[tuple[float, float]] | Box, fill: bool) -> None:
        if isinstance(outline, tuple):
            left, top, right, bottom = outline
            x, y, across, down = (left + right) / 2, (top + bottom) / 2, (right - left) / 2, (bottom - top) / 2
            outline = [
                (x + across * math.cos(i * math.pi / 20), y + down * math.sin(i * math.pi / 20)) for i in range(40)
            ]
        draw.polygon([place(*point) for point in outline], fill=255 if fill else 0)

    _paint_shape(name, paint)
    return mask.reduce(3)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _code_mask(code: str, width: float, tracking: float, bold: bool, degrees: float) -> Image.Image:
    """The code's digits, about `width` pixels wide, without margins."""
    unit = _font(100)
    size = max(6, round(100 * width / sum(unit.getlength(digit) * tracking for digit in code)))
    stroke = max(1, round(size / 28)) if bold else 0
    font = _font(size)
    mask = Image.new("L", (round(width * 1.2) + 2 * stroke + 4, round(size * 1.3) + 4))
    draw, x = ImageDraw.Draw(mask), size * 0.1 + 2
    for digit in code:
        draw.text((x, 2), digit, fill=255, font=font, stroke_width=stroke)
        x += font.getlength(digit) * tracking
    if degrees:
        mask = mask.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    return mask.crop(mask.getbbox())


def _near(rng: random.Random, colour: Colour, spread: int) -> Colour:
    red, green, blue = (min(255, max(0, c + rng.randint(-spread, spread))) for c in colour)
    return red, green, blue


def _background(
    rng: random.Random, size: tuple[int, int], unlike: Colour, freedom: float
) -> tuple[Image.Image, Colour]:
    """A plain, graded or slightly noisy background, and its approximate colour."""
    while True:
        if rng.random() > 0.35 * freedom:
            base = _near(rng, (228, 228, 226), 27)
        elif rng.random() < 0.5 or freedom < 1:
            base = _near(rng, (30, 32, 40), 30)
        else:
            red, green, blue = (rng.choice((rng.randint(0, 90), rng.randint(165, 255))) for _ in range(3))
            base = red, green, blue
        if math.dist(base, unlike) > (LEAST_CONTRAST if freedom == 1 else 0):
            break
    image = Image.new("RGB", size, base)
    if rng.random() < 0.35 * freedom:
        other = Image.new("RGB", size, _near(rng, base, 24))
        ramp = Image.linear_gradient("L")
        if rng.random() < 0.5:
            ramp = ramp.transpose(Image.Transpose.ROTATE_90)
        image.paste(other, (0, 0), ramp.resize(size))
    if rng.random() < 0.25 * freedom:
        noise = Image.frombytes("L", (64, 64), rng.randbytes(4096)).resize(size)
        image = Image.blend(image, noise.convert("RGB"), rng.uniform(0.02, 0.09))
    return image, base


def draw_card(
    card: Card, size: tuple[int, int], rng: random.Random, *, without: str = "", freedom: float = 1.0
) -> Drawing:
    """A card of `size` pixels, 3:4 to 3:2; `without` "shape" or "code" makes a counterexample that lacks it.

    With less `freedom` (0 to 1), cards look more alike: a curriculum for the first steps of training.
    """

    def between(low: float, high: float) -> float:
        return (low + high) / 2 + freedom * (rng.random() - 0.5) * (high - low)

    def at_times(share: float) -> bool:
        return rng.random() < share * freedom

    width, height = size
    colour = _near(rng, COLOURS[card.colour], 14)
    image, base = _background(rng, size, colour, freedom)
    if at_times(0.25):
        line = max(1, round(height * rng.uniform(0.01, 0.025)))
        ImageDraw.Draw(image).rectangle(
            (line, line, width - 1 - line, height - 1 - line), width=line, outline=_near(rng, (128, 128, 128), 60)
        )
    dark = sum(base) < 330
    ink = _near(rng, (235, 235, 235), 20) if dark else _near(rng, (25, 25, 30), 25)
    wide = between(0.82, 0.93) * min(width, 1.5 * height)
    mask = _code_mask(
        card.code,
        wide,
        rng.uniform(1.0, 1.1) if at_times(0.35) else 1.0,
        rng.random() < 0.5,
        between(-3, 3) if at_times(0.5) else 0.0,
    )
    slack = width - mask.width
    left = round(slack * between(0.25, 0.75))
    top = max(0, round(height * (1 - between(0.04, 0.13))) - mask.height)
    code_box = (left, top, left + mask.width, top + mask.height)
    if without != "code":
        image.paste(ink, (left, top), mask)
    room = top - round(0.03 * height)  # above the code
    side = max(8, round(min(between(0.8, 0.97) * room, between(0.5, 0.64) * height, 0.8 * width)))
    x = round((width - side) * between(0.25, 0.75))
    y = round((room - side) * between(0.3, 0.9))
    if without != "shape":
        mask = _shape_mask(card.shape, side, between(-9, 9) if at_times(0.5) else 0.0)
        if at_times(0.35):  # an outline
            edge = _near(rng, (20, 20, 20) if not dark else (240, 240, 240), 15)
            image.paste(edge, (x, y), mask.filter(ImageFilter.MaxFilter(3)))
        image.paste(colour, (x, y), mask)
    inset = 0.04 * side
    shape_box = (x + inset, y + inset, x + side - inset, y + side - inset)
    return Drawing(image, [] if without else [(card, shape_box, code_box)])


def draw_sheet(cards: list[Card], columns: int, cell: tuple[int, int], rng: random.Random) -> Drawing:
    """Cards in a grid of `columns` columns, each `cell` pixels in size."""
    rows = -(-len(cards) // columns)
    sheet = Drawing(Image.new("RGB", (columns * cell[0], rows * cell[1])))
    for i, card in enumerate(cards):
        x, y = i % columns * cell[0], i // columns * cell[1]
        one = draw_card(card, cell, rng)
        sheet.image.paste(one.image, (x, y))
        sheet.cards += [(card, _moved(shape, x, y), _moved(code, x, y)) for card, shape, code in one.cards]
    return sheet


def _moved(box: Box, x: int, y: int) -> Box:
    return box[0] + x, box[1] + y, box[2] + x, box[3] + y


def soften(image: Image.Image, rng: random.Random) -> Image.Image:
    """The image as files and cameras change it: mostly not at all, else with some blur or JPEG artefacts."""
    draw = rng.random()
    if draw < 0.12:
        return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
    if draw < 0.24:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=rng.randint(60, 95))
        return Image.open(file).convert("RGB")
    return image


def random_size(rng: random.Random, least: int, most: int) -> tuple[int, int]:
    """A random size, 3:4 to 3:2, with a shorter side from `least` to `most`; smaller ones are likelier."""
    short = round(math.exp(rng.uniform(math.log(least), math.log(most))))
    return (
        (round(short * rng.uniform(1, 1.5)), short)
        if rng.random() < 0.65
        else (short, round(short * rng.uniform(1, 4 / 3)))
    )
