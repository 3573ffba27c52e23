"""Small drawings of boxes, lines and words, written as SVG or PNG. What is drawn is left to the callers.

Both forms are made from the same shapes. The SVG uses the viewer's own fonts and loads nothing.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple
from xml.sax.saxutils import escape, quoteattr

from l4ctx.errors import OutputError, UsageError
from l4ctx.formatting import printable
from l4ctx.machine.files import replace_file

FORMATS = (".png", ".svg")
SCALE = 2
"""Pixels of a PNG for each unit, so that it is sharp on screens of high resolution."""

INK, PALE, RULE = "#1f2328", "#59636e", "#d1d9e0"
"""Colours of text, of lesser text, and of lines that only guide the eye."""

Anchor = Literal["start", "middle", "end"]
_PILLOW_ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}


class Box(NamedTuple):
    x: float
    y: float
    width: float
    height: float
    colour: str
    title: str = ""  # shown in an SVG under the pointer


class Area(NamedTuple):
    """A filled polygon."""

    points: Sequence[tuple[float, float]]
    colour: str


class Line(NamedTuple):
    points: Sequence[tuple[float, float]]
    colour: str
    width: float = 1.0


class Words(NamedTuple):
    """`y` is the baseline."""

    x: float
    y: float
    text: str
    size: float = 12.0
    colour: str = INK
    anchor: Anchor = "start"


Shape = Box | Area | Line | Words


@dataclass
class Picture:
    """Shapes on white, the later ones on top. Lengths in units of a CSS pixel, y downwards."""

    width: float
    height: float
    title: str
    shapes: list[Shape] = field(default_factory=list)

    def svg(self) -> str:
        size = f'width="{_number(self.width)}" height="{_number(self.height)}"'
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {_number(self.width)} '
            f'{_number(self.height)}" font-family="Helvetica, Arial, sans-serif" role="img">',
            f"<title>{escape(self.title)}</title>",
            '<rect width="100%" height="100%" fill="#ffffff"/>',
            *map(_as_svg, self.shapes),
            "</svg>\n",
        ]
        return "\n".join(lines)

    def png(self) -> bytes:
        from PIL import Image, ImageDraw, ImageFont

        image = Image.new("RGB", (round(SCALE * self.width), round(SCALE * self.height)), "#ffffff")
        draw = ImageDraw.Draw(image)
        for shape in self.shapes:
            if isinstance(shape, Box):
                corner = (SCALE * (shape.x + shape.width) - 1, SCALE * (shape.y + shape.height) - 1)
                draw.rectangle(((SCALE * shape.x, SCALE * shape.y), corner), fill=shape.colour)
            elif isinstance(shape, Area):
                draw.polygon([(SCALE * x, SCALE * y) for x, y in shape.points], fill=shape.colour)
            elif isinstance(shape, Line):
                points = [(SCALE * x, SCALE * y) for x, y in shape.points]
                draw.line(points, fill=shape.colour, width=max(1, round(SCALE * shape.width)), joint="curve")
            else:
                font = ImageFont.load_default(SCALE * shape.size)
                anchor = _PILLOW_ANCHORS[shape.anchor]
                draw.text((SCALE * shape.x, SCALE * shape.y), shape.text, shape.colour, font, anchor=anchor)
        written = io.BytesIO()
        image.save(written, "PNG", optimize=True)
        return written.getvalue()


def check_picture(file: Path) -> None:
    """Raises UsageError for a file that no picture can be written to, before any work is done for it."""
    name = printable(str(file))
    if file.suffix.lower() not in FORMATS:
        raise UsageError(f"{name}: a picture is a PNG or an SVG: name a file that ends with .png or .svg")
    if not file.parent.is_dir():
        raise UsageError(f"{name}: there is no folder {printable(str(file.parent))}; make it, or name another one")
    if file.is_dir():
        raise UsageError(f"{name}: that is a folder; name a file")


def save(picture: Picture, file: Path) -> None:
    """Writes it in the form that the file's name says, all of it or nothing. Raises OutputError."""
    content = picture.png() if file.suffix.lower() == ".png" else picture.svg().encode()
    try:
        descriptor = replace_file(file, content, os.O_WRONLY)
        os.fchmod(descriptor, 0o666 & ~_umask())
        os.close(descriptor)
    except OSError as error:
        raise OutputError(f"{printable(str(file))}: the picture cannot be written: {error.strerror}") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def mixed(share: float, stops: Sequence[str]) -> str:
    """The colour at `share`, from 0 to 1, of a scale with these colours at equal distances."""
    at = min(max(share, 0.0), 1.0) * (len(stops) - 1)
    number = min(int(at), len(stops) - 2)
    first, second = (_parts(colour) for colour in stops[number : number + 2])
    return "#" + "".join(f"{round(a + (b - a) * (at - number)):02x}" for a, b in zip(first, second, strict=True))


def readable_on(colour: str) -> str:
    """Ink or white, whichever stands out on it (relative luminance as WCAG 2 has it, without gamma)."""
    red, green, blue = _parts(colour)
    return INK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 140 else "#ffffff"


def _parts(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _as_svg(shape: Shape) -> str:
    if isinstance(shape, Box):
        x, y, width, height = map(_number, shape[:4])
        title = f"<title>{escape(shape.title)}</title>" if shape.title else ""
        return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{shape.colour}">{title}</rect>'
    if isinstance(shape, Words):
        x, y, size = map(_number, (shape.x, shape.y, shape.size))
        anchor = "" if shape.anchor == "start" else f" text-anchor={quoteattr(shape.anchor)}"
        return f'<text x="{x}" y="{y}" font-size="{size}" fill="{shape.colour}"{anchor}>{escape(shape.text)}</text>'
    points = " ".join(f"{_number(x)},{_number(y)}" for x, y in shape.points)
    if isinstance(shape, Area):
        return f'<polygon points="{points}" fill="{shape.colour}"/>'
    return (
        f'<polyline points="{points}" fill="none" stroke="{shape.colour}" stroke-width="{_number(shape.width)}" '
        'stroke-linejoin="round"/>'
    )


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
