"""What shells are told of commands and options as they complete them: the help as it is, each on one line.

typer takes square brackets for rich's markup, drops what is in them, and breaks lines at 80 columns; fish then offers
each of these lines as something to complete.
"""

from __future__ import annotations

import os
from typing import Any

ASKED = "_L4CTX_COMPLETE"
"""The variable by which the shell's script asks."""


def keep_descriptions() -> None:
    """In a process that a shell asks for completions."""
    if ASKED not in os.environ:
        return
    from typer import _completion_classes

    module: Any = _completion_classes
    module._sanitize_help_text = lambda text: " ".join(text.split())
