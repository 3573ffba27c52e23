"""Detects which legacy encoding a text is in, by what it would say: letters, words, frequent characters.

Every candidate that decodes all bytes is judged by the same rules. One is accepted if its text looks like a language
and no other candidate's different text does. A detector (the extra `l4ctx[encodings]`) settles texts that are too short
for that.
"""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from l4ctx.documents.scripts import (
    ARABIC,
    CHINESE,
    CYRILLIC,
    GREEK,
    HANGUL,
    HEBREW,
    JAPANESE_KANJI,
    LATIN,
    MARKS,
    THAI,
    WIDE_MARKS,
)

_JUDGED_BYTES = 1 << 17  # of a text, at most
_JUDGED = 1 << 13  # characters beyond ASCII, at most, by which a text is judged
_ENOUGH = 24  # of them: so many are judged without a detector's agreement
_FEWEST = 4  # with it; fewer say nothing of a language
_CONVERT = "convert it: iconv -f NAME -t UTF-8, or say it: --encoding NAME"
_HINT = " (--encoding NAME reads another encoding)"
EXTRA_HINT = 'pip install "l4ctx[encodings]" adds what detects more'


class Encoding(NamedTuple):
    """A candidate: its usual name, its name in Python, and the kind of text in it."""

    name: str
    codec: str
    script: str


ENCODINGS = (
    Encoding("GB18030 (GBK)", "gb18030", "Chinese"), Encoding("Big5", "big5hkscs", "Chinese"),
    Encoding("Shift-JIS", "cp932", "Japanese"), Encoding("EUC-JP", "euc_jp", "Japanese"),
    Encoding("EUC-KR", "cp949", "Korean"),
    Encoding("Windows-1251", "cp1251", "Cyrillic"), Encoding("KOI8-R", "koi8_r", "Cyrillic"),
    Encoding("KOI8-U", "koi8_u", "Cyrillic"), Encoding("ISO-8859-5", "iso8859_5", "Cyrillic"),
    Encoding("Mac Cyrillic", "mac_cyrillic", "Cyrillic"), Encoding("CP866", "cp866", "Cyrillic"),
    Encoding("Windows-1253", "cp1253", "Greek"), Encoding("ISO-8859-7", "iso8859_7", "Greek"),
    Encoding("Windows-1255", "cp1255", "Hebrew"), Encoding("ISO-8859-8", "iso8859_8", "Hebrew"),
    Encoding("Windows-1256", "cp1256", "Arabic"), Encoding("ISO-8859-6", "iso8859_6", "Arabic"),
    Encoding("Windows-874", "cp874", "Thai"),
    Encoding("Windows-1252", "cp1252", "Latin"), Encoding("ISO-8859-15", "iso8859_15", "Latin"),
    Encoding("Windows-1250", "cp1250", "Latin"), Encoding("ISO-8859-2", "iso8859_2", "Latin"),
    Encoding("Windows-1254", "cp1254", "Latin"), Encoding("Windows-1257", "cp1257", "Latin"),
    Encoding("Mac Roman", "mac_roman", "Latin"), Encoding("CP850", "cp850", "Latin"),
)  # fmt: skip
_WIDE = (
    Encoding("UTF-16-LE", "utf-16-le", ""),
    Encoding("UTF-16-BE", "utf-16-be", ""),
    Encoding("UTF-32-LE", "utf-32-le", ""),
    Encoding("UTF-32-BE", "utf-32-be", ""),
)
_ESCAPES = re.compile(rb"\x1b(?:\$[@AB]|\$\([A-Z]|\([BIJ]|\$\)C)")  # of ISO-2022
_HIGH = re.compile(rb"[\x80-\xff]")
_WORD = re.compile(r"[^\W\d_]+")
_SIGN_IN_WORD = re.compile(r"(?<=[^\W\d_])[€£¥†‡±×÷µ¬¿¡]|[€£¥†‡±×÷µ¬](?=[^\W\d_])|(?<=[^\W\d_])[„‚“«»§©®](?=[^\W\d_])")


@dataclass(frozen=True)
class Detected:
    """The encoding of a text, or what to tell the user where it is unknown.

    `reason` is None where the text is nearly ASCII, and as well read with replacements; `hint` ends the note then.
    """

    name: str | None = None
    codec: str = ""
    reason: str | None = None
    hint: str = ""


class _Candidate(NamedTuple):
    encoding: Encoding
    text: str
    share: float  # of characters beyond ASCII that are as they should be
    bad: int  # those that cannot be


