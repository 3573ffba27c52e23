"""Recall of planted facts by length and depth: one prefill for each text, and a fork of its cache for each question.

What is asked, texts and results. Loading and computing are those of many questions about documents, in `l4ctx.run`.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from l4ctx.documents.document import Document, DocumentSet, Skipped
from l4ctx.errors import RequestError
from l4ctx.evaluation.haystack import Haystack, HaystackError, made_up_lines, own_lines
from l4ctx.evaluation.tasks import Needle, needles
from l4ctx.formatting import counted
from l4ctx.planning.workload import Rows
from l4ctx.prompt.builder import Prompt, PromptLengthError, after_question, build_prompt, encode_question
from l4ctx.run.asking import Asking
from l4ctx.run.context import ContextChoices
from l4ctx.run.inputs import Checked, Inputs, check_checkpoint
from l4ctx.run.monitor import Monitor
from l4ctx.run.questions import Question, QuestionsOptions
from l4ctx.run.request import Request
from model.config import TextConfig

if TYPE_CHECKING:
    from l4ctx.checkpoint.chat_template import ChatTemplate
    from l4ctx.checkpoint.tokenizer import Tokenizer

NAME = "text.txt"
"""Of the document that a text is given as."""

MOST_PLANTED = 0.5
"""Of a text's tokens those that planted sentences may have."""

LONGER_NAMES = 1.05
"""How many more tokens the facts of another length may have: their names are others."""

SPARE_TOKENS = 8
"""Left free: joined lines may have a few more tokens than they have one by one."""


@dataclass(frozen=True)
class NeedleOptions:
    lengths: tuple[int, ...]  # tokens, in growing order
    tasks: tuple[str, ...]
    depths: int
    trials: int
    max_new_tokens: int
    seed: int = 0
    batch: int | None = None  # questions at a time; None: as many as fit


@dataclass(frozen=True)
class Case:
    """A question about a text, and what is right."""

    id: str
    length: int
    trial: int
    needle: Needle


@dataclass(frozen=True)
class Result:
    """What became of a case. `cut` says whether a chunk boundary goes through one of its sentences."""

    id: str
    task: str
    length: int
    depth: int
    trial: int
    right: bool
    cut: bool
    question: str
    answer: str
    expected: list[list[str]]
    generated_tokens: int

    @classmethod
    def of(cls, case: Case, content: dict[str, Any], *, cut: bool) -> Result:
        """`content` is an answer of `l4ctx.run.answering`."""
        needle = case.needle
        return cls(
            case.id,
            needle.task,
            case.length,
            needle.depth,
            case.trial,
            needle.is_found(content["answer"]),
            cut,
            needle.question,
            content["answer"],
            [list(one) for one in needle.expected],
            content["generated_tokens"],
        )

    @classmethod
    def held(cls, case: Case, content: dict[str, Any]) -> Result:
        """One that a file of earlier results has."""
        tokens = content.get("generated_tokens")
        found = cls.of(case, {"answer": content["answer"], "generated_tokens": 0}, cut=bool(content.get("cut")))
        return replace(found, generated_tokens=tokens if isinstance(tokens, int) else 0)


@dataclass(frozen=True)
class Text:
    """Cases to be asked about one text. `length` includes the longest question with its answer."""

    length: int
    trial: int
    cases: Sequence[Case]


@dataclass(frozen=True)
class Prepared:
    """A checkpoint that is fit, and everything that texts are made from."""

    request: Request
    options: NeedleOptions
    config: TextConfig
    choices: ContextChoices
    checked: Checked
    tokenizer: Tokenizer
    template: ChatTemplate | None
    own: Sequence[str]  # the user's texts; none: made-up ones
    skipped: Sequence[Skipped]
    suffix: array[int]  # token ids behind a question
    cases: Sequence[Case] = field(default_factory=list)

    def texts(self, answered: frozenset[int | str] | set[str]) -> list[Text]:
        """Those with cases that are not answered yet, the short ones first."""
        grouped: dict[tuple[int, int], list[Case]] = {}
        for case in self.cases:
            if case.id not in answered:
                grouped.setdefault((case.length, case.trial), []).append(case)
        return [Text(length, trial, cases) for (length, trial), cases in sorted(grouped.items())]

    def question_tokens(self, question: str) -> int:
        ids = array("i")
        encode_question(self.tokenizer, question, ids)
        return len(ids) + len(self.suffix)

    @cached_property
    def room(self) -> int:
        """Tokens for the longest question with its answer."""
        questions = {case.needle.question for case in self.cases}
        return max(map(self.question_tokens, questions)) + self.options.max_new_tokens


