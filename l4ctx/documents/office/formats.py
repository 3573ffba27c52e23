"""Which texts are emails, web pages or rich text; zipped formats are told by `l4ctx.documents.recognition`."""

from __future__ import annotations

import re

_FIELD = re.compile(rb"[!-9;-~]{1,80}:[^\n]*\n(?:[ \t][^\n]*\n)*")
_FIRST = re.compile(rb"[!-9;-~]{1,80}:")
_REQUIRED = re.compile(rb"^MIME-Version:|^Message-ID:|^Received:", re.IGNORECASE | re.MULTILINE)
_USUAL = re.compile(rb"^(?:From|Date|Subject|To):", re.IGNORECASE | re.MULTILINE)
_HTML = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]{0,200}>\s*)?(?:<!--.{0,2000}?-->\s*)*<(?:!doctype\s+html|html|head|body)\b",
    re.IGNORECASE | re.DOTALL,
)
_CHARSET = re.compile(
    rb"<(?:meta|\?xml)[^>]{0,200}?(?:charset|encoding)\s*=\s*[\"']?([A-Za-z0-9_-]{1,40})", re.IGNORECASE
)


def is_email(sample: bytes) -> bool:
    """Whether this text begins with the header of an email as it was sent: fields that a person would not write."""
    if _FIRST.match(sample) is None:  # as with most texts
        return False
    head = sample[: 1 << 14].replace(b"\r\n", b"\n")
    end = 0
    while (found := _FIELD.match(head, end)) is not None:
        end = found.end()
    fields = head[:end]
    at_end = head[end : end + 1] in (b"\n", b"") or end >= len(head) - 1000
    return bool(at_end and _REQUIRED.search(fields) and len(set(_USUAL.findall(fields.lower()))) >= 2)


def is_html(sample: bytes) -> bool:
    return _HTML.match(sample) is not None


def html_encoding(raw: bytes) -> str | None:
    """The encoding that a page declares, if any."""
    found = _CHARSET.search(raw[:4096])
    return None if found is None else found.group(1).decode()
