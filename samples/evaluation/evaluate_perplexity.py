"""Measures a checkpoint's perplexity on texts, with this program's own model and cache.

    python -m samples.evaluation.debian_corpus corpus.txt
    python -m samples.evaluation.evaluate_perplexity --model smollm2 --text corpus.txt --limit-tokens 200000

The texts are encoded as one, without control tokens, and cut into windows of equal length; a rest that fills none is
left out. Each window is read on its own, from position 0, in prefill chunks of --step tokens, and every token but its
first is predicted. Perplexity is exp(mean negative log-likelihood in nats).

llama.cpp's llama-perplexity scores only the tokens in the second half of each window; "second half" is that figure.

--kv-dtype rounds the keys and values of every layer to that type as soon as they are computed. The program itself
stores only sealed blocks of NoPE layers so, which a model of RoPE layers does not have; this is the harder case.

With --results FILE each window is appended to FILE as a line of JSON. A run finds the windows that earlier runs with
the same settings finished, and goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cache.blocks import Block, empty_block
from cache.hybrid import HybridKVCache
from cache.layout import KV_DTYPES, StoreLayout
from cache.packing import pack, unpack
from l4ctx.checkpoint.tokenizer import Tokenizer
from l4ctx.engine.prefill import as_batch
from model.quantization.choice import Quantization
from model.transformer import Transformer
from model.weights.loading import load_checkpoint


class RoundedKVCache(HybridKVCache):
    """Rounds the keys and values of all layers, RoPE layers included, to the storage type `kv_dtype`."""

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        if self.layout.is_packed:
            tokens, dtype = keys.shape[2], self.layout.dtype
            layout = StoreLayout(self.config, tokens, dtype, self.layout.kv_dtype, self.batch_size, tokens, tokens)
            rounded = unpack(pack(Block(keys, values), layout), layout, empty_block(layout, tokens, keys.device))
            keys, values = rounded.keys, rounded.values
        super().append(layer, keys, values)


@dataclass(frozen=True)
class Window:
    """Negative log-likelihoods in nats of one window, and of the tokens in its second half."""

    nats: float
    tokens: int
    half_nats: float
    half_tokens: int

    @classmethod
    def of(cls, losses: Tensor) -> Window:
        """Of the losses of all tokens but the first, (N - 1,)."""
        half = losses[(len(losses) + 1) // 2 :]
        return cls(float(losses.sum()), len(losses), float(half.sum()), len(half))


def evaluate(model: Transformer, ids: Sequence[int], kv_dtype: str, step: int) -> Window:
    """Reads one window of token ids in steps of `step` tokens, which bounds the memory for logits."""
    cache = RoundedKVCache(model.config, length=len(ids), dtype=model.dtype, device=model.device, kv_dtype=kv_dtype)
    row = as_batch(ids, model.device)
    losses = []
    for start in range(0, len(ids), step):
        logits = model(row[:, start : start + step], cache, logits="all")
        assert logits is not None
        targets = row[0, start + 1 : start + 1 + step]
        losses.append(F.cross_entropy(logits[0, : len(targets)].float(), targets, reduction="none").double())
    return Window.of(torch.cat(losses))


def corpus(paths: Sequence[Path]) -> str:
    """The text of the files, and of all files in the folders, in the order of their paths."""
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file())


def finished(results: Path | None, settings: dict[str, Any]) -> dict[int, Window]:
    """The windows that earlier runs with the same settings appended to the file, by number."""
    if results is None or not results.exists():
        return {}
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    return {line["number"]: Window(**line["result"]) for line in lines if line["settings"] == settings}


def windows(
    model: Transformer, ids: Sequence[int], settings: dict[str, Any], step: int, results: Path | None
) -> Iterator[Window]:
    size, done = settings["window"], finished(results, settings)
    for number in range(len(ids) // size):
        if number not in done:
            done[number] = evaluate(model, ids[number * size : (number + 1) * size], settings["kv_dtype"], step)
            if results is not None:
                line = {"settings": settings, "number": number, "result": vars(done[number])}
                with results.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(line) + "\n")
        yield done[number]


def summary(found: Sequence[Window]) -> dict[str, float]:
    nats = sum(window.nats for window in found) / sum(window.tokens for window in found)
    half = sum(window.half_nats for window in found) / sum(window.half_tokens for window in found)
    return {
        "windows": len(found),
        "tokens": sum(window.tokens for window in found),
        "nats": nats,
        "perplexity": math.exp(nats),
        "second_half_perplexity": math.exp(half),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="files and folders of text")
    parser.add_argument("--window", type=int, default=4096, help="tokens (default: 4096)")
    parser.add_argument("--limit-tokens", type=int, help="of all windows together")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="to compute in")
    parser.add_argument("--quantize", type=Quantization.parse, metavar="KIND", help="as l4ctx ask has it, such as int8")
    parser.add_argument("--kv-dtype", default="auto", choices=["auto", *KV_DTYPES])
    parser.add_argument("--step", type=int, default=512, help="tokens per prefill chunk (default: 512)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    text = corpus(args.text)
    ids = Tokenizer.from_folder(args.model).encode_data(text).ids[: args.limit_tokens]
    if len(ids) < args.window:
        raise SystemExit(f"evaluate_perplexity: {len(ids):,} tokens do not fill a window of {args.window:,}")
    settings = {name: str(getattr(args, name)) for name in ("model", "dtype", "kv_dtype", "quantize")}
    settings |= {"window": args.window, "text": hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()}
    model = load_checkpoint(args.model, dtype=args.dtype, device=args.device, quantization=args.quantize)
    began, found = time.perf_counter(), []
    for window in windows(model, ids, settings, args.step, args.results):
        found.append(window)
        if not args.json:
            print(f"window {len(found)} of {len(ids) // args.window}: {summary(found)['perplexity']:.4f}", flush=True)
    result = {**settings, **summary(found), "seconds": time.perf_counter() - began}
    if args.json:
        print(json.dumps(result))
    else:
        print(
            f"{result['nats']:.5f} nats per token, perplexity {result['perplexity']:.4f} "
            f"(second half {result['second_half_perplexity']:.4f}), {result['tokens']:,} tokens predicted"
        )


if __name__ == "__main__":
    main()
