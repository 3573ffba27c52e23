"""Perplexity of documents: one prefill whose logits are compared with the text itself, by position.

The documents are scored as text, one behind another, without a chat template, a question or tags. Prints nothing.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from l4ctx.evaluation.positions import ByPosition, Sums
from l4ctx.run.inputs import Inputs, Sources, check_checkpoint
from l4ctx.run.monitor import Monitor, Timing
from l4ctx.spans import Span

if TYPE_CHECKING:
    from torch import Tensor

    from l4ctx.checkpoint.tokenizer import Tokenizer
    from l4ctx.engine.prefill import PrefillProgress
    from l4ctx.prompt.builder import Prompt
    from l4ctx.run.context import ContextChoices
    from l4ctx.run.session import Session
    from model.transformer import Transformer

LOGIT_BYTES = 16 * 2**20
"""Of the logits that exist at a time, in float32: those of a whole prefill chunk of Scout would be 6 GiB."""

BETWEEN = "\n\n"
"""Between two documents."""


@dataclass(frozen=True)
class Scoring:
    """What is scored: `inputs`, whose prompt is the text alone."""

    inputs: Inputs
    text_bytes: int  # UTF-8, of the tokens that are predicted


@dataclass
class Score:
    """Sums over the tokens that have been read so far."""

    total: Sums = field(default_factory=Sums)
    by_position: ByPosition = field(default_factory=ByPosition)
    by_document: list[Sums] = field(default_factory=list)

    def add(self, first: int, losses: list[float], spans: Sequence[Span]) -> None:
        """Losses of the tokens at positions `first` and those behind it; `spans` are the documents'."""
        self.total.add(losses)
        self.by_position.add(first, losses)
        while len(self.by_document) < len(spans):
            self.by_document.append(Sums())
        for number, span in enumerate(spans):
            here = losses[max(0, span.start - first) : max(0, span.stop - first)]
            if here:
                self.by_document[number].add(here)


def prepare(choices: ContextChoices, sources: Sources, limit: int | None, monitor: Monitor) -> Scoring:
    """Checks the checkpoint, then tokenizes at most `limit` tokens. Raises what `make_inputs` raises."""
    from l4ctx.checkpoint.tokenizer import Tokenizer
    from l4ctx.errors import RequestError
    from l4ctx.prompt.builder import check_length

    request, config = choices.request, sources.config
    with monitor.loading():
        monitor.tell("checking the checkpoint")
        checked = check_checkpoint(choices, config, monitor.note)
        tokenizer = Tokenizer.from_folder(request.model, config.vocab_size)
    monitor.tell("tokenizing")
    skipped, stop = sources.documents.skipped, limit or config.max_position_embeddings
    prompt, text_bytes = text_ids(tokenizer, sources)
    read = len(prompt.ids)
    if limit is not None and limit < read:
        text_bytes -= sum(len(tokenizer.token_bytes(token)) for token in prompt.ids[stop:])
        del prompt.ids[stop:]
        prompt.documents_stop = stop
        prompt.spans = [replace(span, stop=min(span.stop, stop)) for span in prompt.spans if span.start < stop]
        monitor.note(f"the first {stop:,} of {read:,} tokens are scored, as --tokens says")
    if tokenizer.bos_id is None:  # then nothing predicts the first token
        text_bytes -= sum(len(tokenizer.token_bytes(token)) for token in prompt.ids[:1])
    tokens = len(prompt.ids)
    if tokens < 2:
        raise RequestError(f"the documents have {tokens} tokens: at least 2 are needed, as each is predicted")
    check_length(prompt, 0, config.max_position_embeddings, tokens)
    inputs = Inputs(
        request, checked.config, choices, checked, None, tokenizer, prompt, None, skipped, tokens, max_new_tokens=0
    )
    return Scoring(inputs, text_bytes)


def text_ids(tokenizer: Tokenizer, sources: Sources) -> tuple[Prompt, int]:
    """The text of all documents, with BETWEEN between two, behind the token that texts begin with, if there is one.

    Returns it with its number of bytes in UTF-8. Raises TokenizerError.
    """
    from l4ctx.prompt.builder import Prompt

    prompt, text_bytes = Prompt(), 0
    prompt.ids = array("i", [] if tokenizer.bos_id is None else [tokenizer.bos_id])
    for document in sources.documents.take():
        start, prefix = len(prompt.ids), BETWEEN if prompt.spans else ""
        tokenizer.encode_data(document.text, prefix=prefix, into=prompt.ids, user=document.source)
        prompt.spans.append(Span(document.source, start, len(prompt.ids), document.sha256))
        text_bytes += len((prefix + document.text).encode("utf-8", "replace"))
    prompt.documents_stop = len(prompt.ids)
    return prompt, text_bytes


def read(session: Session, score: Score) -> Iterator[PrefillProgress]:
    """Reads the text once, and adds each step's losses to `score`. Raises GenerationError."""
    from l4ctx.engine.prefill import prefill

    prompt, model, timings = session.sized.inputs.prompt, session.model, session.monitor.timings

    def observe(positions: range, states: Tensor) -> None:
        targets = prompt.ids[positions.start + 1 : positions.stop + 1]
        if targets:
            score.add(positions.start + 1, losses_of(model, states[0, : len(targets)], targets), prompt.spans)

    for step in prefill(
        model,
        session.cache,
        memoryview(prompt.ids),
        prefill_chunk_size=session.sized.plan.prefill_chunk_size,
        observe=observe,
    ):
        timings["prefill"] = Timing(step.seconds, step.done)
        yield step


def losses_of(model: Transformer, states: Tensor, targets: Sequence[int]) -> list[float]:
    """Negative log-likelihoods in nats of the `targets` that follow the states (T, C), a slice of logits at a time.

    Raises GenerationError.
    """
    import torch
    import torch.nn.functional as F

    from l4ctx.engine.choose import GenerationError

    rows = max(1, LOGIT_BYTES // (4 * model.config.vocab_size))
    wanted, found = torch.tensor(targets, device=states.device), []
    with torch.inference_mode():
        for start in range(0, len(targets), rows):
            here = slice(start, start + rows)
            logits = model.logits_of(states[here]).float()
            found.append(F.cross_entropy(logits, wanted[here], reduction="none").double().cpu())
    losses: list[float] = torch.cat(found).tolist()
    if not all(map(math.isfinite, losses)):
        raise GenerationError("the model's logits are not finite numbers; try --dtype float32, or check the weights")
    return losses


def report(session: Session, scoring: Scoring, score: Score) -> dict[str, Any]:
    """The object that --json prints; `nats` are of all tokens together."""
    inputs, total = scoring.inputs, score.total
    by_document = zip(inputs.prompt.spans, score.by_document, strict=True)
    return {
        "tokens": inputs.prompt_tokens,
        "predicted_tokens": total.tokens,
        "bytes": scoring.text_bytes,
        "nats": total.nats,
        "nats_per_token": total.mean,
        "perplexity": total.perplexity,
        "bits_per_byte": bits_per_byte(scoring, score),
        "by_position": score.by_position.as_list(),
        "documents": [{"path": span.source, "tokens": sums.tokens, "nats": sums.nats} for span, sums in by_document],
        "skipped": [{"path": entry.source, "reason": entry.reason} for entry in inputs.skipped],
        "timings": {name: timing.as_dict() for name, timing in session.monitor.timings.items() if name != "decode"},
    }


def bits_per_byte(scoring: Scoring, score: Score) -> float | None:
    """None where the tokens that are predicted stand for no bytes."""
    return score.total.nats / math.log(2) / scoring.text_bytes if scoring.text_bytes else None
