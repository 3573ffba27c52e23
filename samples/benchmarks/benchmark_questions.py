"""Benchmarks many questions about a saved context: the time by how many are answered at a time.

    python -m samples.benchmarks.benchmark_questions CONTEXT questions.txt --batch 1 4 16 50

One process opens the context and answers in batches of each size in turn, whole batches of the first questions only.
The time of a batch is compared with that of one question. With --kv-host-memory 1MiB keys and values come from files in
every step; with --cold these are dropped from the page cache before each step, so that they come from the disk.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from l4ctx.contexts.manifest import saved_checkpoint
from l4ctx.formatting import parse_size
from l4ctx.run.answering import answers
from l4ctx.run.inputs import make_inputs, read_request
from l4ctx.run.monitor import Monitor
from l4ctx.run.questions import QuestionsOptions, read_questions
from l4ctx.run.request import ComputeOptions, ContextOptions, KVOptions, Request
from l4ctx.run.session import Session, load
from l4ctx.run.sizing import size
from samples.evaluation.evaluate_context import forget_cached


def opened(context: Path, questions: QuestionsOptions, memory: int | None, dtype: str, monitor: Monitor) -> Session:
    model = saved_checkpoint(context)
    assert model is not None
    request = Request(
        model,
        context=ContextOptions(answer_from=context),
        compute=ComputeOptions(dtype=dtype),  # type: ignore[arg-type]
        kv=KVOptions(host_memory=memory),
        questions=questions,
    )
    session = load(size(make_inputs(*read_request(request, monitor), monitor), monitor), monitor)
    list(session.prefill())
    return session


def with_batch(session: Session, rows: int, questions: int) -> Session:
    """The same session for the first questions, with so many answers at a time."""
    sized = session.sized
    asking, workload = sized.inputs.asking, sized.plan.workload
    assert asking is not None and workload.rows is not None
    options = replace(asking.options, questions=asking.options.questions[:questions])
    plan = replace(sized.plan, workload=replace(workload, rows=replace(workload.rows, count=rows)))
    inputs = replace(sized.inputs, asking=replace(asking, options=options))
    return replace(session, sized=replace(sized, plan=plan, inputs=inputs))


def timed(session: Session) -> tuple[float, int, list[dict[str, Any]]]:
    """Seconds, tokens of all answers, and the answers."""
    began, found, tokens = time.perf_counter(), [], 0
    for progress in answers(session):
        found += [ready.content for ready in progress.ready]
        tokens = progress.tokens
    return time.perf_counter() - began, tokens, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("context", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 50])
    parser.add_argument("--batches", type=int, default=2, help="of each size, as far as there are questions")
    parser.add_argument("--kv-host-memory", type=parse_size)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--cold", action="store_true")
    args = parser.parse_args()
    with args.questions.open("rb") as file:
        asked = read_questions(file, str(args.questions))
    options = QuestionsOptions(str(args.questions), asked, max(args.batch))
    known: dict[Any, str] = {}
    with Monitor(lambda text: None) as monitor:
        session = opened(args.context, options, args.kv_host_memory, args.dtype, monitor)
        timed(with_batch(session, 1, 1))  # what memory holds is read once
        if args.cold:
            forward = session.model.forward_ragged

            def cold(*given: Any) -> Any:
                forget_cached(args.context)
                return forward(*given)

            session.model.forward_ragged = cold  # type: ignore[method-assign]
        one = 0.0
        for rows in args.batch:
            number = max(rows, min(len(asked), args.batches * rows) // rows * rows)
            seconds, tokens, found = timed(with_batch(session, rows, number))
            a_batch = seconds / -(-number // rows)
            one = one or a_batch / rows
            differing = sum(known.setdefault(entry["id"], entry["answer"]) != entry["answer"] for entry in found)
            result = {
                "rows": rows,
                "questions": number,
                "seconds_a_batch": round(a_batch, 2),
                "times_one_question": round(a_batch / one, 2),
                "answers_a_minute": round(60 * number / seconds, 1),
                "tokens_per_second": round(tokens / seconds, 1),
                "differing": differing,
            }
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
