"""Measures the accuracy of each storage type of keys and values: logits against float32, facts found, bytes per token.

    python -m samples.evaluation.evaluate_kv_dtypes --tokens 65536

Reads a text with planted facts once for each type and asks about every fact. Compares the logits at each token of the
right answer with those of float32 keys and values. Computes everything in float32, so that only storage differs.
"""

from __future__ import annotations

import argparse
import random
import re
from pathlib import Path

import torch

from cache.hybrid import HybridKVCache
from cache.layout import KV_DTYPES
from l4ctx.checkpoint.chat_template import ChatTemplate
from l4ctx.checkpoint.generation_config import GenerationConfig
from l4ctx.checkpoint.tokenizer import Tokenizer
from l4ctx.documents.document import Document
from l4ctx.engine.prefill import as_batch, prefill
from l4ctx.prompt.builder import build_prompt
from model.weights.loading import load_checkpoint
from samples.evaluation.evaluate_tiny import ROOM_FOR_ANSWER, answer_to, make_document
from samples.tasks.lookup import draw_entities, fact, question, random_code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "tiny")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--facts", type=int, default=67)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--text", type=Path, nargs="+", default=[Path(torch.__file__).parent])
    args = parser.parse_args()
    model = load_checkpoint(args.model, dtype=torch.float32)
    tokenizer, template = Tokenizer.from_folder(args.model), ChatTemplate.from_folder(args.model)
    stop_tokens = GenerationConfig.from_folder(args.model).stop_tokens
    rng = random.Random(args.seed)
    codes = {entity: random_code(rng) for entity in draw_entities(rng, args.facts, evaluation=True)}
    text = make_document(tokenizer, codes, args.tokens - ROOM_FOR_ANSWER // 2, args.text, rng)
    read = build_prompt(tokenizer, template, [Document("text.txt", "", text)], "")
    ids = read.ids[: read.documents_stop]
    reference: dict[str, torch.Tensor] = {}
    for kv_dtype in KV_DTYPES:
        cache = HybridKVCache(model.config, length=len(ids) + ROOM_FOR_ANSWER, dtype=model.dtype, kv_dtype=kv_dtype)
        for progress in prefill(model, cache, ids):
            seconds = progress.seconds
        right, errors = 0, []
        for entity, code in codes.items():
            prompt = build_prompt(tokenizer, template, [], question(entity))
            asked = prompt.ids[prompt.documents_stop :]
            answer = tokenizer.encode_data(fact(entity, code)).ids
            logits = model(as_batch(asked + answer, model.device), cache.fork(), logits="all")
            assert logits is not None
            logits = logits[:, -len(answer) - 1 :]
            expected = reference.setdefault(entity, logits)
            errors.append(float((logits - expected).abs().max() / expected.abs().max()))
            right += re.findall(r"\d+", answer_to(model, cache.fork(), tokenizer, asked, stop_tokens)) == [code]
        layout = cache.layout
        size = layout.row_bytes / layout.block_tokens
        print(
            f"{kv_dtype:>8}: {size:7.1f} bytes per token, largest logit error {max(errors):.1e} of the "
            f"largest logit (median {sorted(errors)[len(errors) // 2]:.1e}), {right} of {len(codes)} facts; "
            f"read at {len(ids) / seconds:,.0f} tokens/s",
            flush=True,
        )


if __name__ == "__main__":
    main()
