"""Changes to valid files: of JSON trees, of text, of bytes. All chance comes from a `random.Random`.

So the same code is driven by a seed, a million times, and by hypothesis, which shrinks what fails.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

Node = dict[str, Any] | list[Any]

DEEP = 20_000  # more than any parser's stack, and small enough to be written often
NUMBERS = (
    "0", "-0", "-1", "1", "2", "3", "255", "65536", "2147483647", "2147483648", "4294967295", "9223372036854775807",
    "9223372036854775808", "18446744073709551616", "1" + "0" * 400, "-1" + "0" * 400, "0.5", "-0.5", "1.0",
    "1.5", "1e-30", "5e-324", "1e308", "-1e308", "1e999", "-1e999", "NaN", "Infinity", "-Infinity",
)  # fmt: skip
TEXTS = (
    '""', '" "', '"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"\\n"', '"\\u202e"', '"\\ufeff"', '"../../etc/passwd"',
    '"/dev/zero"', '"' + "a" * 60 + '"', '"%s%n{0}{{x}}"', '"(a+)+$"',
)  # fmt: skip
OTHERS = ("null", "true", "false", "[]", "{}", "[[]]", "[null]", '{"": 0}', "[1, 2, 3]", '{"a": {"a": {}}}')
LARGE = (
    "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "0" + "}" * DEEP, "[" * 200 + "]" * 200, "[" * DEEP, "9" * 4301,
    '"' + "x" * 70_000 + '"', '"' + "9" * 5_000 + '"', "[" + "0, " * 20_000 + "0]",
)  # fmt: skip
"""Rarely, as they take time to write and to read."""
INTEGERS = (0, 1, 2, 7, 8, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63,
            2**64 - 1)  # fmt: skip
MOST_TRIES, MOST_LEAVES = 50, 300


def hostile(draw: random.Random) -> str:
    """The text of a JSON value that a reader may not expect."""
    kinds: Sequence[Sequence[str]] = (NUMBERS, NUMBERS, NUMBERS, TEXTS, OTHERS, OTHERS)
    if draw.randrange(100) == 0:
        return draw.choice(LARGE)
    return draw.choice(draw.choice(kinds))


class _Raw:
    """Values that no JSON library writes, such as NaN, a key twice, or a number of 400 digits: put in as text."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def of(self, text: str) -> str:
        self._texts.append(text)
        return f"@@{len(self._texts) - 1}@@"

    def written(self, tree: Any) -> str:
        text = json.dumps(tree)
        for number in reversed(range(len(self._texts))):  # a later one may hold an earlier one
            text = text.replace(f'"@@{number}@@"', self._texts[number])
        return text


def mutate_json(draw: random.Random, content: bytes) -> bytes:
    """One change to the tree; to the bytes where it is no JSON any more, or by chance."""
    if draw.randrange(12) == 0:
        return mutate_text(draw, content)
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return mutate_text(draw, content)
    raw = _Raw()
    if not isinstance(tree, dict | list) or draw.randrange(60) == 0:
        return hostile(draw).encode()
    node, key = _place(draw, tree)
    if key is None:
        return mutate_text(draw, content)
    try:
        draw.choice(_CHANGES)(draw, raw, tree, node, key)
        return raw.written(tree).encode()
    except (ValueError, RecursionError):  # an earlier change made what cannot be written
        return mutate_text(draw, content)


def _place(draw: random.Random, tree: Node) -> tuple[Node, Any]:
    """A container and one of its keys: any leaf of a small tree; or by descent, so that large lists do not take all."""
    if draw.randrange(3):
        leaves = _leaves(tree)
        if leaves:
            return draw.choice(leaves)
    node, key = tree, None
    for _ in range(MOST_TRIES):
        if not node:
            break
        key = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
        inner = node[key]
        if not isinstance(inner, dict | list) or not inner or draw.randrange(4) == 0:
            break
        node = inner
    return node, key


def _leaves(tree: Node) -> list[tuple[Node, Any]]:
    """The places of all values that hold no others; none where there are more than MOST_LEAVES."""
    found, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        for key, inner in node.items() if isinstance(node, dict) else enumerate(node):
            if isinstance(inner, dict | list) and inner:
                waiting.append(inner)
            else:
                found.append((node, key))
            if len(found) + len(waiting) > MOST_LEAVES:
                return []
    return found


def _replace(draw: random.Random, raw: _Raw, tree: Node, node: Any, key: Any) -> None:
    node[key] = raw.of(hostile(draw))


