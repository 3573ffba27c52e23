"""Measures the tokenizer: characters and tokens per second, and peak bytes per token.

    python -m samples.benchmarks.benchmark_tokenizer --tokenizer DIR --characters 1000000 20000000 --cores 1 2

Each length is encoded in a separate process, limited to the given number of cores. Bytes per token count all anonymous
memory that encoding adds, including the ids but not the text: memory freed after loading the tokenizer is released
first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from l4ctx.checkpoint.tokenizer import Tokenizer
from l4ctx.documents.reader import read_documents
from l4ctx.documents.text import decode
from l4ctx.formatting import human_bytes
from l4ctx.machine.memory import PeakSampler, give_back_free_memory, process_memory

SAMPLING_SECONDS = 0.002


def text_of(paths: list[Path] | None, characters: int) -> str:
    """The concatenated documents under `paths`, repeated up to `characters` characters."""
    if paths is None:
        import torch

        paths = [Path(torch.__file__).parent]
    pieces: list[str] = []
    left = characters
    documents = [document.text for document in read_documents([str(path) for path in paths], stdin=None).documents]
    assert any(documents), "no text there"
    while left > 0:
        for document in documents:
            pieces.append(document[:left])
            left -= len(pieces[-1])
    return "".join(pieces)


def run(tokenizer: Tokenizer, text: str) -> dict[str, Any]:
    """Encodes `text` once, measuring time and memory."""
    tokenizer.encode_data("the threads' start\n" * 1000)
    give_back_free_memory()
    before = process_memory()
    assert before is not None, "there is no /proc here to read memory from"
    with PeakSampler(SAMPLING_SECONDS) as sampler:
        began, cpu_began = time.perf_counter(), time.process_time()
        encoded = tokenizer.encode_data(text)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    assert sampler.peak is not None
    return {
        "characters": len(text),
        "tokens": len(encoded.ids),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_above": sampler.peak.anonymous - before.anonymous,
        "forced_cuts": len(encoded.forced_cuts),
    }


def shown(result: dict[str, Any], cores: int) -> str:
    tokens, seconds = result["tokens"], result["seconds"]
    cuts = f"; cut {result['forced_cuts']} times by force" if result["forced_cuts"] else ""
    return (
        f"{result['characters']:>11,} characters, {tokens:>10,} tokens, {cores} core{'s' * (cores > 1)}: "
        f"{result['characters'] / seconds:>10,.0f} characters/s, {tokens / seconds:>9,.0f} tokens/s "
        f"({result['characters'] / result['cpu_seconds']:,.0f} characters per second of CPU time); peak "
        f"{human_bytes(result['peak_above'])} besides the text, {result['peak_above'] / tokens:.1f} bytes per token"
        f"{cuts}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=Path(__file__).parents[1] / "tiny", help="checkpoint folder")
    parser.add_argument("--text", type=Path, nargs="+", help="files and folders; default: the sources of torch")
    parser.add_argument("--characters", type=int, nargs="+", default=[1_000_000, 20_000_000])
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores[0]])
        text = decode(args.text[0].read_bytes())[0]
        print(json.dumps(run(Tokenizer.from_folder(args.tokenizer), text)))
        return
    for characters in args.characters:
        with tempfile.NamedTemporaryFile() as file:
            file.write(text_of(args.text, characters).encode())
            file.flush()
            for cores in args.cores:
                command = [
                    sys.executable,
                    "-m",
                    "samples.benchmarks.benchmark_tokenizer",
                    "--worker",
                    "--tokenizer",
                    str(args.tokenizer),
                    "--text",
                    file.name,
                    "--cores",
                    str(cores),
                ]
                result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                print(json.dumps({"cores": cores, **result}) if args.json else shown(result, cores), flush=True)


if __name__ == "__main__":
    main()
