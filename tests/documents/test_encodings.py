"""Older encodings: decoded right and reported, or left out with what to do; never wrong in silence."""

from __future__ import annotations

import codecs
import importlib.util
import io
from pathlib import Path

import pytest

from l4ctx.documents import encodings
from l4ctx.documents.reader import read_documents
from l4ctx.documents.text import UndecodableError, check_encoding, decode

TEXTS = {
    "Chinese": "中华人民共和国，公司年度报告。这个文件说明了如何使用系统，以及在什么情况下可以得到更多的信息。\n",
    "Traditional": "這個文件說明了如何使用系統，以及在什麼情況下可以得到更多的資訊。我們的公司有很多人。\n",
    "Japanese": "これは秘密の番号です。日本語のテキストファイルを読むことができます。\n",
    "Korean": "이 문서는 시스템을 사용하는 방법을 설명합니다. 우리는 그것을 읽을 수 있습니다.\n",
    "Russian": "Этот документ описывает, как пользоваться системой. Код доступа записан на странице три.\n",
    "Ukrainian": "Цей документ описує, як користуватися системою. Її код записано на третій сторінці.\n",
    "Greek": "Αυτό το έγγραφο περιγράφει τον τρόπο χρήσης του συστήματος και τον κωδικό πρόσβασης.\n",
    "Hebrew": "המסמך הזה מתאר כיצד להשתמש במערכת, ומהו קוד הגישה של כל אחד מהם.\n",
    "Arabic": "هذه الوثيقة تصف كيفية استخدام النظام وما هو رمز الوصول إلى كل منها.\n",
    "German": "Der Schlüssel für die Tür ist größer als der für das Gebäude, und er öffnet auch die Fenster.\n",
    "French": "L'accès à la pièce où le père a été reçu est fermé; la clé est à côté de la fenêtre.\n",
    "Polish": "Ten dokument zawiera się w książce, którą można znaleźć na półce; jest to żółta okładka z łąką.\n",
    "Czech": "Tento dokument popisuje, jak používat systém a kde je uložen přístupový kód k jeho částem.\n",
}
CASES = [
    ("Chinese", "gbk", "GB18030 (GBK)"), ("Chinese", "gb18030", "GB18030 (GBK)"), ("Traditional", "big5", "Big5"),
    ("Japanese", "cp932", "Shift-JIS"), ("Japanese", "euc_jp", "EUC-JP"), ("Japanese", "iso2022_jp", "ISO-2022-JP"),
    ("Korean", "euc_kr", "EUC-KR"), ("Russian", "cp1251", "Windows-1251"), ("Russian", "koi8_r", "KOI8-R"),
    ("Russian", "iso8859_5", "ISO-8859-5"), ("Russian", "mac_cyrillic", "Mac Cyrillic"), ("Russian", "cp866", "CP866"),
    ("Ukrainian", "cp1251", "Windows-1251"), ("Greek", "iso8859_7", None), ("Hebrew", "cp1255", None),
    ("Arabic", "cp1256", "Windows-1256"), ("German", "cp1252", None), ("German", "mac_roman", "Mac Roman"),
    ("French", "cp1252", None), ("Polish", "cp1250", "Windows-1250"), ("Polish", "iso8859_2", "ISO-8859-2"),
    ("Czech", "cp1250", "Windows-1250"), ("Chinese", "utf-16-le", "UTF-16-LE"), ("French", "utf-16-be", "UTF-16-BE"),
    ("Japanese", "utf-16-le", "UTF-16-LE"), ("Russian", "utf-32-le", "UTF-32-LE"), ("Greek", "utf-32-be", "UTF-32-BE"),
]  # fmt: skip


@pytest.mark.parametrize(("language", "codec", "name"), CASES)
def test_prose_is_decoded_and_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language: str, codec: str, name: str | None
) -> None:
    """Also without a detector, for so much text, but Hebrew, which reads much like Cyrillic."""
    text = TEXTS[language] * 8
    (tmp_path / "a.txt").write_bytes(text.encode(codec))
    for with_detector in (True, False)[: 1 if language == "Hebrew" else 2]:
        if not with_detector:
            monkeypatch.setattr(encodings, "_detector_is_there", lambda: False)
        found = read_documents([tmp_path / "a.txt"], stdin=None)
        assert [document.text for document in found.documents] == [text], found.skipped
        assert len(found.notes) == 1 and "read as " in found.notes[0]
        assert name is None or found.notes[0].endswith(f"read as {name}")
    piped = read_documents(["-"], stdin=io.BytesIO(text.encode(codec)))
    assert [document.text for document in piped.documents] == [text]


