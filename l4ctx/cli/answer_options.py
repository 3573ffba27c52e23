"""The options for how answers are generated, which `ask` and `chat` share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from l4ctx.cli.options import context_folder, token_count

if TYPE_CHECKING:
    from l4ctx.run.request import AnswerOptions

Context = Annotated[
    Path | None,
    typer.Option(
        parser=context_folder,
        metavar="CONTEXT",
        help="Answer from what l4ctx prefill has read, or has read so far. With paths that begin "
        "as CONTEXT does, answer from these and read only what is new.",
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        parser=token_count(1),
        metavar="N",
        help="Maximum length of an answer in tokens (default: 1024).",
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(min=0.0, metavar="T", help="0, the default, always takes the most likely token.", show_default=False),
]
TopP = Annotated[
    float | None,
    typer.Option(
        min=0.0, max=1.0, metavar="P", help="Sample from the most likely tokens up to this total probability."
    ),
]
TopK = Annotated[int | None, typer.Option(min=0, metavar="K", help="Sample from this many of the most likely tokens.")]
Seed = Annotated[
    int | None, typer.Option(min=0, max=2**63 - 1, metavar="N", help="Sampling seed, for reproducible answers.")
]
Sample = Annotated[bool, typer.Option("--sample", help="Sample as the checkpoint's authors recommend.")]
DraftTokens = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=64,
        metavar="N",
        help="Copy up to N tokens at a time from the documents and verify them together; 0: never. The answer is "
        "the same (default: 7).",
        show_default=False,
    ),
]
LoopGuard = Annotated[
    bool, typer.Option("--loop-guard/--no-loop-guard", help="Stop an answer that keeps repeating itself.")
]
ResponseFormat = Annotated[
    str | None,
    typer.Option(
        metavar="json|FILE",
        help="Keep answers to a JSON object, or to the JSON schema in FILE (needs l4ctx[json]).",
        show_default=False,
    ),
]
Cite = Annotated[
    bool,
    typer.Option(
        "--cite",
        help="Name the sources of an answer: what it quotes is looked up in the documents, and it is told where the "
        "model looked. The question is preceded by a request for quotations.",
    ),
]


@dataclass(frozen=True)
class SamplingFlags:
    """How tokens are chosen. A command takes them as one parameter, decorated with `l4ctx.cli.sources.spread`."""

    max_new_tokens: MaxNewTokens = None
    temperature: Temperature = None
    top_p: TopP = None
    top_k: TopK = None
    seed: Seed = None
    sample: Sample = False
    draft_tokens: DraftTokens = None

    def options(self, *, loop_guard: bool, cites: bool, schema: str | None = None) -> AnswerOptions:
        from l4ctx.run.request import AnswerOptions

        return AnswerOptions(
            max_new_tokens=self.max_new_tokens,
            sample=self.sample,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            loop_guard=loop_guard,
            draft_tokens=self.draft_tokens,
            cites=cites,
            schema=schema,
        )
