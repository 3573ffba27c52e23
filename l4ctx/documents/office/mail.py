"""An email (EML) as text: its usual header fields and its body, decoded; what is attached is named."""

from __future__ import annotations

import email
import email.message
import email.parser
import email.policy
import re
from dataclasses import dataclass, field
from email.header import decode_header, make_header
from typing import Any

from l4ctx.confinement.work import Refusal

_FIELDS = ("From", "To", "Cc", "Date", "Subject")
_MOST_PARTS = 10_000
_MOST_BOUNDARIES = 1000
_MOST_FIELD = 16_384  # characters of a field about content
_BOUNDARY = re.compile(rb"^[ \t]*(?:content-type:[^\n]*)?\bboundary\*?0?\*?=", re.IGNORECASE | re.MULTILINE)
_MOST_DEPTH = 5  # of emails within emails
_MOST_NAMED = 5  # attachments


class _Bounded(email.message.Message):
    """Refuses fields whose parsing takes the square of their length."""

    def set_raw(self, name: str, value: str) -> None:
        if len(value) > _MOST_FIELD and name.lower().startswith("content-"):
            raise Refusal(f"it is broken: a field {name} of {len(value):,} characters")
        super().set_raw(name, value)


class _Parts:
    """Makes the messages that a parser asks for."""

    def __init__(self) -> None:
        self._made = 0

    def __call__(self, policy: Any = None) -> _Bounded:
        self._made += 1
        if self._made > _MOST_PARTS:
            raise Refusal(f"it has more than {_MOST_PARTS:,} parts")
        return _Bounded(policy=policy)


@dataclass
class Mail:
    """The text; and the bodies in HTML, each to replace `marker(index)` in it once it is converted."""

    text: str = ""
    html: list[str] = field(default_factory=list)
    attachments: list[str] = field(default_factory=list)  # names, or types


def marker(index: int) -> str:
    return f"\0html {index}\0"  # no text holds a NUL, see `_printable`


def mail_text(raw: bytes) -> Mail:
    """Raises Refusal."""
    mail = Mail()
    try:
        check_nesting(raw)
        message = email.parser.BytesParser(_Parts(), policy=email.policy.compat32).parsebytes(raw)
        mail.text = "\n".join(_parts(message, mail, 0)).strip() + "\n"
    except (RecursionError, MemoryError):
        raise Refusal("it is broken: parts within parts without end") from None
    except (ValueError, LookupError, TypeError, AttributeError, IndexError, AssertionError) as error:
        raise Refusal(f"it is broken: {' '.join(str(error).split())[:200] or type(error).__name__}") from None
    return mail


def check_nesting(raw: bytes) -> None:
    """Raises Refusal for too many kinds of boundaries: each line is compared with those of all parts around it."""
    if sum(1 for _ in _BOUNDARY.finditer(raw)) > _MOST_BOUNDARIES:
        raise Refusal(f"it has more than {_MOST_BOUNDARIES:,} parts that hold parts")


def attached(names: list[str]) -> str:
    """What is attached, in words."""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"{len(names)} attachment{'s' * (len(names) != 1)} ({', '.join(names[:_MOST_NAMED])}{more})"


def _parts(message: email.message.Message, mail: Mail, depth: int) -> list[str]:
    lines = [f"{name}: {value}" for name in _FIELDS if (value := _field(message, name))]
    return [*lines, "", *_body(message, mail, depth)]


def _field(message: email.message.Message, name: str) -> str:
    values = message.get_all(name, [])
    found = []
    for value in values:
        try:
            text = str(make_header(decode_header(value)))
        except (ValueError, LookupError, email.errors.HeaderParseError):
            text = str(value)
        found.append(" ".join(_printable(text).split()))
    return ", ".join(found)


def _body(part: email.message.Message, mail: Mail, depth: int) -> list[str]:
    """The lines of a part and of what is in it; of alternatives, the plain text."""
    kind, name = part.get_content_type(), part.get_filename()
    below: Any = part.get_payload()
    if kind == "message/rfc822" and isinstance(below, list):
        if depth >= _MOST_DEPTH:
            mail.attachments.append("an email within emails")
            return []
        return ["", "-----", *(line for each in below for line in _parts(each, mail, depth + 1))]
    if isinstance(below, list):
        chosen = below
        if kind == "multipart/alternative":
            readable = [each for each in below if each.get_content_type() == "text/plain" and _content(each).strip()]
            chosen = readable[:1] or [each for each in below if each.get_content_maintype() != "application"][-1:]
        return [line for each in chosen for line in _body(each, mail, depth)]
    if part.get_content_disposition() == "attachment" or kind not in ("text/plain", "text/html") or name:
        if part.get_content_maintype() != "multipart":
            mail.attachments.append(" ".join(_printable(_decoded(name) if name else kind).split())[:100])
        return []
    text = _content(part)
    if kind == "text/html":
        mail.html.append(text)
        return [marker(len(mail.html) - 1)]
    return [text]


def _decoded(name: str) -> str:
    try:
        return str(make_header(decode_header(name)))
    except (ValueError, LookupError, email.errors.HeaderParseError):
        return name


def _content(part: email.message.Message) -> str:
    raw = part.get_payload(decode=True)
    if not isinstance(raw, bytes):
        return ""
    for name in (part.get_content_charset(), "utf-8"):
        try:
            return _printable(raw.decode(str(name)))
        except (LookupError, ValueError):
            continue
    return _printable(raw.decode("latin-1"))


def _printable(text: str) -> str:
    return text.replace("\0", "").replace("\r\n", "\n").encode("utf-8", "replace").decode()
