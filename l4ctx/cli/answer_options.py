"""The options for how answers are generated, which `ask` and `chat` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from l4ctx.cli.options import context_folder, token_count

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
