"""Measures how the anonymous memory of `l4ctx ask` grows with the prompt, and compares it with the closed form.

    python -m samples.benchmarks.measure_memory --tokens 65536 1048576

Writes documents of those lengths (default text: the sources of the installed torch) and asks a question about each
with `l4ctx ask --json`. Compares the slope of the peak with the bytes of keys, values and ids that a token adds.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import tempfile
from pathlib import Path

import torch

from cache.layout import bytes_per_token
from l4ctx.checkpoint.chat_template import ChatTemplate
from l4ctx.checkpoint.tokenizer import Tokenizer
from l4ctx.documents.document import Document
from l4ctx.drafts.index import ORDER_BYTES
from l4ctx.planning.workload import TOKEN_ID_BYTES
from l4ctx.prompt.builder import build_prompt
from model.config import TextConfig
from samples.evaluation.evaluate_tiny import make_document
from samples.tasks.lookup import fact, question

ENTITY, CODE = "amber falcon", "48213"


def fitted(tokenizer: Tokenizer, template: ChatTemplate | None, text: str, tokens: int) -> str:
    """`text` cut or padded so that its prompt has exactly `tokens` tokens.

    Lengths that fill the last prefill chunk equally peak at the same point of the last step.
    """

    def count(document: str) -> int:
        return len(build_prompt(tokenizer, template, [Document("text.txt", "", document)], question(ENTITY)).ids)

    lines = text.splitlines(keepends=True)
    over = count(text) - tokens
    while over > -20:
        over -= max(1, len(tokenizer.encode_data(lines.pop()).ids) - 1)
    text = "".join(lines) + "a"
    text += " a" * (tokens - count(text))
    assert count(text) == tokens
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "tiny")
    parser.add_argument("--tokens", type=int, nargs="+", default=[65536, 1048576])
    parser.add_argument("--text", type=Path, nargs="+", default=[Path(torch.__file__).parent])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    tokenizer, template = Tokenizer.from_folder(args.model), ChatTemplate.from_folder(args.model)
    points = []
    with tempfile.TemporaryDirectory() as scratch:
        for tokens in args.tokens:
            file = Path(scratch) / "text.txt"
            codes = {ENTITY: CODE, "silver heron": "90657"}
            text = make_document(tokenizer, codes, tokens, args.text, random.Random(0))
            file.write_text(fitted(tokenizer, template, text, tokens))
            command = [
                "l4ctx",
                "ask",
                question(ENTITY),
                str(file),
                "--model",
                str(args.model),
                "--json",
                "--dtype",
                args.dtype,
                "--quiet",
            ]
            result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            memory, prefill = result["memory"], result["timings"]["prefill"]
            points.append((result["prompt_tokens"], memory["process_peak"]["anonymous"]))
            print(
                f"{result['prompt_tokens']:>9,} tokens: peak {points[-1][1] / 2**20:,.1f} MiB anonymous, "
                f"{memory['process_peak']['file_backed'] / 2**20:,.1f} MiB file-backed; keys and values "
                f"{(memory['nope_host'] + memory['rope_windows']) / 2**20:,.1f} MiB; prefill "
                f"{prefill['tokens_per_second']:,.0f} tokens/s; {result['answer']!r}"
                f"{'' if result['answer'] == fact(ENTITY, CODE) else ' (wrong)'}",
                flush=True,
            )
    (first, low), (last, high) = points[0], points[-1]
    itemsize = {"float32": 4, "bfloat16": 2}[args.dtype]
    expected = bytes_per_token(TextConfig.from_folder(args.model), itemsize) + TOKEN_ID_BYTES
    expected += ORDER_BYTES  # of the index that drafts are looked up in
    slope = (high - low) / (last - first)
    print(f"slope {slope:.1f} bytes per token; closed form {expected} ({slope / expected - 1:+.1%})")


if __name__ == "__main__":
    main()
