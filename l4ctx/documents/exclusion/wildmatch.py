"""Matches patterns of `.gitignore` files as git's wildmatch does: all of a file's at once, without backtracking.

Patterns and paths are bytes, as in git.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

_SLASH, _STAR, _BACKSLASH, _OPEN, _CLOSE, _COLON, _DASH = b"/*\\[]:-"
_SPECIAL = re.compile(rb"[*?[\\]")
_ALL = (1 << 256) - 1
_UPPER = sum(1 << byte for byte in range(ord("A"), ord("Z") + 1))
_MOST_TOKENS = 5 << 15  # no path is so long: of five tokens, at least one takes a byte, and no path has 32 KiB
_ANY, _IN_SEGMENT, _FORK = -1, -2, -3  # tokens beside sets of bytes: **, *, and the choice to skip the next two tokens


def _set(characters: Iterable[int]) -> int:
    return sum(1 << byte for byte in set(characters))


_PUNCTUATION = b"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
_DIGITS, _LETTERS = range(48, 58), [*range(65, 91), *range(97, 123)]
_CLASSES = {  # as git's own character table has them: ASCII, vertical tab and form feed no space
    b"alnum": _set([*_DIGITS, *_LETTERS]),
    b"alpha": _set(_LETTERS),
    b"blank": _set(b" \t"),
    b"cntrl": _set([*range(32), 127]),
    b"digit": _set(_DIGITS),
    b"graph": _set(range(33, 127)),
    b"lower": _set(range(97, 123)),
    b"print": _set(range(32, 127)),
    b"punct": _set(_PUNCTUATION),
    b"space": _set(b" \t\n\r"),
    b"upper": _UPPER,
    b"xdigit": _set(b"0123456789abcdefABCDEF"),
}


class PatternSet:
    """Many patterns as one automaton: one step for each byte of a text, whatever the patterns are.

    The states are the bits of an integer: bit n stands before token n of the concatenated patterns, and each pattern
    has one bit more, its end. With `pathname`, stars and classes stay within a component of a path.
    """

    def __init__(self, patterns: Sequence[bytes], *, pathname: bool, ignore_case: bool) -> None:
        self._ignore_case = ignore_case
        self._ends: list[int] = []
        self._owners: list[int] = []
        starts: list[int] = []
        stars: dict[int, list[int]] = {_ANY: [], _IN_SEGMENT: [], _FORK: []}
        toggles: dict[int, list[int]] = {}  # byte -> states that begin, or end, to accept there
        edges: dict[int, list[int]] = {}
        state = 0
        for owner, pattern in enumerate(patterns):
            tokens = _tokens(pattern, pathname, ignore_case)
            if tokens is None:
                continue
            starts.append(state)
            for token in tokens:
                if token < 0:
                    stars[token].append(state)
                else:
                    if token not in edges:
                        edges[token] = list(_edges(token))
                    for byte in edges[token]:
                        toggles.setdefault(byte, []).append(state)
                state += 1
            self._ends.append(state)
            self._owners.append(owner)
            state += 1
        self._any, in_segment, self._forks = (_bits(stars[kind], state) for kind in (_ANY, _IN_SEGMENT, _FORK))
        self._stars = self._any | in_segment
        self._finals = _bits(self._ends, state)
        self._accepting: list[int] = []
        accepting = 0
        for byte in range(256):
            accepting ^= _bits(toggles[byte], state) if byte in toggles else 0
            self._accepting.append(accepting)
        self._start = self._closed(_bits(starts, state))

    def last(self, text: bytes) -> int:
        """The index of the last pattern that matches all of `text`; -1 where none does."""
        states = self._start
        for byte in text.lower() if self._ignore_case else text:
            stay = self._any if byte == _SLASH else self._stars
            states = self._closed((states & self._accepting[byte]) << 1 | states & stay)
            if not states:
                return -1
        finals = states & self._finals
        return self._owners[bisect_left(self._ends, finals.bit_length() - 1)] if finals else -1

    def _closed(self, states: int) -> int:
        """`states` and what is reached from them without a byte. A fork is followed by **, /; a star by no star."""
        if forks := states & self._forks:
            states |= forks << 1 | forks << 3
        return states | (states & self._stars) << 1


def _bits(positions: Iterable[int], size: int) -> int:
    field = bytearray(size // 8 + 1)
    for position in positions:
        field[position >> 3] ^= 1 << (position & 7)
    return int.from_bytes(field, "little")


def _edges(accepted: int) -> Iterator[int]:
    """The bytes at which a set of bytes begins and ends."""
    changes = (accepted ^ accepted << 1) & _ALL
    while changes:
        yield (changes & -changes).bit_length() - 1
        changes &= changes - 1


def _tokens(pattern: bytes, pathname: bool, ignore_case: bool) -> list[int] | None:
    """Sets of bytes (as bits), stars and forks; None for a pattern that matches nothing."""
    tokens: list[int] = []
    at, end = 0, len(pattern)
    any_byte = _ALL ^ (1 << _SLASH if pathname else 0)
    while at < end:
        if len(tokens) > _MOST_TOKENS:
            return None
        byte = pattern[at]
        if byte == _STAR:
            at = _add_star(tokens, pattern, at, pathname)
            continue
        if byte == _BACKSLASH:
            at += 1
            if at == end:
                return None
            tokens.append(1 << pattern[at])  # an escaped capital stays one, so that it matches nothing without case
        elif byte == _OPEN:
            accepted, at = _class(pattern, at, ignore_case)
            if at == end:
                return None
            tokens.append(accepted & any_byte)
        elif byte == ord("?"):
            tokens.append(any_byte)
        else:
            tokens.append(1 << (pattern[at : at + 1].lower()[0] if ignore_case else byte))
        at += 1
    return tokens


def _add_star(tokens: list[int], pattern: bytes, first: int, pathname: bool) -> int:
    """Append the tokens of the stars that begin at `first`, with the slash of **/; return where the pattern goes on."""
    after = first
    while after < len(pattern) and pattern[after] == _STAR:
        after += 1
    rest = pattern[after : after + 2]
    if not pathname:
        tokens.append(_ANY)
    elif after - first == 1 or (first > 0 and pattern[first - 1] != _SLASH):
        tokens.append(_IN_SEGMENT)
    elif rest[:1] == b"/":
        if tokens[-3:] != (folders := [_FORK, _ANY, 1 << _SLASH]):  # **/**/ is **/
            tokens += folders
        return after + 1
    else:
        tokens.append(_IN_SEGMENT if rest and rest != b"\\/" else _ANY)
    return after


def _class(pattern: bytes, start: int, ignore_case: bool) -> tuple[int, int]:
    """The set of a [class] that begins at `start`, and where its ] is; the pattern's length where it has no end."""
    end, at = len(pattern), start + 1
    negated = pattern[at : at + 1] in (b"!", b"^")
    at += negated
    accepted, ranges, previous = 0, 0, 0
    first = True
    while at < end and (first or pattern[at] != _CLOSE):
        first = False
        byte = pattern[at]
        if byte == _BACKSLASH:
            at += 1
            if at == end:
                return 0, end
            byte = pattern[at]
            accepted |= 1 << byte
        elif byte == _DASH and previous and at + 1 < end and pattern[at + 1] != _CLOSE:
            at += 2 if pattern[at + 1] == _BACKSLASH else 1
            if at == end:
                return 0, end
            if previous <= pattern[at]:  # a reversed range holds nothing
                ranges |= (1 << pattern[at] + 1) - (1 << previous)
            byte = 0
        elif pattern[at : at + 2] == b"[:":
            close = pattern.find(b"]", at + 2)
            if close < 0:
                return 0, end
            if close > at + 2 and pattern[close - 1] == _COLON:
                name = pattern[at + 2 : close - 1]
                if name not in _CLASSES:
                    return 0, end
                if name == b"upper":
                    ranges |= _UPPER
                accepted |= _CLASSES[name]
                at, byte = close, 0
            else:
                accepted |= 1 << byte
        else:
            accepted |= 1 << byte
        previous = byte
        at += 1
    accepted |= ranges | ((ranges & _UPPER) << 32 if ignore_case else 0)
    return _ALL ^ accepted if negated else accepted, at


def literal_length(pattern: bytes) -> int:
    """How many bytes of a pattern come before its first special one."""
    special = _SPECIAL.search(pattern)
    return special.start() if special else len(pattern)