def prepare(request: Request, options: NeedleOptions, found: DocumentSet, monitor: Monitor) -> Prepared:
    """Checks the checkpoint and the lengths; `found` are the user's documents, if there are any.

    Raises what `make_inputs` raises, and PromptLengthError for a length that the model has no positions for.
    """
    from l4ctx.checkpoint.chat_template import ChatTemplate
    from l4ctx.checkpoint.tokenizer import Tokenizer

    config = TextConfig.from_folder(request.model)
    if (longest := options.lengths[-1]) > config.max_position_embeddings:
        raise PromptLengthError(
            f"--lengths: {longest:,} tokens are more than the model's {config.max_position_embeddings:,} positions "
            "(max_position_embeddings)"
        )
    choices = ContextChoices.of(request)
    with monitor.loading():
        monitor.tell("checking the checkpoint")
        checked = check_checkpoint(choices, config, monitor.note)
        template = ChatTemplate.from_folder(request.model, date=choices.date)
        if template is not None:
            template.prepare()
        tokenizer = Tokenizer.from_folder(request.model, config.vocab_size)
    suffix = after_question(tokenizer, template, has_system_prompt=False)
    skipped, own = list(found.skipped), [document.text for document in found.take()]
    prepared = Prepared(request, options, config, choices, checked, tokenizer, template, own, skipped, suffix)
    return replace(prepared, cases=_cases(prepared, _digest(prepared)))


def _cases(prepared: Prepared, digest: str) -> list[Case]:
    options = prepared.options
    return [
        Case(f"{needle.task}/{length}/{needle.depth}/{trial}/{digest}", length, trial, needle)
        for length in options.lengths
        for trial in range(options.trials)
        for needle in needles(options.tasks, options.depths, _random(options, length, trial))
    ]


def _random(options: NeedleOptions, *place: int) -> random.Random:
    """The same for the same place, whatever else is measured."""
    return random.Random("/".join(map(str, (options.seed, *place))))


