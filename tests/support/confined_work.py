"""Work for a confined process that attempts what it must not be able to do."""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import threading
import time
from typing import Any

from l4ctx.confinement.work import Last, Receive, Refusal, Send, Work

READABLE: tuple[str, ...] = ()


def work() -> Work:
    return Work(serve, readable=READABLE)


def serve(request: dict[str, Any], receive: Receive, send: Send) -> Last:
    body = receive()
    name, argument = request["do"], request.get("argument")
    if name == "refuse":
        raise Refusal("no " * 10_000)
    if name == "echo":
        send({"first": True})
        return {"environment": dict(os.environ), "path": sys.path}, body
    try:
        return {"done": ATTEMPTS[name](argument)}, b""
    except (OSError, RuntimeError, ImportError) as error:
        return {"refused": type(error).__name__}, b""


def read(path: str) -> str:
    with open(path) as file:
        return file.read()[:20]


def append(path: str) -> None:
    with open(path, "a") as file:
        file.write("x")


def connect(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass


def fork(_: object) -> None:
    if os.fork() == 0:
        os._exit(0)


def execute(path: str) -> None:
    os.execve(path, [path], {})


def thread(_: object) -> None:
    threading.Thread(target=int).start()


def descriptors(_: object) -> None:
    for _ in range(100):
        os.dup(1)


def burn(_: object) -> None:
    while True:
        pass


def system(command: str) -> None:
    if (code := ctypes.CDLL(None).system(command.encode())) != 0:
        raise OSError(code)


ATTEMPTS: dict[str, Any] = {
    "read": read,
    "append": append,
    "list": os.listdir,
    "remove": os.remove,
    "socket": lambda _: socket.socket().close(),
    "connect": connect,
    "fork": fork,
    "execute": execute,
    "system": system,
    "thread": thread,
    "kill": lambda pid: os.kill(pid, 0),
    "descriptors": descriptors,
    "import": __import__,
    "burn": burn,
    "sleep": time.sleep,
    "allocate": lambda count: len(bytearray(count)),
    "say": lambda count: "x" * count,
    "exit": os._exit,
}
