"""The same work in `transformers`: sdpa attention, chunked prefill, greedy decoding."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Llama4ForCausalLM

from l4ctx.bench.jobs import TimedRun, WorkerJob


class _Clock:
    """A streamer that notes the time at which each token is chosen."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens: list[int] = []

    def put(self, tokens: Tensor) -> None:
        if tokens.numel() == 1:  # the prompt is put first, in one piece
            self.times.append(time.perf_counter())
            self.tokens.append(int(tokens))

    def end(self) -> None:
        pass


def loaded(job: WorkerJob, ids: list[int]) -> Callable[[int, int], TimedRun]:
    """Loads the checkpoint. The function returned takes the numbers of tokens to read from `ids` and to decode."""
    assert job.folder is not None and len(ids) > 1
    load: Any = Llama4ForCausalLM.from_pretrained
    model, found = load(
        job.folder, dtype=getattr(torch, job.dtype), attn_implementation="sdpa", output_loading_info=True
    )
    assert not found["missing_keys"], f"transformers does not find {sorted(found['missing_keys'])[:3]}"
    model = model.eval().to(job.device)
    prompt = torch.tensor([ids], device=job.device)

    @torch.inference_mode()
    def run(tokens: int, decode_tokens: int) -> TimedRun:
        clock, began = _Clock(), time.perf_counter()
        out = model.generate(
            prompt[:, :tokens],
            max_new_tokens=1 + decode_tokens,
            do_sample=False,
            eos_token_id=-1,
            prefill_chunk_size=job.batch_size,
            streamer=clock,
            return_dict_in_generate=True,
        )
        assert len(clock.times) == 1 + decode_tokens, (len(clock.times), decode_tokens)
        return TimedRun(
            clock.times[0] - began,
            clock.times[-1] - clock.times[0],
            clock.tokens[0],
            sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers),
        )

    return run
