"""Where this program's own files lie: the folders of the XDG base directory specification.

https://specifications.freedesktop.org/basedir-spec/latest/
"""

from __future__ import annotations

import os
from pathlib import Path

NAME = "l4ctx"


def config_file() -> Path:
    """What a person has set, as a rule ~/.config/l4ctx/config.toml."""
    return _base("XDG_CONFIG_HOME", ".config") / NAME / "config.toml"


def state_folder() -> Path:
    """What the program remembers, as a rule ~/.local/state/l4ctx."""
    return _base("XDG_STATE_HOME", ".local/state") / NAME


def hub_cache() -> Path:
    """The folder of the hub library's download cache."""
    if (folder := os.environ.get("HF_HUB_CACHE")) is not None:
        return Path(folder)
    home = os.environ.get("HF_HOME")
    return (_base("XDG_CACHE_HOME", ".cache") / "huggingface" if not home else Path(home)) / "hub"


def _base(variable: str, otherwise: str) -> Path:
    """The specification has relative paths ignored."""
    folder = os.environ.get(variable, "")
    return Path(folder) if os.path.isabs(folder) else Path(os.path.expanduser("~")) / otherwise