def _number(draw: random.Random, raw: _Raw, tree: Node, node: Any, key: Any) -> None:
    """A similar number where it was one."""
    value = node[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _replace(draw, raw, tree, node, key)
    node[key] = draw.choice(
        (
            value + 1,
            value - 1,
            value * 2,
            -value,
            value * 1000,
            raw.of(f"{value}.0" if isinstance(value, int) else "1" + "0" * 30),
        )
    )
    return None


def _like(draw: random.Random, raw: _Raw, tree: Node, node: Any, key: Any) -> None:
    """A hostile value of the same type: it gets farther than one of another."""
    value = node[key]
    kinds = {bool: ("true", "false"), int: NUMBERS, float: NUMBERS, str: TEXTS}
    node[key] = raw.of(draw.choice(kinds.get(type(value), OTHERS)))


def _numbers(draw: random.Random, raw: _Raw, tree: Node, node: Any, key: Any) -> None:
    """Several numbers that are one hostile number: sizes whose product is beyond all bounds."""
    places = [(n, k) for n, k in _leaves(tree) if type(n[k]) in (int, float)]
    number = draw.choice(NUMBERS)
    for where, place in draw.sample(places, min(len(places), draw.choice((2, 3, 5, 50)))):
        where[place] = raw.of(number)


def _delete(draw: random.Random, raw: _Raw, tree: Node, node: Any, key: Any) -> None:
    del node[key]


def _twice(draw: random.Random, raw: _Raw, tree: Node, node: Any, key: Any) -> None:
    """A key twice, with two values; an element many times."""
    if isinstance(node, list):
        node[key:key] = [node[key]] * draw.choice((1, 1, 2, 2, 20, 20, 20, 1000))
        return
    both = f"{json.dumps(node[key])}, {json.dumps(key)}: {hostile(draw)}"
    node[key] = raw.of(both)


def _swap(draw: random.Random, raw: _Raw, tree: Node, node: Any, key: Any) -> None:
    other, place = _place(draw, tree)
    if place is not None:  # copies: one may hold the other
        node[key], other[place] = json.loads(json.dumps(other[place])), json.loads(json.dumps(node[key]))


def _copy(draw: random.Random, raw: _Raw, tree: Node, node: Any, key: Any) -> None:
    other, place = _place(draw, tree)
    node[key] = json.loads(json.dumps(other[place] if place is not None else other))


def _rename(draw: random.Random, raw: _Raw, tree: Node, node: Any, key: Any) -> None:
    if isinstance(node, dict):
        node[draw.choice(("", "x", key + "_", key.upper(), "__class__", "\ud800"))] = node.pop(key)
    else:
        draw.shuffle(node)


def _wrap(draw: random.Random, raw: _Raw, tree: Node, node: Any, key: Any) -> None:
    node[key] = draw.choice(([node[key]], {"value": node[key]}, str(node[key])))


def _text(draw: random.Random, raw: _Raw, tree: Node, node: Any, key: Any) -> None:
    """A similar text where it was one."""
    if not isinstance(node[key], str):
        return _replace(draw, raw, tree, node, key)
    text = node[key].encode("utf-8", "surrogatepass")
    changed = mutate_json(draw, text) if text[:1] in (b"{", b"[") else mutate_text(draw, text)
    node[key] = changed.decode("utf-8", draw.choice(("replace", "surrogateescape")))
    return None


_CHANGES: Sequence[Callable[[random.Random, _Raw, Node, Any, Any], None]] = (
    _replace, _replace, _like, _like, _like, _like, _number, _number, _numbers, _delete, _twice, _swap, _copy, _rename,
    _wrap, _text,
)  # fmt: skip


def mutate_bytes(draw: random.Random, content: bytes, beginning: int = 0) -> bytes:
    """One change to a binary file; three in four within the first `beginning` bytes, if it is given."""
    data = bytearray(content)
    if not data:
        return draw.randbytes(draw.randrange(64))
    reach = min(len(data), beginning) if beginning and draw.randrange(4) else len(data)
    at = draw.randrange(reach)
    match draw.randrange(9):
        case 0:
            data[at] ^= 1 << draw.randrange(8)
        case 1:
            data[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, ord("9"), ord("-"), ord('"')))
        case 2 | 3:  # a length, a count or an offset
            form = draw.choice(("<B", "<H", ">H", "<I", ">I", "<Q", ">Q", "<d"))
            size = struct.calcsize(form)
            value = draw.choice(INTEGERS)
            packed = struct.pack(form, float(value) if form == "<d" else value % 256**size)
            data[at : at + size] = packed[: len(data) - at]
        case 4:
            del data[at : draw.choice((len(data), at + 1, at + 2, at + 4, at + 8, at + 64))]
        case 5:
            data[at:at] = draw.randbytes(draw.choice((1, 2, 8, 64)))
        case 6:
            data += draw.choice((b"\0", b"\0" * 4096, draw.randbytes(16), bytes(data[:64])))
        case 7:  # a piece again, elsewhere
            piece = data[at : at + draw.choice((4, 16, 64, 512))]
            to = draw.randrange(len(data))
            data[to : to + draw.choice((0, len(piece)))] = piece
        case _:
            for _ in range(8):
                data[draw.randrange(reach)] = draw.randrange(256)
    return bytes(data)


PIECES = (
    b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r\n", b"\n", b" ", b"\t", b'"', b"\\", b"{", b"}", b"[", b"]",
    b":", b",", b"*", b"**/", b"?", b"!", b"#", b"-1", b"1e999", b"NaN", b"0", b"9" * 400, b"\xe2\x80\xa8", b"(", b")",
    b"a" * 5000, b"[" * 3000, b"\x1b[2J", b"\xf0\x9f\x91\x8d\xf0\x9f\x8f\xbd",
)  # fmt: skip


def mutate_text(draw: random.Random, content: bytes, pieces: Sequence[bytes] = PIECES) -> bytes:
    """One change to a text: a piece put in, a line or a stretch repeated, moved or taken out; or one to its bytes."""
    at = draw.randrange(len(content) + 1)
    match draw.randrange(7):
        case 0 | 1 | 2:
            return content[:at] + draw.choice(pieces) + content[at:]
        case 3:
            lines = content.split(b"\n")
            number = draw.randrange(len(lines))
            return b"\n".join(
                lines[:number] + lines[number : number + 1] * draw.choice((0, 2, 50)) + lines[number + 1 :]
            )
        case 4:
            stop = at + draw.choice((1, 3, 20))
            return content[:at] + content[at:stop] * draw.choice((0, 2, 300)) + content[stop:]
        case 5:
            other = draw.randrange(len(content) + 1)
            return content[:at] + content[other : other + 30] + content[at:]
        case _:
            return mutate_bytes(draw, content)
