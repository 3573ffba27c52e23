"""The usual options that a person has set in a file: read, checked, and given to the commands as their defaults.

An option on the command line comes first, then an environment variable, L4CTX_ with the option's name, then the file.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from l4ctx.cli.usage import plain_message
from l4ctx.errors import UsageError
from l4ctx.formatting import printable
from l4ctx.machine.places import config_file

LARGEST_FILE = 2**20
TEXT, NUMBER, SWITCH = (str,), (int, float), (bool,)
KINDS: dict[str, tuple[type, ...]] = {
    "model": TEXT,
    "device": TEXT,
    "dtype": TEXT,
    "attention": TEXT,
    "quantize": TEXT,
    "weights-memory": (str, int),
    "weights-device-memory": (str, int),
    "kv-dtype": TEXT,
    "kv-dir": TEXT,
    "kv-host-memory": (str, int),
    "kv-device-memory": (str, int),
    "prefill-chunk-size": (str, int),
    "max-new-tokens": (str, int),
    "sample": SWITCH,
    "temperature": NUMBER,
    "top-p": NUMBER,
    "top-k": (int,),
    "draft-tokens": (int,),
    "loop-guard": SWITCH,
    "skip-unreadable": SWITCH,
    "plain": SWITCH,
    "stats": SWITCH,
    "memory-report": SWITCH,
    "quiet": SWITCH,
    "log": SWITCH,
    "log-file": TEXT,
}
"""Options that can be set, with the types that TOML has for them. None of them says what is read or written where."""

PATHS = ("model", "kv-dir", "log-file")
"""In these, ~ stands for the home folder."""

OF_THIS_MACHINE = ("device", "weights-memory")
"""Left out of a plan for GPUs that need not be here."""

_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Settings:
    """What the file says: `options` by their names without dashes in front, and `models` by short name."""

    file: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)


def variable(option: str) -> str:
    """The environment variable of an option, such as L4CTX_KV_DTYPE."""
    return f"L4CTX_{option.upper().replace('-', '_')}"


def read_settings() -> Settings:
    """Empty without a file. Raises UsageError for what is no TOML, unknown keys and wrong types."""
    file = config_file()
    try:
        with file.open("rb") as stream:
            content = tomllib.loads(stream.read(LARGEST_FILE).decode("utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        return Settings(file)
    except OSError as error:
        raise UsageError(f"{printable(str(file))}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{printable(str(file))}: no TOML: {error}") from None
    models = content.pop("models", {})
    if not isinstance(models, dict):
        raise _wrong(file, "models", 'a table, as in [models] and scout = "/path"')
    for name, place in models.items():
        if not isinstance(place, str) or not place:
            raise _wrong(file, f"models.{name}", "a text: a folder, a GGUF file or a repository's name")
    for name, value in content.items():
        _check_kind(file, name, value)
    return Settings(file, content, models)


def _check_kind(file: Path, name: str, value: Any) -> None:
    if name not in KINDS:
        import difflib

        near = difflib.get_close_matches(name.replace("_", "-"), KINDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "l4ctx config show lists what can be set"
        raise UsageError(f"{printable(str(file))}: {printable(name)}: no such option; {hint}")
    if type(value) not in KINDS[name]:
        raise _wrong(file, name, " or ".join(_WORDS[kind] for kind in KINDS[name]))


def _wrong(file: Path, name: str, expected: str) -> UsageError:
    return UsageError(f"{printable(str(file))}: {printable(name)}: expected {expected}")


def defaults_of(settings: Settings, commands: Mapping[str, Any], context: Any) -> dict[str, dict[str, Any]]:
    """Defaults by command and parameter, as the parser of arguments takes them. Raises UsageError for a wrong value."""
    found: dict[str, dict[str, Any]] = {name: {} for name in commands}
    for option, value in settings.options.items():
        given = value if isinstance(value, bool) else _expanded(option, str(value))
        for name, command in commands.items():
            for parameter in command.params:
                if f"--{option}" in parameter.opts:
                    _check_value(settings.file, option, parameter, given, context)
                    found[name][parameter.name] = given
    return found


def _check_value(file: Path, option: str, parameter: Any, value: Any, context: Any) -> None:
    """Raises UsageError where the option's own parser refuses the value."""
    import typer

    try:
        parameter.process_value(context, value)
    except typer.BadParameter as error:
        message = plain_message(f"--{option}: {error.message}").removeprefix("--")
        raise UsageError(f"{printable(str(file))}: {message}") from None


def _expanded(option: str, text: str) -> str:
    return os.path.expanduser(text) if option in PATHS else text
