"""A request whose documents are divided over ranks: led through threads, and at the command line."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cache.context import ContextKVCache
from cache.hybrid import HybridKVCache
from cache.layout import StoreLayout
from l4ctx.engine.generate import generate
from l4ctx.engine.prefill import prefill
from l4ctx.engine.row import Row
from l4ctx.errors import UsageError
from l4ctx.machine.memory import ProcessMemory
from l4ctx.machine.ranks import Launch
from l4ctx.planning.fitting import plan_memory
from l4ctx.planning.memory_plan import MemoryPlan
from l4ctx.planning.workload import Workload
from l4ctx.run.channel import END, Channel
from l4ctx.run.follower import Follower
from l4ctx.run.ranks import Job, Leader, check, note_on
from l4ctx.run.request import ComputeOptions, Request
from model.config import TextConfig
from model.context_division import ContextRank, exchanged, meeting_bytes
from model.context_parallel import ContextTransformer
from model.costs import activation_bytes
from model.parallel import GroupContextExchange
from model.transformer import Transformer
from model.weights.loading import load_checkpoint
from support.cli_runner import DOCUMENT, FILLER, QUESTION, TIMEOUT, check_refused, run_here
from support.places import TINY
from support.rank_threads import ThreadContextExchange, ThreadExchange, Together
from support.storages import LiveStorages
from support.torchrun import started
from support.toy_checkpoints import CHUNK, DIVISIBLE, SCOUT, VOCABULARY, Kind, write_kind

MEDIUM: dict[str, Any] = {
    "model_type": "llama4_text",
    "vocab_size": 301,
    "hidden_size": 256,
    "intermediate_size": 384,
    "intermediate_size_mlp": 512,
    "num_hidden_layers": 4,
    "no_rope_layers": [1, 0, 1, 1],
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_local_experts": 4,
    "attention_chunk_size": 128,
    "max_position_embeddings": 16384,
}
IDS = random.Random(5).choices(range(VOCABULARY), k=7 * CHUNK + 2)
ANSWER_TOKENS = 2 * CHUNK


class ThreadChannel(Channel):
    """All threads are context ranks."""

    def __init__(self, exchange: ThreadContextExchange) -> None:
        self.exchange: Any = ThreadExchange(exchange.together, exchange.rank.number)
        self._context = exchange

    def mesh(self, context_ranks: int) -> Any:
        assert context_ranks == self._context.rank.count
        return None, self._context


class HalfRight:
    """Drafts of one token of the answer and a wrong one."""

    def __init__(self, answer: list[int]) -> None:
        self._answer, self._done = answer, 0

    def propose(self, room: int, rows: int) -> list[int]:
        right = self._answer[self._done : self._done + 1]
        return [*right, *((token + 1) % VOCABULARY for token in right)][:room]

    def observe(self, tokens: Any) -> None:
        self._done += len(tokens)


def answer(model: Transformer, cache: Any, drafts: HalfRight | None = None) -> tuple[list[int], Tensor]:
    """Reads in two steps, the second of which begins with embeddings as an image has them; answers greedily."""
    for _ in prefill(model, cache, IDS[: 4 * CHUNK], prefill_chunk_size=4 * CHUNK):
        pass
    model(model.embed(torch.tensor([IDS[4 * CHUNK : -2]])) * 1.5, cache, logits="none")
    found = model(torch.tensor([IDS[-2:-1]]), cache, logits="last")
    assert found is not None
    tokens = generate(model, Row(cache, IDS[-1], max_new_tokens=ANSWER_TOKENS, stop_tokens=frozenset(), drafts=drafts))
    return list(tokens), found


def check_reports(told: list[dict[str, Any]], weights: int, held: int) -> None:
    """Each rank says what it holds; all read the whole checkpoint, as only what is read is divided."""
    assert [each["rank"] for each in told] == list(range(len(told)))
    assert all(each["weights"] == weights for each in told) and told[0]["keys_values"] == held
    assert all(each["checkpoint_read"] == {"share": weights, "replicated": 0} for each in told)
    assert told[0]["process_before"] is None and told[0]["process_peak"] == {"anonymous": 3, "file_backed": 4}
    assert all(each["process_before"]["anonymous"] > 0 and each["process_peak"] is None for each in told[1:])


@pytest.mark.parametrize("count", [2, 4])
def test_a_leader_and_followers_answer_as_one_process(tmp_path: Path, count: int) -> None:
    """With drafts that are taken back."""
    write_kind(tmp_path / "toy", "toy", Kind(DIVISIBLE | SCOUT), 0.2, seed=11)
    length = len(IDS) + ANSWER_TOKENS
    model = load_checkpoint(tmp_path / "toy", dtype=torch.float32)
    expected, logits = answer(model, HybridKVCache(model.config, length=length))
    said = Job(
        str(tmp_path / "toy"),
        "float32",
        "sdpa",
        None,
        length,
        "float32",
        CHUNK,
        CHUNK,
        None,
        None,
        False,
        context_ranks=count,
    )

    def run(exchange: ThreadContextExchange) -> Any:
        channel = ThreadChannel(exchange)
        if exchange.rank.number:
            Follower(channel, Job(**channel.hear_json())).run()
            return None
        channel.tell_json(said.as_dict())
        model = said.load(*channel.mesh(count))
        leader = Leader(model, channel, TextConfig.from_folder(tmp_path / "toy"))
        cache = said.cache(model, None)
        assert isinstance(cache, ContextKVCache)
        found = answer(model, cache, HalfRight(expected))
        reports = leader.reports(said, cache, None, ProcessMemory(3, 4))
        check_reports([each.as_dict() for each in reports], model.weight_bytes, cache.held().total)
        channel.announce(END)
        return found

    found, last = Together(count).run_context(run)[0]
    assert found == expected and len(set(found)) > 3
    assert (last - logits).abs().max() <= 1e-4


def test_processes_divide_documents(tmp_path: Path) -> None:
    """Over three attention chunks, one of the first rank and two of the other; one process answers from what they
    keep."""
    (tmp_path / "a.md").write_text(FILLER * 60 + DOCUMENT + FILLER * 60, encoding="utf-8")
    options, context = ("--model", str(TINY), "--max-new-tokens", "16"), str(tmp_path / "context")
    arguments = ("ask", QUESTION, str(tmp_path / "a.md"), *options)
    alone = run_here(*arguments, "-q")
    divided = (*arguments, "--save-context", context, "--context-ranks", "2")
    with started(*divided, folders=(tmp_path, tmp_path)) as processes:
        (out, error), silent = (process.communicate(timeout=TIMEOUT) for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert out == alone.stdout and "48213" in out
    assert "l4ctx: 2 ranks each with the model; the documents are divided over 2\n" in error
    assert silent == ("", "")
    kept = run_here("ask", QUESTION, "--context", context, *options, "-q")
    assert kept.stdout == out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("steps", "are_queries"), [(1, False), (7, True)])
def test_a_forward_holds_what_is_planned(
    monkeypatch: pytest.MonkeyPatch, steps: int, are_queries: bool, dtype: torch.dtype
) -> None:
    """Where keys and values travel, and where queries do; the exchange's own tensors included."""
    monkeypatch.setattr(dist, "broadcast", lambda x, group_src, group: None)
    monkeypatch.setattr(dist, "all_to_all_single", lambda found, *_, group: found.zero_())
    config, count = TextConfig.from_dict(MEDIUM), 2
    rank, step = ContextRank(0, count), 2 * count * MEDIUM["attention_chunk_size"]
    with torch.device("meta"):
        model = ContextTransformer(config, "sdpa", GroupContextExchange(rank))
    model = model.to(dtype).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    length, size = steps * step, MEDIUM["attention_chunk_size"]
    name = str(dtype).removeprefix("torch.")
    own = rank.own_length(length, size)
    layout = StoreLayout(config, own, name, name, 1, size, size)
    cache = ContextKVCache(HybridKVCache(config, length=own, dtype=dtype, layout=layout), rank, length)
    list(prefill(model, cache, [5] * (length - step), prefill_chunk_size=step))
    before = cache.held().total if steps > 1 else 0  # windows and blocks are made when first used
    with LiveStorages() as live:
        list(prefill(model, cache, [5] * step, prefill_chunk_size=step))
    new = cache.held().total - before
    pieces = list(rank.pieces(range(length - step, length), size))
    assert exchanged(config, count, pieces, dtype.itemsize).are_queries is are_queries
    workload = Workload(config, length, 0, 0, False, name, context_ranks=count, saved_layout=layout)
    plan = plan_memory(replace(workload, prefill_chunk_size=step))
    assert plan.activations / 3 <= live.peak - new <= plan.activations, live.peak / plan.activations


