"""Measures how well a look-up model finds facts in long text that it was not trained on.

    python -m samples.evaluation.evaluate_tiny --tokens 8192 65536 262144 1048576

For each length and seed, builds a document from text (default: the sources of the installed torch, which the training
leaves out). Facts about word pairs that training never showed are planted at line ends, at depths from 0 to 100 %. The
document is read once, then each fact is asked for in a fork of the cache. Facts that an attention-chunk boundary cuts
apart are counted separately: no RoPE layer sees both halves.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from cache.hybrid import HybridKVCache
from l4ctx.checkpoint.chat_template import ChatTemplate
from l4ctx.checkpoint.generation_config import GenerationConfig
from l4ctx.checkpoint.tokenizer import Tokenizer
from l4ctx.documents.document import Document
from l4ctx.engine.generate import generate
from l4ctx.engine.prefill import DEFAULT_PREFILL_CHUNK_SIZE, prefill
from l4ctx.engine.row import Row
from l4ctx.prompt.builder import build_prompt
from model.config import BACKEND_NAMES
from model.quantization.choice import Quantization
from model.transformer import Transformer
from model.weights.loading import load_checkpoint
from samples.tasks.lookup import draw_entities, fact, question, random_code

ROOM_FOR_ANSWER = 128  # tokens for a question and its answer, after the document


@dataclass
class Result:
    seed: int
    prompt_tokens: int = 0
    right: int = 0
    asked: int = 0
    right_of_cut: int = 0
    cut: int = 0
    questions_cut: bool = False  # whether a chunk boundary falls between question and answer
    prefill_seconds: float = 0.0
    question_seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


def text_pieces(folders: list[Path], rng: random.Random) -> Iterator[str]:
    """An endless stream of source files' text, in random order."""
    files = sorted(
        f
        for folder in folders
        for f in ([folder] if folder.is_file() else folder.rglob("*"))
        if f.suffix in {".py", ".h", ".md", ".txt"} and f.is_file()
    )
    if not files:
        raise SystemExit(f"evaluate_tiny: no text in {', '.join(map(str, folders))}; name folders with --text")
    while True:
        rng.shuffle(files)
        for file in files:
            yield file.read_text(encoding="utf-8", errors="replace")


def make_document(
    tokenizer: Tokenizer, codes: dict[str, str], tokens: int, folders: list[Path], rng: random.Random
) -> str:
    """About `tokens` tokens of text with one line per fact, at evenly spaced depths from 0 to 100 %."""
    facts = [fact(entity, code) + "\n" for entity, code in codes.items()]
    room = tokens - len(tokenizer.encode_data("".join(facts)).ids)
    lines: list[str] = []
    for text in text_pieces(folders, rng):
        size = len(tokenizer.encode_data(text).ids)
        lines += text[: int(len(text) * min(1.0, room / max(1, size)))].splitlines(keepends=True)
        lines[-1:] = [line.rstrip("\n") + "\n" for line in lines[-1:]]
        room -= size
        if room <= 0:
            break
    for i, text in reversed(list(enumerate(facts))):
        lines.insert(round(i / max(1, len(facts) - 1) * len(lines)), text)
    return "".join(lines)


