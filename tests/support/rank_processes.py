"""What each of four processes does in tests of tensor parallelism. Imports neither pytest nor transformers."""

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

from cache.disk import Scratch
from cache.hybrid import HybridKVCache
from cache.layout import StoreLayout
from cache.residency import Residency
from l4ctx.engine.generate import generate
from model.division import TensorRank
from model.parallel import GroupExchange
from model.transformer import Transformer
from model.weights.loading import load_checkpoint

PROCESSES, SECONDS = 4, 120
ANSWER_TOKENS = 12


def prefill_and_decode(model: Transformer, ids: Sequence[int], cuts: Sequence[int]) -> dict[str, Tensor]:
    """Logits (T, V) of ids fed in forwards that end at `cuts`, and the answer's token ids, chosen greedily.

    Blocks of two attention chunks are sealed, and all but the newest are in a file.
    """
    length, chunk = len(ids) + ANSWER_TOKENS, model.config.attention_chunk_size
    layout = StoreLayout(model.config, length, "float32", "float32", 1, 2 * chunk, chunk)
    with tempfile.TemporaryDirectory() as folder, closing(Scratch(Path(folder))) as rows:
        cache = HybridKVCache(
            model.config, length=length, dtype=model.dtype, layout=layout, residency=Residency(host_rows=1), rows=rows
        )
        found = _fed(model, cache, ids, cuts)
        assert cache.held().nope_disk
        return found


def _fed(model: Transformer, cache: HybridKVCache, ids: Sequence[int], cuts: Sequence[int]) -> dict[str, Tensor]:
    found = []
    for cut in cuts:
        logits = model(torch.tensor([ids[cache.offset : cut]]), cache, logits="all")
        assert logits is not None
        found.append(logits[0])
    last = int(found[-1][-1].argmax())
    answer = generate(model, cache, last, max_new_tokens=ANSWER_TOKENS, stop_tokens=frozenset())
    return {"logits": torch.cat(found), "answer": torch.tensor([last, *answer])}


def start(_: int, *arguments: Any) -> None:
    """In a process that has computed nothing yet, so that the four, which are forks of it, import nothing anew."""
    start_processes(compute, arguments, nprocs=PROCESSES, start_method="fork")


def compute(
    number: int, meeting: str, folders: Mapping[str, Path], ids: Sequence[int], cuts: Sequence[int], out: Path
) -> None:
    """Each checkpoint on two ranks, twice beside each other, and on four."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=meeting, rank=number, world_size=PROCESSES, timeout=timedelta(seconds=SECONDS)
    )
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    found = {}
    for name, folder in folders.items():
        for count, group in ((2, pairs[number // 2]), (4, None)):
            exchange = GroupExchange(TensorRank(number % count, count), group)
            model = load_checkpoint(folder, dtype=torch.float32, exchange=exchange)
            results = prefill_and_decode(model, ids, cuts)
            found |= {f"{name}:{count}:{what}": tensor for what, tensor in results.items()}
    save_file(found, out / f"{number}.safetensors")
    dist.destroy_process_group()
