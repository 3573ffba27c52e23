"""A confined process: serves one kind of work, one request after another on its standard input.

Anything may end it at any moment; its parent says so (`l4ctx.confinement.process`). Started by that module alone.
"""

from __future__ import annotations

import codecs
import importlib
import json
import os
import select
import threading
import time
from contextlib import suppress
from typing import Any, BinaryIO

from l4ctx.confinement.sandbox import confine, limit_memory, limit_processor_time
from l4ctx.confinement.work import FRAME, Refusal, Work, packed

_MOST_REASON = 2000  # characters
_CODECS = ("utf-8", "ascii", "latin-1", "utf-16-le", "utf-16-be", "utf-16", "utf-32", "unicode-escape")


def main(module: str) -> None:
    """Serves until standard input ends; then exits at once, even within a request."""
    requests, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1):  # a line that a library prints must not come between replies
        os.dup2(nothing, standard)
    os.close(nothing)
    with open(requests, "rb") as source, open(replies, "wb") as target:

        def send(header: dict[str, Any], body: bytes | bytearray = b"") -> None:
            target.write(packed(header, len(body)))
            target.write(body)
            target.flush()

        try:
            work: Work = importlib.import_module(module).work()
        except ImportError:
            send({"missing": True})
            return
        except OSError as error:  # a library does not suit this machine
            send({"error": " ".join(str(error).split())})
            return
        _read_what_is_read_late()
        held = confine(work.readable, then=lambda: _end_with_parent(requests))
        send({"ready": True, "held": held})
        while _serve(work, source, send):
            _wait(work, source)


def _read_what_is_read_late() -> None:
    """While files can be opened: the time zone, and the modules of codecs, which are imported when first used."""
    if hasattr(time, "tzset"):
        time.tzset()
    for codec in _CODECS:
        codecs.lookup(codec)


def _end_with_parent(requests: int) -> None:
    """Ends this process when nobody can write requests any more: its parent ended, maybe within a request."""
    if not hasattr(select, "poll"):
        return
    hangup = select.poll()
    hangup.register(requests, 0)

    def wait() -> None:
        hangup.poll()
        os._exit(0)

    with suppress(RuntimeError):  # no thread to be had: then it ends after the request
        threading.Thread(target=wait, name="hangup", daemon=True).start()


def _serve(work: Work, source: BinaryIO, send: Any) -> bool:
    """One request; its last reply says so. False where there is none."""
    frame = source.read(FRAME.size)
    if len(frame) < FRAME.size:
        return False
    header_bytes, body_bytes = FRAME.unpack(frame)
    request = json.loads(source.read(header_bytes))
    limit_memory(request["memory"])
    seconds = request["processor_seconds"]
    limit_processor_time(seconds)

    def receive() -> bytes:
        send({"wanted": True})
        body = source.read(body_bytes)
        send({"received": True})
        return body

    def reply(header: dict[str, Any], body: bytes | bytearray = b"") -> None:
        send(header, body)
        limit_processor_time(seconds)  # anew: they are for what leads to one reply

    try:
        last, body = work.serve(request, receive, reply)
    except Refusal as error:
        last, body = {"error": str(error)[:_MOST_REASON]}, b""
    send(last | {"last": True, "kept": work.kept()}, body)
    return True


def _wait(work: Work, source: BinaryIO) -> None:
    """For the next request; where that takes long, the work rests."""
    if work.rest_after is None or not hasattr(select, "poll"):
        return
    coming = select.poll()
    coming.register(source, select.POLLIN)
    if not coming.poll(1000 * work.rest_after):
        work.rest()
