"""What a question is preceded by where its answer is to be cited."""

from __future__ import annotations

INSTRUCTION = "Quote the documents word for word, in quotation marks."


def instructed(question: str) -> str:
    """The question as the model gets it: the instruction comes first, so that the question is nearest to the answer."""
    return f"{INSTRUCTION} {question}"