def detect(raw: bytes) -> Detected:
    """The encoding of text that is not UTF-8, or that has zero bytes or escapes of ISO-2022."""
    if _ESCAPES.search(raw):
        for name, codec in (
            ("ISO-2022-JP", "iso2022_jp_2"),
            ("ISO-2022-KR", "iso2022_kr"),
            ("ISO-2022-JP", "iso2022_jp_ext"),
        ):
            text = _decoded(raw, codec)
            if text is not None and "\x1b" not in text:
                return Detected(name, codec)
        if raw.isascii():
            return Detected()
    if b"\0" in raw[: 1 << 16]:
        wide = wide_encoding(raw)
        return Detected(wide.name, wide.codec) if wide and _decoded(raw, wide.codec) is not None else Detected()
    high = sum(map(len, runs := re.findall(rb"[\x80-\xff]+", raw)))
    valid = len(re.findall(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}", raw))
    bad = raw.decode("utf-8", "replace").count("\ufffd") - raw.count("\ufffd".encode())
    single = sum(len(run) == 1 for run in runs)
    if bad <= min(3, single) or (high <= 3 and high * 8 <= len(raw)) or bad * 4 <= valid:
        return Detected()  # UTF-8 with a few bad bytes
    part = _telling_lines(raw)
    candidates = _candidates(raw, part)
    found = _best(part, candidates)
    if found is not None and (part is raw or _decoded(raw, found.codec) is not None):
        return Detected(found.name, found.codec)
    if (single * 4 >= len(runs) * 3 and high * 6 <= len(raw)) or high * 10 <= len(raw):
        return Detected(hint=_HINT)
    names = " or ".join(candidate.encoding.name for candidate in candidates[:3])
    what = f"text in {names}" if names else "text in an encoding that is not recognised"
    extra = "" if _detector_is_there() else f"; {EXTRA_HINT}"
    return Detected(reason=f"not UTF-8; {what}; {_CONVERT}{extra}")


def wide_encoding(sample: bytes) -> Encoding | None:
    """UTF-16 or UTF-32 without a byte order mark, if what begins with `sample` is text in it."""
    found = []
    for encoding in _WIDE:
        width = 4 if "32" in encoding.name else 2
        part = sample[: min(len(sample), 1 << 14) // 4 * 4] if len(sample) > 64 else sample
        if len(part) % width or not part:
            continue
        text = _decoded(part, encoding.codec) or _decoded(part[:-2], encoding.codec)  # cut within a pair
        if text and (width == 4 or sum(char < "\u0100" for char in text) * 10 >= part.count(0) * 9):
            found.append((_wide_share(text), encoding))
    share, best = max(found, key=lambda pair: pair[0], default=(0.0, None))
    return best if share >= 0.6 and all(other * 2 < share for other, name in found if name is not best) else None


def _wide_share(text: str) -> float:
    """The share of characters that are plausible; 0 if one occurs that no text has."""
    usual = 0
    for char, count in _counted(text).items():
        if unicodedata.category(char) in ("Cc", "Cn", "Co") and char not in "\t\n\r\f\v\x1b":
            return 0.0
        usual += count * (
            char < "\u0700"
            or "\u0e00" <= char < "\u0e80"
            or char in CHINESE
            or char in JAPANESE_KANJI
            or char in HANGUL
            or char in WIDE_MARKS
            or "\u2010" <= char <= "\u203a"
            or "\u3040" <= char <= "\u30ff"
        )
    return usual / len(text)


def _counted(text: str) -> dict[str, int]:
    return {char: text.count(char) for char in set(text)}


def _decoded(raw: bytes, codec: str) -> str | None:
    try:
        return raw.decode(codec)
    except UnicodeDecodeError:
        return None


def _telling_lines(raw: bytes) -> bytes:
    """The lines that are not ASCII, as many as are judged; a small text itself. No encoding but UTF-16 breaks lines."""
    if len(raw) <= _JUDGED_BYTES:
        return raw
    lines, size, at = [], 0, 0
    while size < _JUDGED_BYTES and (high := _HIGH.search(raw, at)):
        begin = max(raw.rfind(b"\n", at, high.start()) + 1, at)
        at = raw.find(b"\n", high.start()) + 1 or len(raw)
        lines.append(raw[begin : min(at, begin + _JUDGED_BYTES)])
        size += len(lines[-1])
    return b"".join(lines)


def _begins_as(part: bytes, codec: str) -> str | None:
    """The text of a part of the bytes, which may end within a character."""
    return next((text for cut in range(4) if (text := _decoded(part[: len(part) - cut], codec)) is not None), None)


def _candidates(raw: bytes, part: bytes) -> list[_Candidate]:
    """The candidates whose text looks like a language, the likeliest first."""
    found = []
    for encoding in (*ENCODINGS, *_WIDE[:2]):
        if encoding in _WIDE:
            text = None if len(raw) % 2 or len(raw) < 8 else _begins_as(raw[:_JUDGED_BYTES], encoding.codec)
        else:
            text = _decoded(part, encoding.codec) if part is raw else _begins_as(part, encoding.codec)
        if text is not None and (judged := _judge(encoding, text)) is not None:
            found.append(judged)
    return sorted(found, key=lambda candidate: (candidate.bad, -candidate.share))


def _best(raw: bytes, candidates: list[_Candidate]) -> Encoding | None:
    """The one whose text stands out, or that a detector names where texts are short or more than one are possible."""
    if not candidates:
        return None
    best = candidates[0]
    count = _beyond_ascii(best.text)
    others = [other for other in candidates[1:] if other.text != best.text]
    if count >= _ENOUGH and not any(other.bad < best.bad + 2 + count // 200 for other in others):
        return best.encoding
    if count < _FEWEST:
        return None
    guess = _guess(raw)
    if guess is None:
        return None
    agreed = [candidate for candidate in candidates if candidate.text == guess and candidate.bad <= best.bad + 1]
    if not agreed or (others and count < 4 * _FEWEST):
        return None
    return agreed[0].encoding


@cache
def _detector_is_there() -> bool:
    return importlib.util.find_spec("chardet") is not None


def _guess(raw: bytes) -> str | None:
    """The text in the encoding that the detector names; None without a detector."""
    if not _detector_is_there():
        return None
    import chardet

    name = chardet.detect(raw)["encoding"]
    try:
        return raw.decode(name) if name else None
    except (LookupError, UnicodeDecodeError):
        return None


def _beyond_ascii(text: str) -> int:
    return sum(map(len, re.findall(r"[^\x00-\x7f]+", text)))


def _judge(encoding: Encoding, text: str) -> _Candidate | None:
    """None if the text cannot be a language in that script."""
    shown = _excerpt(text)
    beyond = {char: count for char, count in _counted(shown).items() if char > "\x7f"}
    total = sum(beyond.values())
    if not total or any("\x80" <= char < "\xa0" or unicodedata.category(char) in ("Cn", "Co") for char in beyond):
        return None
    if not encoding.script:
        share, bad = _wide_share(shown), 0
        return _Candidate(encoding, text, share, bad) if share >= 0.6 else None
    if encoding.script == "Latin":
        return _judged_latin(encoding, text, shown, total)
    if encoding.script in ("Chinese", "Japanese", "Korean"):
        return _judged_ideographs(encoding, text, beyond, total)
    return _judged_alphabet(encoding, text, shown, beyond, total)


def _excerpt(text: str) -> str:
    """The lines with characters beyond ASCII, as many as are judged."""
    lines, found = [], 0
    for line in text.splitlines():
        if not line.isascii():
            lines.append(line)
            found += _beyond_ascii(line)
            if found > _JUDGED:
                break
    return "\n".join(lines)[: 4 * _JUDGED]


def _judged_ideographs(encoding: Encoding, text: str, beyond: dict[str, int], total: int) -> _Candidate | None:
    frequent = {"Chinese": CHINESE, "Korean": HANGUL, "Japanese": JAPANESE_KANJI}[encoding.script]
    kana = sum(count for char, count in beyond.items() if "\u3041" <= char <= "\u30fe")
    marks = sum(count for char, count in beyond.items() if char in WIDE_MARKS or "\uff10" <= char <= "\uff5a")
    usual = sum(count for char, count in beyond.items() if char in frequent)
    odd = sum(count for char, count in beyond.items() if not _is_ideographic(char) and char not in MARKS)
    letters = total - marks
    if letters < 2 or odd * 10 > total:
        return None
    if encoding.script == "Japanese":
        if kana * 5 < letters or kana + usual < 0.5 * letters:
            return None
        usual += kana
    elif kana * 10 > letters:
        return None
    share = usual / letters
    return _Candidate(encoding, text, share, 0) if share >= (0.3 if letters >= 20 else 0.4) else None


def _is_ideographic(char: str) -> bool:
    """Or else of a Chinese, Japanese or Korean text; half-width kana are not."""
    return "\u2010" <= char <= "\u9fff" or "\uac00" <= char <= "\ud7a3" or "\uf900" <= char <= "\uff60"


def _judged_alphabet(
    encoding: Encoding, text: str, shown: str, beyond: dict[str, int], total: int
) -> _Candidate | None:
    """Cyrillic, Greek and other letters that are not Latin."""
    languages = {
        "Cyrillic": list(CYRILLIC.values()),
        "Greek": [GREEK],
        "Hebrew": [HEBREW],
        "Arabic": [ARABIC],
        "Thai": [THAI],
    }[encoding.script]
    marks = MARKS | (
        frozenset("،؛؟٪")
        if encoding.script == "Arabic"
        else frozenset("־׳״₪")
        if encoding.script == "Hebrew"
        else frozenset("฿")
        if encoding.script == "Thai"
        else frozenset()
    )
    best = None
    runs = re.findall(r"[^\x00-\x7f]+", shown)
    if sum(len(run) == 1 for run in runs) * 5 > len(runs) * 2:
        return None  # single letters within words of others
    words = _WORD.findall(shown)
    wrong_case = sum(_has_wrong_case(word) for word in words if not word.isascii())
    wrong_case += len(_SIGN_IN_WORD.findall(shown))
    capitals = sum(count for char, count in beyond.items() if char.isupper())
    if capitals * 5 > total * 3:
        return None  # which other letters look like
    if encoding.script == "Cyrillic" and not capitals and total >= _ENOUGH and not set("ыьэюяіїєў") & beyond.keys():
        return None  # which Hebrew looks like
    if encoding.script == "Greek" and sum(beyond.get(char, 0) for char in "άέήίόύώ") * 20 < total:
        return None  # nearly every word has an accent
    mixed = sum(any("a" <= char <= "z" or "A" <= char <= "Z" for char in word) for word in words if not word.isascii())
    for letters, frequent in languages:
        of_it = {char: count for char, count in beyond.items() if char.lower() in letters or char in letters}
        inside = sum(of_it.values())
        if inside == 0:
            continue
        bad = sum(count for char, count in beyond.items() if char not in of_it and char not in marks)
        bad += wrong_case + mixed
        usual = sum(count for char, count in of_it.items() if char.lower() in frequent) / inside
        if bad * 20 <= total and usual >= 0.6 and inside * 2 >= total and (best is None or bad < best.bad):
            best = _Candidate(encoding, text, usual, bad)
    return best


def _has_wrong_case(word: str) -> bool:
    """Whether a capital follows a small letter, as in wrongly decoded text."""
    return any(one.islower() and other.isupper() for one, other in pairwise(word))


def _judged_latin(encoding: Encoding, text: str, shown: str, total: int) -> _Candidate | None:
    words = _WORD.findall(shown)
    letters: dict[str, int] = {}
    for char, count in _counted("".join(word for word in words if not word.isascii())).items():
        if char > "\x7f":
            letters[char.lower() if len(char.lower()) == 1 else char] = count + letters.get(char.lower(), 0)
    of_letters = sum(letters.values())
    if of_letters * 3 > sum(map(len, words)):
        return None  # no language has so many
    bad = sum(_has_wrong_case(word) for word in words if not word.isascii())
    bad += sum(
        count for char, count in _counted(shown).items() if char > "\x7f" and not char.isalpha() and char not in MARKS
    )
    bad += len(re.findall(r"(?<=[^\W\d_])[^\W_a-zA-Z]*[‚„“”«»‹›–—…•°§€£¥©®™¿¡†‡±×÷µ²³¬](?=[^\W\d_])", shown))
    languages = _languages(words)
    foreign = min(
        sum(count for char, count in letters.items() if char not in LATIN[name].letters) for name in languages
    )
    if (bad + foreign) * 20 > total:
        return None
    return _Candidate(encoding, text, 1 - foreign / total, bad + foreign)


def _languages(words: list[str]) -> list[str]:
    """Those of LATIN that the words in ASCII can be of: all where there are too few small words."""
    small = [word.lower() for word in words if word.isascii() and len(word) <= 6]
    hits = {name: sum(word in language.words for word in small) for name, language in LATIN.items()}
    most = max(hits.values())
    return [name for name, count in hits.items() if most < 3 or count * 2 >= most]