def _digest(prepared: Prepared) -> str:
    """Of all that answers depend on besides their length, depth and trial: results of another digest are not these."""
    from l4ctx.checkpoint.fingerprint import fingerprint
    from model.weights.loading import checked_sources, stored_tensors

    request, options = prepared.request, prepared.options
    provenance = fingerprint(
        request.model, prepared.config, stored_tensors(checked_sources(request.model, prepared.config))
    )
    settings = {
        **provenance,
        "computed": [request.compute.dtype, request.compute.quantize, request.compute.attention, request.kv.dtype],
        "asked": [options.tasks, options.depths, options.max_new_tokens, options.seed],
        "text": [hashlib.sha256(text.encode("utf-8", "replace")).hexdigest() for text in prepared.own],
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def questions_of(cases: Sequence[Case]) -> list[Question]:
    return [Question(number, case.id, case.needle.question) for number, case in enumerate(cases, 1)]


def planned_inputs(prepared: Prepared, text: Text) -> Inputs:
    """For a memory plan: as long as `text` will be, with no tokens yet."""
    return _inputs(prepared, text, Prompt(ids=array("i", bytes(4 * (text.length - prepared.room)))))


class Texts:
    """Makes texts. Those of a trial have the same lines, as many as they need."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared

    def check(self, text: Text) -> None:
        """Raises HaystackError for more facts than fit, before anything is loaded."""
        self._room(text)

    def inputs(self, text: Text) -> tuple[Inputs, dict[str, bool]]:
        """A text with its facts and questions, and by the id of a case whether its sentences are cut.

        Raises HaystackError for more facts than fit.
        """
        prepared, options = self._prepared, self._prepared.options
        every, tokens = self._room(text)
        haystack = self._haystack(text)
        while True:
            rng = _random(options, text.length, text.trial, 1)
            prompt = self._prompt(haystack.planted(tokens, every, options.depths, rng))
            over = len(prompt.ids) + prepared.room - text.length
            if over <= 0:
                return _inputs(prepared, text, prompt), self._cuts(prompt, text)
            tokens -= over + SPARE_TOKENS

    def _room(self, text: Text) -> tuple[list[Needle], int]:
        """What is planted in a text, and how many tokens there are for lines beside it. Raises HaystackError."""
        prepared, options = self._prepared, self._prepared.options
        every = list(needles(options.tasks, options.depths, _random(options, text.length, text.trial)))
        beside = prepared.room + len(self._prompt("").ids) + SPARE_TOKENS
        room = text.length - beside
        planted = sum(self._count(f"{sentence}\n") for needle in every for sentence in needle.sentences)
        if planted > MOST_PLANTED * room:
            least = math.ceil((LONGER_NAMES * planted / MOST_PLANTED + beside) / 100) * 100
            raise HaystackError(
                f"--lengths {text.length:,}: {counted(len(every), 'fact')} have {planted:,} tokens, over half of what "
                f"there is room for; take fewer --depths or --tasks, or lengths from about {least:,} tokens on"
            )
        return every, room - planted

    def _prompt(self, text: str) -> Prompt:
        """Up to where a question begins."""
        prepared = self._prepared
        prompt = build_prompt(prepared.tokenizer, prepared.template, [Document(NAME, "", text)], "")
        del prompt.ids[prompt.documents_stop :]
        return prompt

    def _haystack(self, text: Text) -> Haystack:
        rng, own = _random(self._prepared.options, text.trial), self._prepared.own
        return Haystack(own_lines(own, rng) if own else made_up_lines(rng), text.length, self._count)

    def _count(self, text: str) -> int:
        return len(self._prepared.tokenizer.encode_data(text).ids)

    def _cuts(self, prompt: Prompt, text: Text) -> dict[str, bool]:
        """A sentence that occurs several times is looked for once."""
        chunk, content = self._prepared.config.attention_chunk_size, memoryview(prompt.ids).tobytes()

        def is_cut(sentence: str) -> bool:
            ids = self._prepared.tokenizer.encode_data(sentence.removesuffix(".")).ids
            at = content.find(ids.tobytes())
            first = at // ids.itemsize
            return at >= 0 and first // chunk != (first + len(ids) - 1) // chunk

        return {case.id: any(map(is_cut, set(case.needle.sentences))) for case in text.cases}


def _inputs(prepared: Prepared, text: Text, prompt: Prompt) -> Inputs:
    prompt.documents_stop = tokens = len(prompt.ids)
    request, options = prepared.request, prepared.options
    questions = questions_of(text.cases)
    asked = QuestionsOptions("--tasks", questions, options.batch)
    request = replace(request, questions=asked)
    asking = Asking(asked, request.answer, prepared.tokenizer, prepared.suffix, text.length - tokens)
    count = min(options.batch or len(questions), len(questions))
    rows = Rows(count, max(map(prepared.question_tokens, {one.text for one in questions})), prepared.room)
    return Inputs(
        request,
        prepared.config,
        replace(prepared.choices, request=request),
        prepared.checked,
        None,
        prepared.tokenizer,
        prompt,
        None,
        prepared.skipped,
        tokens,
        prepared.room,
        asking,
        rows,
    )


def check_options(options: NeedleOptions) -> None:
    """Raises RequestError."""
    if options.depths * len(options.tasks) > 2000:
        raise RequestError("--depths: more than 2,000 facts in a text; take fewer depths or tasks")
