"""Where a long text may be cut, so that its pieces encode to the same token ids as the whole.

Knows Llama 4's pre-tokenizer only; a text for another one is encoded at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from model.gguf.tokenizer import LLAMA4_PATTERN

PIECE_CHARACTERS = 4096  # a piece ends at the first safe cut after this many characters
LONGEST_PIECE = 1 << 17  # if there is no safe cut within this many characters, a piece is cut by force

_LLAMA4_PATTERNS = frozenset({LLAMA4_PATTERN, LLAMA4_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")})
"""The pattern of Llama 4's pre-tokenizer, with groups of up to three digits or with single digits."""

# Where these patterns always split, with neither side's split depending on the other (no alternative of the pattern
# matches across such a place; its one look-ahead, after white space, sees the same on either side): after a line end,
# unless white space or "/" follows; before a space that follows a visible character; before ASCII punctuation, except
# "'", that follows an ASCII letter or digit.
_SAFE_CUT = re.compile(r"(?<=[\r\n])[^\s/]|(?<=\S) |(?<=[A-Za-z0-9])[!-&(-/:-@\[-`{-~]")


def splits_as_llama4(pre_tokenizer: dict[str, Any]) -> bool:
    """Whether the pre-tokenizer is Llama 4's: a Split by its pattern, isolated, followed by ByteLevel."""
    parts = pre_tokenizer.get("pretokenizers", [])
    if pre_tokenizer.get("type") != "Sequence" or [part.get("type") for part in parts] != [
        "Split",
        "ByteLevel",
    ]:
        return False
    split, byte_level = parts
    return (
        split["pattern"].get("Regex") in _LLAMA4_PATTERNS
        and (split["behavior"], split["invert"]) == ("Isolated", False)
        and (byte_level["add_prefix_space"], byte_level["use_regex"]) == (False, False)
    )


def piece_ends(text: str, forced: list[int], is_clear: Callable[[str, int], bool] | None = None) -> Iterator[int]:
    """Yields the end of each piece of `text`, the last being its length; appends forced cuts to `forced`.

    `is_clear` can reject all other cuts.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        limit = start + LONGEST_PIECE
        found = _SAFE_CUT.search(text, start + PIECE_CHARACTERS, limit)
        while found is not None and is_clear is not None and not is_clear(text, found.start()):
            found = _SAFE_CUT.search(text, found.start() + 1, limit)
        if found is not None:
            start = found.start()
        elif len(text) <= limit:
            break
        else:
            start = limit - (text[limit - 1 : limit + 1] == "\r\n")
            forced.append(start)
        yield start
    yield len(text)
