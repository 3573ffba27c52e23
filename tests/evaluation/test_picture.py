"""Pictures: what is drawn is in both forms, and a file is written whole or not at all."""

from __future__ import annotations

import stat
import xml.etree.ElementTree
from pathlib import Path

import pytest
from PIL import Image

from l4ctx.errors import OutputError, UsageError
from l4ctx.evaluation.picture import Area, Box, Line, Picture, Words, check_picture, mixed, readable_on, save

PICTURE = Picture(
    40,
    30,
    "a & b",
    [
        Box(2, 3, 10, 7, "#ff0000", "1 < 2"),
        Area([(20, 3), (30, 3), (30, 13), (20, 13)], "#00ff00"),
        Line([(2, 20), (38, 20)], "#0000ff", 4),
        Words(20, 29, "<x>", 8, anchor="middle"),
    ],
)
SVG = "{http://www.w3.org/2000/svg}"


def test_both_forms_show_all_shapes(tmp_path: Path) -> None:
    save(PICTURE, tmp_path / "a.svg")
    save(PICTURE, tmp_path / "a.PNG")
    tree = xml.etree.ElementTree.parse(tmp_path / "a.svg").getroot()
    assert [element.tag.removeprefix(SVG) for element in tree] == [
        "title",
        "rect",
        "rect",
        "polygon",
        "polyline",
        "text",
    ]
    assert tree[0].text == "a & b" and tree[2][0].text == "1 < 2" and tree[5].text == "<x>"
    with Image.open(tmp_path / "a.PNG") as png:
        assert png.size == (80, 60)
        pixels = {place: png.getpixel(place) for place in ((10, 10), (50, 16), (40, 40), (76, 4))}
    assert list(pixels.values()) == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    assert stat.S_IMODE((tmp_path / "a.svg").stat().st_mode) & stat.S_IRUSR
    assert {file.name for file in tmp_path.iterdir()} == {"a.svg", "a.PNG"}


def test_colours_are_mixed_and_readable() -> None:
    assert mixed(0, ("#000000", "#ffffff")) == "#000000" and mixed(1, ("#000000", "#ffffff")) == "#ffffff"
    assert mixed(0.75, ("#000000", "#000000", "#00ff00")) == "#008000"
    assert readable_on("#2166ac") == "#ffffff" and readable_on("#fddbc7") != "#ffffff"


def test_files_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    (tmp_path / "folder.svg").mkdir()
    for name in ("a.gif", "a", "none/a.svg", "folder.svg"):
        with pytest.raises(UsageError):
            check_picture(tmp_path / name)
    check_picture(tmp_path / "a.svg")
    with pytest.raises(OutputError, match="cannot be written"):
        save(PICTURE, tmp_path / "none" / "a.svg")
