"""The task that `samples/tiny` is trained for: facts hidden in text, and questions about them.

Sentences and entities only. Training and evaluation scripts both draw from here, so that they share one task.
"""

from __future__ import annotations

import random
import zlib

from l4ctx.evaluation.words import ADJECTIVES, NOUNS

CODE_DIGITS = 5

QUESTIONS = (
    "What is the access code for the {entity}?",
    "What is the access code for the {entity}?",
    "What is the access code for the {entity}?",
    "Which access code does the {entity} have?",
    "Tell me the access code for the {entity}.",
    "Find the access code for the {entity} in these documents.",
)


def fact(entity: str, code: str) -> str:
    return f"The access code for the {entity} is {code}."


def question(entity: str, rng: random.Random | None = None) -> str:
    """The question about an entity: the first phrasing, or a random one with `rng`."""
    return (rng.choice(QUESTIONS) if rng else QUESTIONS[0]).format(entity=entity)


def random_code(rng: random.Random) -> str:
    return "".join(rng.choice("0123456789") for _ in range(CODE_DIGITS))


def held_out(entity: str) -> bool:
    """Whether this pair of words is held out of training for evaluation (one pair in ten)."""
    return zlib.crc32(entity.encode()) % 10 == 0


def draw_entities(
    rng: random.Random, count: int, *, words: int = 2, confusable: bool = False, evaluation: bool = False
) -> list[str]:
    """`count` different entities of one or two words.

    Confusable ones come from a small pool of words, so that each shares its adjective with some others and its noun
    with some others. `evaluation` draws only pairs that training never shows.
    """
    if words == 1:
        return rng.sample(NOUNS, count)
    side = max(2, round((3 * count) ** 0.5)) if confusable else None
    adjectives = rng.sample(ADJECTIVES, side) if side else ADJECTIVES
    nouns = rng.sample(NOUNS, side) if side else NOUNS
    entities: dict[str, None] = {}
    for attempt in range(100 * count):
        entity = f"{rng.choice(adjectives)} {rng.choice(nouns)}"
        if held_out(entity) == evaluation:
            entities[entity] = None
        if len(entities) == count:
            return list(entities)
        if attempt == 50 * count:  # nearly all pairs of this pool are on the other side of the split
            adjectives, nouns = ADJECTIVES, NOUNS
    raise AssertionError(f"cannot draw {count} entities")


def distractor(rng: random.Random) -> str:
    """A sentence that resembles a fact but states none."""
    noun, other = rng.choice(NOUNS), rng.choice(NOUNS)
    number = rng.randrange(10, 10 ** rng.randrange(2, 8))
    return rng.choice(
        (
            f"The {noun} was last seen near the {other} in {number}.",
            f"Part {number} of the {rng.choice(ADJECTIVES)} {noun} is missing.",
            f"The old {noun} has no access code.",
            f"Ask for the {rng.choice(ADJECTIVES)} {noun} at desk {number}.",
            f"Version {number} is for the {noun}.",
            f"The serial number of the {rng.choice(ADJECTIVES)} {noun} is {number}.",
            f"{noun}_{other} = {number}",
        )
    )
