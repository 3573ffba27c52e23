"""Reads a long document into a saved context, with a share of its keys and values in memory, then asks about it.

    python -m samples.evaluation.evaluate_context --tokens 10000000 --share 8 --facts 20

Runs `l4ctx prefill` as a separate process, and one question with `l4ctx ask --context` as another, to measure the time
to the first token. Then asks about every planted fact in this process, each in its own fork. Compares the keys and
values held, and the peak of anonymous memory, with the plan.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cache.hybrid import HybridKVCache
from cache.layout import StoreLayout
from l4ctx.checkpoint.chat_template import ChatTemplate
from l4ctx.checkpoint.generation_config import GenerationConfig
from l4ctx.checkpoint.tokenizer import Tokenizer
from l4ctx.contexts.reader import ContextReader
from l4ctx.formatting import human_bytes
from l4ctx.prompt.builder import build_prompt
from model.config import TextConfig
from model.weights.loading import load_checkpoint
from samples.evaluation.evaluate_tiny import answer_to, make_document
from samples.tasks.lookup import draw_entities, question, random_code

ROOM = 256


def command(*arguments: str) -> tuple[dict[str, Any], float]:
    began = time.perf_counter()
    done = subprocess.run(["l4ctx", *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"l4ctx {arguments[0]} exited with code {done.returncode}")
    return json.loads(done.stdout), time.perf_counter() - began


def forget_cached(folder: Path) -> None:
    """Drops the files from the page cache, so that the next reads come from the disk."""
    os.sync()
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reading_rate(folder: Path) -> float:
    """Bytes per second of plain positioned reads of all blocks into one buffer."""
    buffer, total, began = bytearray(2**24), 0, time.perf_counter()
    for file in sorted((folder / "blocks").iterdir()):
        with file.open("rb", buffering=0) as stream:
            offset = 0
            while count := os.preadv(stream.fileno(), [buffer], offset):
                offset += count
            total += offset
    return total / (time.perf_counter() - began)


def ask_once(folder: Path, model: Path, entity: str, budget: list[str]) -> str:
    """Asks one question with the command, and describes where its time goes."""
    result, seconds = command(
        "ask",
        question(entity),
        "--context",
        str(folder),
        "--model",
        str(model),
        "--quiet",
        "--max-new-tokens",
        "1",
        *budget,
    )
    timings = result["timings"]
    read = result["memory"]["nope_disk"]
    first = timings["prefill"]["seconds"] + timings["decode"]["seconds"]
    return (
        f"{seconds:.2f} s for one token: start-up {seconds - first:.2f} s, then {first:.2f} s for "
        f"{human_bytes(read)} of keys and values"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "tiny")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--share", type=int, default=8, help="host memory: 1/SHARE of the keys and values")
    parser.add_argument("--facts", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--text", type=Path, nargs="+", default=[Path(torch.__file__).parent])
    parser.add_argument("--keep", type=Path, help="folder to keep document and context in (default: temporary)")
    args = parser.parse_args()
    tokenizer, template = Tokenizer.from_folder(args.model), ChatTemplate.from_folder(args.model)
    rng = random.Random(args.seed)
    codes = {entity: random_code(rng) for entity in draw_entities(rng, args.facts, evaluation=True)}
    with tempfile.TemporaryDirectory() as scratch:
        place = args.keep or Path(scratch)
        document, folder = place / "text.txt", place / "context"
        place.mkdir(exist_ok=True)
        if not document.exists():
            document.write_text(make_document(tokenizer, codes, args.tokens - ROOM // 2, args.text, rng))
        config = TextConfig.from_folder(args.model)
        layout = StoreLayout.of(config, length=args.tokens, dtype="float32", kv_dtype=args.kv_dtype)
        budget = layout.sealed_rows(args.tokens) * layout.row_bytes // args.share
        result, seconds = command(
            "prefill",
            str(document),
            "-o",
            str(folder),
            "--model",
            str(args.model),
            "--kv-host-memory",
            f"{budget}B",
            "--kv-dtype",
            args.kv_dtype,
            "--dtype",
            "float32",
        )
        report(result, seconds, budget)
        entity = next(iter(codes))
        small = ["--kv-host-memory", f"{budget}B"]
        for what, options in (("all in memory", []), (f"{human_bytes(budget)} in memory", small)):
            print(
                f"a question, files cached, {what}: {ask_once(folder, args.model, entity, options)}; "
                f"plain reads: {human_bytes(reading_rate(folder))}/s",
                flush=True,
            )
        forget_cached(folder)
        rate = reading_rate(folder)
        forget_cached(folder)
        print(
            f"a question, files not cached: {ask_once(folder, args.model, entity, small)}; "
            f"plain reads: {human_bytes(rate)}/s",
            flush=True,
        )
        ask_all(folder, args.model, codes, tokenizer, template)


def report(result: dict[str, Any], seconds: float, budget: int) -> None:
    memory, timing = result["memory"], result["timings"]["prefill"]
    plan, peak = memory["predicted"], memory["process_peak"]
    planned = memory["process_before"]["anonymous"] + plan["needed"]
    kept = {name: memory[name] for name in ("rope_windows", "nope_host", "nope_disk", "buffers")}
    same = all(kept[name] == plan[name] for name in kept)
    print(
        f"read {result['prompt_tokens']:,} tokens in {seconds:.0f} s ({timing['tokens_per_second']:,.0f} tokens/s "
        f"while reading); budget {human_bytes(budget)}; held {', '.join(f'{n} {v:,}' for n, v in kept.items())}: "
        f"{'equal to the plan, to the byte' if same else f'NOT as planned: {plan}'}; anonymous peak "
        f"{human_bytes(peak['anonymous'])}, planned {human_bytes(planned)} ({peak['anonymous'] / planned - 1:+.1%}); "
        f"file-backed peak {human_bytes(peak['file_backed'])}",
        flush=True,
    )


def ask_all(
    folder: Path, path: Path, codes: dict[str, str], tokenizer: Tokenizer, template: ChatTemplate | None
) -> None:
    model = load_checkpoint(path, dtype=torch.float32)
    stop_tokens = GenerationConfig.from_folder(path).stop_tokens
    reader = ContextReader(folder)
    recipe, state = reader.context.recipe, reader.state
    layout = StoreLayout.of(model.config, length=state.tokens + ROOM, dtype="float32", kv_dtype=recipe.kv_dtype)
    cache = HybridKVCache(model.config, length=state.tokens + ROOM, dtype=model.dtype, layout=layout)
    reader.context.restore(state, cache, state.tokens)
    began, right = time.perf_counter(), 0
    for entity, code in codes.items():
        prompt = build_prompt(tokenizer, template, [], question(entity))
        answer = answer_to(model, cache.fork(), tokenizer, prompt.ids[prompt.documents_stop :], stop_tokens)
        is_right = re.findall(r"\d+", answer) == [code]
        right += is_right
        if not is_right:
            print(f"wrong: {entity} {code}: {answer!r}", flush=True)
    seconds = (time.perf_counter() - began) / len(codes)
    print(f"{right} of {len(codes)} facts right, {seconds:.1f} s per question", flush=True)
    reader.close()


if __name__ == "__main__":
    main()
