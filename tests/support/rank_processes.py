"""What each of four processes does in tests of `model.parallel`. Imports neither pytest nor transformers."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from cache.context import ContextKVCache
from cache.disk import Scratch
from cache.hybrid import HybridKVCache
from cache.layout import StoreLayout
from cache.residency import Residency
from l4ctx.engine.generate import generate
from l4ctx.engine.row import Row
from model.context_division import ContextRank
from model.context_parallel import ContextTransformer
from model.parallel import mesh_exchanges
from model.transformer import Transformer
from model.weights.loading import load_checkpoint

PROCESSES, SECONDS = 4, 120
MESHES = {
    (2, 1): ("float32", "bfloat16", "int4", "FP8"),
    (4, 1): ("float32", "bfloat16", "int4", "FP8"),
    (1, 2): ("int4",),
    (2, 2): ("bfloat16", "int4", "FP8"),
    (1, 4): ("bfloat16", "FP8"),
}
"""Tensor and context ranks, and the checkpoints that they compute; a mesh of two is there twice."""
ANSWER_TOKENS = 12


def prefill_and_decode(model: Transformer, ids: Sequence[int], cuts: Sequence[int]) -> dict[str, Tensor]:
    """Logits (T, V) of ids fed in forwards that end at `cuts`, and the answer's token ids, chosen greedily.

    Sealed blocks are in a file: all, or where a rank has the whole sequence all but the newest of two attention chunks.
    """
    length, chunk = len(ids) + ANSWER_TOKENS, model.config.attention_chunk_size
    rank = model.exchange.rank if isinstance(model, ContextTransformer) else ContextRank(0, 1)
    own, is_whole = rank.own_length(length, chunk), rank.count == 1
    layout = StoreLayout(model.config, own, "float32", "float32", 1, (1 + is_whole) * chunk, chunk)
    with tempfile.TemporaryDirectory() as folder, closing(Scratch(Path(folder))) as rows:
        residency = Residency(host_rows=int(is_whole))
        cache: HybridKVCache | ContextKVCache = HybridKVCache(
            model.config, length=own, dtype=model.dtype, layout=layout, residency=residency, rows=rows
        )
        if isinstance(model, ContextTransformer):
            cache = ContextKVCache(cache, rank, length)
        found = _fed(model, cache, ids, cuts)
        assert cache.held().nope_disk
        return found


def _fed(
    model: Transformer, cache: HybridKVCache | ContextKVCache, ids: Sequence[int], cuts: Sequence[int]
) -> dict[str, Tensor]:
    found = []
    for cut in cuts:
        logits = model(torch.tensor([ids[cache.offset : cut]]), cache, logits="all")
        assert logits is not None
        found.append(logits[0])
    last = int(found[-1][-1].argmax())
    answer = generate(model, Row(cache, last, max_new_tokens=ANSWER_TOKENS, stop_tokens=frozenset()))
    return {"logits": torch.cat(found), "answer": torch.tensor([last, *answer])}


def start(_: int, *arguments: Any) -> None:
    """In a process that has computed nothing yet, so that the four, which are forks of it, import nothing anew."""
    start_processes(compute, arguments, nprocs=PROCESSES, start_method="fork")


def compute(
    number: int, meeting: str, folders: Mapping[str, Path], ids: Sequence[int], cuts: Sequence[int], out: Path
) -> None:
    """Every mesh's checkpoints."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=meeting, rank=number, world_size=PROCESSES, timeout=timedelta(seconds=SECONDS)
    )
    found = {}
    for (tensor, context), names in MESHES.items():
        exchange, across = mesh_exchanges(tensor, context)
        for name in names:
            model = load_checkpoint(
                folders[name],
                dtype=torch.float32,
                exchange=exchange if tensor > 1 else None,
                context=across if context > 1 else None,
            )
            results = prefill_and_decode(model, ids, cuts)
            found |= {f"{name}:{tensor}x{context}:{what}": x for what, x in results.items()}
    save_file(found, out / f"{number}.safetensors")
    dist.destroy_process_group()
