"""Whether `l4ctx ask --cite` names the document and the line that an answer comes from, and none where there is none.

    python -m samples.evaluation.evaluate_citations --tokens 65536 1048576

Writes a folder of text files with facts planted in them, each on a line of its own, reads it once into a saved context,
and asks about all facts, and about others that stand nowhere, by `l4ctx ask --questions --context --cite`. Another
--seed makes other documents, facts and questions.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from l4ctx.checkpoint.tokenizer import Tokenizer
from samples.evaluation.evaluate_tiny import text_pieces
from samples.tasks.lookup import draw_entities, fact, question, random_code

LINE_CHARACTERS = 4000
"""A line that is longer is left out: it would be a line of data, and one that is cited should be readable."""


class Planted(NamedTuple):
    code: str
    path: str
    line: int  # from 1


def write_documents(
    folder: Path, tokenizer: Tokenizer, codes: dict[str, str], args: argparse.Namespace, tokens: int, rng: random.Random
) -> dict[str, Planted]:
    """Files of equal size in tokens, with a line for each fact at a random place; tells where each one is."""
    found, pieces, facts = dict[str, Planted](), text_pieces(args.text, rng), list(codes.items())
    folder.mkdir()
    for number in range(args.documents):
        name, own = f"notes_{number:02}.txt", facts[number :: args.documents]
        lines = list(_lines(tokenizer, pieces, tokens // args.documents - 32 * len(own)))
        places = sorted(rng.sample(range(len(lines)), len(own)), reverse=True)
        for place, (entity, code) in zip(places, own, strict=True):
            lines.insert(place, fact(entity, code))
        for entity, code in own:
            found[entity] = Planted(code, f"{folder.name}/{name}", lines.index(fact(entity, code)) + 1)
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return found


def _lines(tokenizer: Tokenizer, pieces: Iterator[str], tokens: int) -> Iterator[str]:
    """Lines of text, of about so many tokens together."""
    for text in pieces:
        for line in text.splitlines():
            if len(line) > LINE_CHARACTERS:
                continue
            tokens -= len(tokenizer.encode_data(line + "\n").ids)
            yield line
            if tokens <= 0:
                return


def run(*arguments: str) -> list[dict[str, Any]]:
    """What a command prints as JSON."""
    done = subprocess.run(["l4ctx", *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"l4ctx {arguments[0]} exited with code {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def evaluate(tokens: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rng, tokenizer = random.Random(args.seed), Tokenizer.from_folder(args.model)
    entities = draw_entities(rng, args.facts + args.unsupported, evaluation=True)
    codes = {entity: random_code(rng) for entity in entities[: args.facts]}
    planted = write_documents(folder / "documents", tokenizer, codes, args, tokens, rng)
    questions, context = folder / "questions.jsonl", folder / "context"
    asked = [json.dumps({"id": entity, "question": question(entity)}) for entity in entities]
    questions.write_text("\n".join(asked) + "\n")
    model = ("--model", str(args.model), "--quiet")
    (read,) = run("prefill", str(folder / "documents"), "-o", str(context), *model)
    ask = ("ask", "--questions", str(questions), "--context", str(context), "--max-new-tokens", "32", *model)
    *answers, report = run(*ask, *(("--batch", str(args.batch)) if args.batch else ()), "--cite")
    return {
        "tokens": read["prompt_tokens"],
        "seed": args.seed,
        "read_seconds": round(read["timings"]["prefill"]["seconds"], 1),
        "answer_seconds": round(report["timings"]["decode"]["seconds"], 1),
        **judge(answers, planted),
    }


def judge(answers: list[dict[str, Any]], planted: dict[str, Planted]) -> dict[str, Any]:
    """Counts what was right; `missed` tells the rest."""
    counts = dict.fromkeys(("facts", "answered", "document", "line", "unsupported", "none_named"), 0)
    missed, shares = list[str](), list[float]()
    for answer in answers:
        places, fact_of = answer["citations"]["attended"], planted.get(answer["id"])
        first = places[0] if places else None
        if fact_of is None:
            counts["unsupported"] += 1
            counts["none_named"] += first is None
            shares += [first["share"]] if first else []
            continue
        counts["facts"] += 1
        is_right = re.findall(r"\d+", answer["answer"]) == [fact_of.code]
        is_document = first is not None and first["path"] == fact_of.path
        is_line = first is not None and is_document and first["lines"] == [fact_of.line, fact_of.line]
        counts["answered"] += is_right
        counts["document"] += is_document
        counts["line"] += is_line
        if not is_line or not is_right:
            missed.append(f"{answer['id']} {fact_of}: {answer['answer']!r}, {first}")
    return counts | {"missed": missed, "shares_of_unsupported": sorted(shares)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "tiny")
    parser.add_argument("--tokens", type=int, nargs="+", default=[65536])
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--facts", type=int, default=200)
    parser.add_argument("--unsupported", type=int, default=100, help="questions about what stands nowhere")
    parser.add_argument("--batch", type=int, help="as l4ctx ask has it")
    parser.add_argument("--seed", type=int, default=1, help="the limits of --cite were chosen with 1")
    parser.add_argument("--text", type=Path, nargs="+", default=[Path(torch.__file__).parent])
    parser.add_argument("--keep", type=Path, help="a new folder for documents and contexts (default: a temporary one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each length")
    args = parser.parse_args()
    for tokens in args.tokens:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) if args.keep is None else args.keep / str(tokens)
            folder.mkdir(parents=True, exist_ok=True)
            found = evaluate(tokens, args, folder)
        if args.json:
            print(json.dumps(found), flush=True)
            continue
        print(
            f"{found['tokens']:>9,} tokens, seed {found['seed']}: {found['answered']} of {found['facts']} answered; "
            f"the document first for {found['document']}, the right line for {found['line']}; of "
            f"{found['unsupported']} that stand nowhere {found['none_named']} name none; "
            f"{found['answer_seconds']} s for all answers",
            flush=True,
        )
        for line in found["missed"]:
            print(f"          {line}", file=sys.stderr)


if __name__ == "__main__":
    main()
