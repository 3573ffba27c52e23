"""`python -m l4ctx`: the command line without its script on PATH."""

from __future__ import annotations

import os
import sys

if sys.path and sys.path[0] == os.getcwd() and not os.path.samefile(os.path.dirname(os.path.dirname(__file__)), "."):
    del sys.path[0]  # -m prepends the current folder, and somebody's model.py there must not be executed

from l4ctx.cli.app import main

if __name__ == "__main__":
    main()
