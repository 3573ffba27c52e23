"""Measures whether the anonymous memory of `l4ctx ask` grows with the number of images in a prompt.

    python -m samples.benchmarks.measure_images --images 3 15 60

Draws photograph-like images (default: 3,000 x 2,000 pixels) and asks a question about each number of them with
`l4ctx ask --json`. Compares peak memory with the bytes of keys, values and ids that the images' tokens add.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from l4ctx.planning.workload import TOKEN_ID_BYTES
from samples.tasks.lookup import fact, question

ENTITY, CODE = "amber falcon", "48213"
MIB = 2**20


def draw(size: tuple[int, int], rng: random.Random) -> Image.Image:
    """Soft blobs of colour, which compress about as poorly as a photograph."""
    return Image.frombytes("RGB", (40, 30), rng.randbytes(3600)).resize(size, Image.Resampling.BICUBIC)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "tiny")
    parser.add_argument("--images", type=int, nargs="+", default=[3, 15, 60])
    parser.add_argument("--size", type=int, nargs=2, default=[3000, 2000], metavar=("WIDTH", "HEIGHT"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rng, first = random.Random(0), None
        (Path(scratch) / "text.md").write_text(f"{fact(ENTITY, CODE)}\n", encoding="utf-8")
        paths = [Path(scratch) / "text.md"]
        for count in sorted(args.images):
            while len(paths) <= count:
                paths.append(Path(scratch) / f"{len(paths):03d}.jpg")
                draw(tuple(args.size), rng).save(paths[-1], quality=90)
            command = [
                "l4ctx",
                "ask",
                question(ENTITY),
                *map(str, paths),
                "--model",
                str(args.model),
                "--json",
                "--quiet",
            ]
            told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            memory = told["memory"]
            peak = memory["process_peak"]["anonymous"]
            owned = memory["rope_windows"] + memory["nope_host"] + TOKEN_ID_BYTES * told["prompt_tokens"]
            first = first or (peak, owned)
            wrong = "" if CODE in told["answer"] else " (wrong)"
            print(
                f"{count:>4} images, {told['prompt_tokens']:>7,} tokens: peak {peak / MIB:,.1f} MiB anonymous "
                f"({(peak - first[0]) / MIB:+.1f}); keys, values and ids {owned / MIB:,.1f} MiB "
                f"({(owned - first[1]) / MIB:+.1f}); planned {memory['predicted']['needed'] / MIB:,.0f} MiB; "
                f"read in {told['timings']['prefill']['seconds']:.1f} s{wrong}",
                flush=True,
            )


if __name__ == "__main__":
    main()
