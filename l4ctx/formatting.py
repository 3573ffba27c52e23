"""Human-readable sizes, counts and times, parsing them, and text made safe for a terminal."""

from __future__ import annotations

import re
from fractions import Fraction

_STEERING = "\x7f-\x9f\u2028-\u202e\u2066-\u2069"  # controls, line ends, and what turns the direction of text
_LONE_SURROGATES = re.compile("[\ud800-\udfff]")  # of bytes that are not UTF-8
_CONTROLS = re.compile(f"[\x00-\x08\x0b-\x1f{_STEERING}]")
_UNPRINTABLE = re.compile(f"[\x00-\x1f{_STEERING}\ud800-\udfff]")
_NOT_IN_AN_ATTRIBUTE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def human_seconds(seconds: float) -> str:
    """'0.4 s', '12 s', '3:05 min', '2:10:00 h'."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"


def human_time(seconds: float) -> str:
    """Of a prediction, rounded: '12 s', '15 min', '2.5 h', '58 days'; at least '0.1 s'."""
    if seconds < 600:
        return human_seconds(max(0.1, seconds))
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:,.1f} h" if hours < 48 else f"{hours / 24:,.0f} days"


def human_clock(seconds: float) -> str:
    """'0:12', '3:05', '2:10:00'."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def human_bytes(count: float) -> str:
    """'17 B', '4.0 KiB', '1.5 GiB'."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        count /= 1024
        if count < 1024 or unit == "TiB":
            break
    return f"{count:.0f} {unit}" if count >= 100 else f"{count:.1f} {unit}"


def counted(number: int, what: str) -> str:
    """'1 document', '1,024 documents'."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def short_count(number: int) -> str:
    """'999', '4K' for 4,096, '1M' for 1,048,576: powers of 1024 where they divide it, or else of 1000; '1.5K'."""
    for unit, name in ((2**20, "M"), (2**10, "K"), (10**6, "M"), (10**3, "K")):
        if number >= unit and number % unit == 0:
            return f"{number // unit}{name}"
    if number < 1000:
        return str(number)
    unit, name = (10**6, "M") if number >= 10**6 else (10**3, "K")
    return f"{number / unit:.3g}{name}"


def parse_size(text: str) -> int:
    """Parses '8GiB', '500MB', '1.5G' or '8388608' into bytes: KiB and bare K are 1024, KB is 1000.

    Raises ValueError, also for a number below 1 MiB without a unit, since 8 is most likely meant as 8GiB.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([kmgt]?)(i?b)?", text.strip().lower())
    if found is None or found.group(2, 3) == ("", "ib"):
        raise ValueError(f"{text!r} is not a size such as 8GiB, 500MB or 8388608 (bytes)")
    number, unit, suffix = found.groups()
    if not unit and not suffix and 0 < float(number) < 2**20:
        raise ValueError(
            f"{text.strip()} would be bytes; with a unit it is clear: {number}GiB, {number}MiB, or {number}B for bytes"
        )
    factor = _UNITS[unit] if suffix != "b" else {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}[unit]
    return int(Fraction(number.rstrip(".")) * factor)


def parse_rate(text: str) -> float:
    """Parses '400GB/s' or '50GiB/s' into bytes a second, more than 0. Raises ValueError."""
    number = text.strip()
    try:
        rate = parse_size(number[:-2]) if number.lower().endswith("/s") else 0
    except ValueError:
        rate = 0
    if rate <= 0:
        raise ValueError(f"{text!r} is not a rate such as 400GB/s or 50GiB/s")
    return float(rate)


def parse_operations(text: str) -> float:
    """Parses '593TFLOP/s', '1.2PFLOP/s' or '593T' into floating-point operations a second, more than 0.

    Raises ValueError.
    """
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)\s*([gtp])(?:flop/?s(?:/s)?)?", text.strip().lower())
    rate = float(found[1]) * {"g": 1e9, "t": 1e12, "p": 1e15}[found[2]] if found else 0.0
    if rate <= 0:
        raise ValueError(f"{text!r} is not a rate such as 593TFLOP/s")
    return rate


def human_rate(rate: float) -> str:
    """'400 GB/s', '3.35 TB/s': decimal, as links and memory are sold."""
    size, unit = (rate / 1e12, "TB/s") if rate >= 1e12 else (rate / 1e9, "GB/s")
    return f"{size:,.3g} {unit}" if size < 1000 else f"{size:,.0f} {unit}"


def parse_tokens(text: str) -> int:
    """Parses a token count: '4096', '128k' (128,000), '10M' (10,000,000), '1.5M', '128Ki' (131,072), '10Mi'.

    Raises ValueError.
    """
    found = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]+)?)(|[kmg]i?)", text.strip().lower())
    count = Fraction(-1)
    if found is not None:
        number, unit = found.groups()
        base = 1024 if unit.endswith("i") else 1000
        count = Fraction(number.replace("_", "")) * base ** " kmg".index(unit[:1] or " ")
    if count < 0 or count.denominator != 1:
        raise ValueError(
            f"{text!r} is not a number of tokens such as 4096, 128k (128,000), 10M (10,000,000) or 128Ki (131,072)"
        )
    return int(count)


def without_controls(text: str) -> str:
    """Text made safe for a terminal: control characters but newline and tab become U+FFFD; `\\r` is dropped."""
    return _CONTROLS.sub("\ufffd", text.replace("\r", ""))


def as_one_line(text: str) -> str:
    """The same on one line, with a space for each line end."""
    return without_controls(" ".join(text.splitlines()))


def printable(path: str) -> str:
    """`path` on one line of valid Unicode, with control characters and non-UTF-8 bytes as backslash escapes."""
    return _UNPRINTABLE.sub(lambda found: found.group().encode("unicode_escape").decode(), path)


def only_printable(text: str, instead: str) -> str:
    """For messages of other libraries: characters that are not `str.isprintable`, line ends too, become `instead`."""
    return "".join(character if character.isprintable() else instead for character in text)


def as_attribute(path: str) -> str:
    """`path` as an attribute value in a prompt: on one line of valid Unicode, without double quotes, which end it.

    The token ids of saved contexts depend on this.
    """
    return _NOT_IN_AN_ATTRIBUTE.sub("\ufffd", path).replace('"', "'")


def without_surrogates(text: str) -> str:
    """Valid Unicode, with U+FFFD for lone surrogates. The token ids of saved contexts depend on this."""
    return text if text.isascii() else _LONE_SURROGATES.sub("\ufffd", text)
