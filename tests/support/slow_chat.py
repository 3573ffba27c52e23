"""The program on a terminal; every forward takes a while as long as there is a file `slow` in the current folder."""

from __future__ import annotations

import fcntl
import os
import signal
import termios
import time
from contextlib import suppress
from typing import Any

from l4ctx.cli.app import main
from model.transformer import Transformer

SECONDS = 0.3
forward = Transformer.forward


def slow(*arguments: Any, **options: Any) -> Any:
    if os.path.exists("slow"):
        time.sleep(SECONDS)
    return forward(*arguments, **options)


with suppress(OSError):  # it is ours already
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
Transformer.forward = slow
main()
