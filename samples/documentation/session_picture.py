"""Draws the session shown in README.md: real commands in a real terminal, exported as SVG.

    python -m samples.documentation.session_picture

Copies the sample documents and the Python sources of torch.distributed into a temporary folder, reads them into a
saved context, and asks about a text and an image. Prints the session as text, for the README, and writes the picture
next to this file. Takes a few minutes: it reads about 1.8 million tokens.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import io
import os
import pty
import re
import shutil
import struct
import subprocess
import tempfile
import termios
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent.parent
PICTURE = Path(__file__).with_name("session.svg")
COLUMNS = 100
SESSION = (
    ("l4ctx", "prefill", "documents", "distributed", "-o", "CONTEXT", "--model", "tiny"),
    ("l4ctx", "ask", "What is the access code for the amber falcon?", "--context", "CONTEXT"),
    ("l4ctx", "ask", "What is the access code for the green star?", "--context", "CONTEXT"),
)


def prepare(folder: Path) -> None:
    """Copies what the session names: documents, distributed, and the sample model."""
    shutil.copytree(ROOT / "samples" / "documents", folder / "documents")
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise SystemExit("torch is not installed")
    sources = Path(torch.origin).parent / "distributed"
    for source in sorted(sources.rglob("*.py")):
        if source.stat().st_size:
            copy = folder / "distributed" / source.relative_to(sources)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
    (folder / "tiny").symlink_to(ROOT / "samples" / "tiny")


def run_on_terminal(command: tuple[str, ...], folder: Path) -> str:
    """Everything that `command` writes to a terminal of COLUMNS columns, including control sequences."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "L4CTX_LOG": "0"}
    with subprocess.Popen(
        command, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    ) as process:
        os.close(theirs)
        written = io.BytesIO()
        try:
            while piece := os.read(ours, 65536):
                written.write(piece)
        except OSError:  # EIO: the other side is closed
            pass
    os.close(ours)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} exited with code {process.returncode}")
    return written.getvalue().decode()


def last_screen(written: str) -> list[str]:
    """The lines that a terminal shows in the end, with their colours, without anything overwritten or erased.

    Interprets the control sequences of live lines: carriage return, cursor up, erase line, and colours.
    """
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            pass  # a terminal's newline, or a line about to be erased
        elif part.startswith("\x1b["):
            kind, count = part[-1], int(re.sub(r"\D", "", part[2:-1]) or "1")
            if kind == "A":
                row = max(0, row - count)
            elif kind == "K":
                lines[row] = ""
            elif kind == "m":
                lines[row] += part
        else:
            lines[row] += part
    while lines and not Text.from_ansi(lines[-1]).plain.strip():
        lines.pop()
    return lines


def as_typed(command: tuple[str, ...]) -> str:
    return " ".join(f'"{word}"' if " " in word else word for word in command)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PICTURE)
    output: Path = parser.parse_args().output
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), color_system="truecolor", force_terminal=True)
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place))
        for command in SESSION:
            console.print(Text.assemble(("$ ", "bold green"), (as_typed(command), "bold")))
            for line in last_screen(run_on_terminal(command, Path(place))):
                console.print(Text.from_ansi(line))
    text = console.export_text(clear=False)
    picture = console.export_svg(title="l4ctx", unique_id="session")
    # Use the viewer's own fonts, so that the picture loads nothing from the network.
    output.write_text(re.sub(r"\s*@font-face \{.*?\}", "", picture, flags=re.DOTALL), encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
