"""What the confined process for office documents does: looks into archives, reads workbooks and emails.

Converting all else is pandoc's, in a process of its own (`l4ctx.documents.office.convert`).
"""

from __future__ import annotations

import codecs
import importlib
import json
from contextlib import suppress
from typing import Any

from l4ctx.confinement.work import Last, Receive, Refusal, Send, Work
from l4ctx.documents.office.archive import Archive, look
from l4ctx.documents.office.bounds import bounded_page, check_rich_text
from l4ctx.documents.office.mail import mail_text
from l4ctx.documents.office.rich_text import CODECS, in_unicode
from l4ctx.documents.office.sheets import load_library, sheets_text
from l4ctx.machine.memory import give_back_free_memory

_IMPORTED_LATE = ("bz2", "lzma", "zlib", "quopri", "encodings.idna", "encodings.raw_unicode_escape")
_CODECS = ("gb2312", "gb18030", "shift_jis", "euc_jp", "iso2022_jp", "euc_kr", "koi8_r", "koi8_u", "cp437", "cp850",
           *(f"iso8859_{part}" for part in range(1, 17) if part != 12))  # fmt: skip


def work() -> Work:
    for name in _IMPORTED_LATE:
        importlib.import_module(name)
    with suppress(ImportError):  # then there is no request for it
        load_library()
    for name in (*CODECS, *_CODECS):
        codecs.lookup(name)  # imports it
    mail_text(b"MIME-Version: 1.0\nSubject: =?utf-8?b?w6Q=?=\nContent-Type: text/plain; charset=utf-8\n\nx")
    return Work(_serve)


def _serve(request: dict[str, Any], receive: Receive, send: Send) -> Last:
    raw = receive()
    try:
        return {"look": _look, "sheets": _sheets, "mail": _mail, "recode": _recode, "page": _page}[request["do"]](raw)
    except MemoryError:
        raise Refusal("it needs too much memory") from None
    finally:
        give_back_free_memory()


def _look(raw: bytes) -> Last:
    facts = look(Archive(raw))
    found = {"format": facts.format, "losses": facts.losses, "elements": facts.elements}
    return found, json.dumps([facts.body, facts.notes]).encode()


def _sheets(raw: bytes) -> Last:
    losses = look(Archive(raw)).losses
    text, notes = sheets_text(raw)
    return {"losses": losses, "notes": notes}, text.encode("utf-8", "replace")


def _mail(raw: bytes) -> Last:
    mail = mail_text(raw)
    return {"attachments": mail.attachments}, json.dumps([mail.text, mail.html]).encode()


def _recode(raw: bytes) -> Last:
    check_rich_text(raw)
    return {}, in_unicode(raw)


def _page(raw: bytes) -> Last:
    return {}, bounded_page(raw)[0]