LAUNCH = Launch(0, 4, 4, "127.0.0.1", 1, is_met=False)


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(UsageError, match="--context-ranks 3: 4 ranks cannot be divided by it"):
        check(Request(model=TINY, launch=LAUNCH, compute=ComputeOptions(context_ranks=3)))


def test_one_process_does_not_divide_documents() -> None:
    result = run_here("ask", "Why?", "--no-documents", "--model", str(TINY), "--context-ranks", "2")
    check_refused(result, 2, "--context-ranks: torchrun starts the processes")


def test_the_note_says_what_is_divided() -> None:
    config = TextConfig.from_folder(TINY)
    assert note_on(config, 4, 4) == "4 ranks each with the model; the documents are divided over 4"
    assert (
        note_on(config, 4, 2)
        == "4 ranks in groups of 2, over each of which the model is divided; the documents are divided over 2"
    )


def test_the_plan_is_of_one_rank() -> None:
    """A share of the NoPE blocks, one window, and activations of its own tokens, in steps as long for each rank."""
    config = TextConfig.from_folder(TINY)
    length, size = 64 * config.attention_chunk_size, config.attention_chunk_size

    def planned(ranks: int, tokens: int = length) -> MemoryPlan:
        return plan_memory(Workload(config, tokens - 9, 9, 1000, False, "float32", context_ranks=ranks))

    whole, plan = planned(1), planned(4)
    assert plan.end.nope == whole.end.nope // 4 and plan.end.rope_windows == whole.end.rope_windows
    assert plan.prefill_chunk_size == 4 * whole.prefill_chunk_size
    assert planned(4, 5 * size).layout.length == 2 * size  # the last rank's, with the chunks 3 and 4
    own = ContextRank(0, 4).most_in_a_step(plan.prefill_chunk_size, size)
    assert own == whole.prefill_chunk_size
    meeting = meeting_bytes(config, plan.prefill_chunk_size, 4)  # so much is read that queries travel
    assert plan.activations == activation_bytes(config, own, 4, meeting) > activation_bytes(config, own, 4)
