"""Benchmarks what naming sources costs: the processor time of the same answers with and without looking where the model
looks.

    python -m samples.benchmarks.benchmark_citations CONTEXT questions.jsonl --batch 1 32

One process opens the context and answers the first questions, with and without in turn. All of them ask for quotations,
as `--cite` does, so that both compute the same forwards; what differs is the observing and the finding of places. The
time is user and system time of the whole process, so that other work on the machine hardly counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

from l4ctx.contexts.manifest import saved_checkpoint
from l4ctx.run.answering import answers
from l4ctx.run.inputs import make_inputs, read_request
from l4ctx.run.monitor import Monitor
from l4ctx.run.questions import QuestionsOptions, read_questions
from l4ctx.run.request import AnswerOptions, ContextOptions, Request
from l4ctx.run.session import Session, load
from l4ctx.run.sizing import size
from samples.benchmarks.benchmark_questions import with_batch


def opened(context: Path, questions: QuestionsOptions, monitor: Monitor) -> Session:
    model = saved_checkpoint(context)
    assert model is not None
    answer = AnswerOptions(max_new_tokens=32, draft_tokens=0, cites=True)
    request = Request(model, context=ContextOptions(answer_from=context), questions=questions, answer=answer)
    session = load(size(make_inputs(*read_request(request, monitor), monitor), monitor), monitor)
    list(session.prefill())
    return session


def citing(session: Session, *, cites: bool) -> Session:
    """The same session, with or without sources of its answers; what is asked stays."""
    inputs = session.sized.inputs
    request = replace(inputs.request, answer=replace(inputs.request.answer, cites=cites))
    return replace(session, sized=replace(session.sized, inputs=replace(inputs, request=request)))


def taken(session: Session) -> tuple[float, int, list[str]]:
    """Seconds of processor time, tokens, and the answers in their order."""
    began, found, tokens = time.process_time(), dict[int, str](), 0
    for progress in answers(session):
        found |= {ready.number: ready.content["answer"] for ready in progress.ready}
        tokens = progress.tokens
    return time.process_time() - began, tokens, [found[number] for number in sorted(found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("context", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="questions at a time")
    parser.add_argument("--number", type=int, default=32, help="of questions")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with args.questions.open("rb") as file:
        asked = read_questions(file, str(args.questions))[: args.number]
    options = QuestionsOptions(str(args.questions), asked, min(max(args.batch), len(asked)))
    with Monitor(lambda text: None) as monitor:
        session = opened(args.context, options, monitor)
        for rows in args.batch:
            here = with_batch(session, min(rows, len(asked)), len(asked))
            both = [citing(here, cites=cites) for cites in (False, True)]
            for one in both:
                taken(one)  # what is made once is made now
            rounds = list[tuple[float, float]]()
            for number in range(args.rounds):
                order = both if number % 2 == 0 else both[::-1]
                times = {one.request.answer.cites: taken(one) for one in order}
                assert times[False][2] == times[True][2]
                rounds.append((times[False][0], times[True][0]))
            ratios = [with_ / without for without, with_ in rounds]
            result = {
                "tokens_back": session.sized.inputs.prompt_tokens,
                "questions_at_a_time": rows,
                "tokens": times[True][1],
                "seconds_without": round(statistics.median(without for without, _ in rounds), 3),
                "seconds_with": round(statistics.median(with_ for _, with_ in rounds), 3),
                "ratio": round(statistics.median(ratios), 3),
                "range": [round(min(ratios), 3), round(max(ratios), 3)],
            }
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