@pytest.mark.parametrize(("language", "codec"), [case[:2] for case in CASES])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 13, 21, 34])
@pytest.mark.parametrize("with_detector", [True, False])
def test_short_text_is_right_or_left_out_or_noted(
    monkeypatch: pytest.MonkeyPatch, language: str, codec: str, length: int, with_detector: bool
) -> None:
    if not with_detector:
        monkeypatch.setattr(encodings, "_detector_is_there", lambda: False)
    raw = TEXTS[language][:length].encode(codec)
    if b"\0" in raw:
        return  # binary, or by the pattern of the zeros: told before it is decoded
    found = encodings.detect(raw)
    if found.reason is not None:
        with pytest.raises(UndecodableError, match=r"iconv -f NAME .*--encoding NAME"):
            decode(raw)
    else:
        text, notes = decode(raw)
        assert text == TEXTS[language][:length] or (notes and "U+FFFD" in notes[0]) or raw.decode() == text


def test_the_detector_of_the_extra_is_among_the_test_tools() -> None:
    assert importlib.util.find_spec("chardet") is not None


def test_source_with_a_few_bad_bytes_stays_what_it_is() -> None:
    code = "def f(x):\n    return x + 1  # words\n" * 40
    for bad in (b"\xe9", b"\xe9 \xe8 \xfc", b"\xd6\xd0\xce"):
        text, notes = decode(code.encode() + bad)
        assert text.startswith(code) and "\ufffd" in text
        assert len(notes) == 1 and notes[0].endswith(": replaced by U+FFFD")


def test_utf_8_with_bad_bytes_is_utf_8() -> None:
    text, notes = decode(TEXTS["Russian"].encode() * 9 + b"\xd0 \xd1 \xff\xff\xff")
    assert text.startswith(TEXTS["Russian"]) and notes[0].startswith("not valid UTF-8 in 5 places")


def test_colours_of_a_terminal_are_no_escapes_of_an_encoding() -> None:
    raw = b"\x1b[31mred\x1b[0m \x1b(0lqk\x1b[K\n"
    assert decode(raw) == (raw.decode(), [])


def test_an_encoding_is_given_by_hand(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("ключ".encode("koi8_r"))
    (tmp_path / "b.txt").write_bytes("ключ".encode())
    (tmp_path / "c.txt").write_bytes(codecs.BOM_UTF16_LE + "ключ".encode("utf-16-le"))
    found = read_documents([tmp_path], stdin=None, encoding=check_encoding("KOI8-R"))
    assert [document.text for document in found.documents] == ["ключ"] * 3 and found.notes == []
    piped = read_documents(["-"], stdin=io.BytesIO("é".encode("mac_roman")), encoding="mac-roman")
    assert piped.documents[0].text == "é"


@pytest.mark.parametrize(
    ("codec", "text"),
    [("utf-16-le", "ab\n"), ("utf-32-be", "日本"), ("iso2022_kr", "한국어"), ("hz", "中文"), ("cp037", "Hello, world")],
)
def test_encodings_by_hand_whose_bytes_look_like_others(codec: str, text: str) -> None:
    found = read_documents(["-"], stdin=io.BytesIO(text.encode(codec)), encoding=check_encoding(codec))
    assert [document.text for document in found.documents] == [text], found.skipped


def test_what_is_not_in_the_given_encoding() -> None:
    assert decode(b"a\xff\xfe bcdefghijklmnopqrstuvw", "ascii")[1][0].startswith("not valid ASCII in 2 places")
    with pytest.raises(UndecodableError, match=r"^not text in ascii \(--encoding\)$"):
        decode("ключ".encode("koi8_r"), "ascii")
    assert read_documents(["-"], stdin=io.BytesIO(b"a\0b\1"), encoding="gbk").documents == []


@pytest.mark.parametrize("name", ["klingon", "rot13", "base64", "zlib", "", "gbk\0", "x" * 300, "\ud800", "../a"])
def test_what_is_no_encoding_of_text(name: str) -> None:
    with pytest.raises(ValueError, match="is not an encoding of text"):
        check_encoding(name)


@pytest.mark.parametrize(
    "raw",
    [
        b"\0\1\2\3",
        b"\0\1\0\2\0\3",
        bytes(range(256)),
        b"\1\0\0\0\2\0\0\0",
        b"abc\0def",
        b"a\0b",
        b"\0" * 64,
        b"\x10\x27\0\0\x88\x13\0\0" * 30,
        b"\0\4\0\4\0\4\0\4",
    ],
)
def test_binary_with_zero_bytes_is_no_utf_16(raw: bytes) -> None:
    assert [entry.reason for entry in read_documents(["-"], stdin=io.BytesIO(raw)).skipped] == ["binary"]