def find(ids: array[int], part: array[int]) -> int:
    """The position of the only occurrence of `part` in `ids`."""
    haystack, needle = ids.tobytes(), part.tobytes()
    at = haystack.find(needle)
    while at >= 0 and at % ids.itemsize:
        at = haystack.find(needle, at + 1)
    assert at >= 0, "a planted fact is not in the prompt"
    return at // ids.itemsize


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    stop_tokens: frozenset[int],
    tokens: int,
    seed: int,
    args: argparse.Namespace,
) -> Result:
    rng = random.Random(seed)
    codes = {entity: random_code(rng) for entity in draw_entities(rng, args.facts, evaluation=True)}
    text = make_document(tokenizer, codes, tokens - ROOM_FOR_ANSWER // 2, args.text, rng)

    def prompt_ids(document: str, entity: str) -> tuple[array[int], int]:
        """The prompt's ids, and the position at which its question begins."""
        prompt = build_prompt(tokenizer, template, [Document("text.txt", "", document)], question(entity))
        return prompt.ids, prompt.spans[0].stop

    ids, end = prompt_ids(text, next(iter(codes)))
    result = Result(seed, prompt_tokens=len(ids))
    cache = HybridKVCache(model.config, length=end + ROOM_FOR_ANSWER, dtype=model.dtype)
    for progress in prefill(model, cache, ids[:end], prefill_chunk_size=args.prefill_chunk_size):
        result.prefill_seconds = progress.seconds
    chunk = model.config.attention_chunk_size
    began = time.perf_counter()
    for entity, code in codes.items():
        short, start = prompt_ids("", entity)
        answer = answer_to(model, cache.fork(), tokenizer, short[start:], stop_tokens)
        is_right = re.findall(r"\d+", answer) == [code]
        spelled = tokenizer.encode_data(fact(entity, code)[:-1]).ids
        first = find(ids, spelled)
        is_cut = first // chunk != (first + len(spelled) - 1) // chunk
        result.questions_cut |= end // chunk != (end + len(short) - start + len(spelled)) // chunk
        result.asked, result.cut = result.asked + (not is_cut), result.cut + is_cut
        result.right, result.right_of_cut = (
            result.right + (is_right and not is_cut),
            result.right_of_cut + (is_right and is_cut),
        )
        if not is_right:
            result.wrong.append(f"{entity} {code} at token {first}{' (cut)' if is_cut else ''}: {answer!r}")
    result.question_seconds = (time.perf_counter() - began) / len(codes)
    return result


def answer_to(
    model: Transformer, cache: HybridKVCache, tokenizer: Tokenizer, ids: array[int], stop_tokens: frozenset[int]
) -> str:
    for _ in prefill(model, cache, ids[:-1]):
        pass
    return tokenizer.decode(generate(model, Row(cache, ids[-1], max_new_tokens=32, stop_tokens=stop_tokens)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "tiny")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 65536])
    parser.add_argument("--facts", type=int, default=67, help="facts planted per seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--text", type=Path, nargs="+", default=[Path(torch.__file__).parent])
    parser.add_argument("--prefill-chunk-size", type=int, default=DEFAULT_PREFILL_CHUNK_SIZE)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--attention", default="sdpa", choices=BACKEND_NAMES)
    parser.add_argument("--quantize", type=Quantization.parse, metavar="KIND", help="as l4ctx ask has it, such as int8")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line instead of text")
    args = parser.parse_args()
    model = load_checkpoint(args.model, dtype=args.dtype, attention=args.attention, quantization=args.quantize)
    tokenizer, template = Tokenizer.from_folder(args.model), ChatTemplate.from_folder(args.model)
    stop_tokens = GenerationConfig.from_folder(args.model).stop_tokens
    for tokens in args.tokens:
        results = [evaluate(model, tokenizer, template, stop_tokens, tokens, seed, args) for seed in args.seeds]
        if args.json:
            print(json.dumps({"tokens": tokens, "seeds": [asdict(result) for result in results]}), flush=True)
            continue
        right, asked = sum(r.right for r in results), sum(r.asked for r in results)
        speed = sum(r.prompt_tokens for r in results) / sum(r.prefill_seconds for r in results)
        print(
            f"{tokens:>9,} tokens (prompts {', '.join(f'{r.prompt_tokens:,}' for r in results)}): "
            f"{right} of {asked} right; of facts cut by a chunk boundary {sum(r.right_of_cut for r in results)} of "
            f"{sum(r.cut for r in results)}; prefill {speed:,.0f} tokens/s, "
            f"{1000 * sum(r.question_seconds for r in results) / len(results):.0f} ms per question",
            flush=True,
        )
        for result in results:
            if result.questions_cut:
                print(
                    f"          seed {result.seed}: a chunk boundary separates questions from answers", file=sys.stderr
                )
            for line in result.wrong:
                print(f"          seed {result.seed}: {line}", file=sys.stderr)


if __name__ == "__main__":
    main()
