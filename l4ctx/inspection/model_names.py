"""Models by name: a short one that a person has chosen, or a repository in the hub's download cache. Never online."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from l4ctx.errors import UsageError
from l4ctx.formatting import printable
from l4ctx.inspection.model_folder import REPOSITORY, snapshots_of
from l4ctx.machine.places import hub_cache

_PREFIX = "models--"


def meant_model(text: str, models: Mapping[str, str]) -> Path:
    """The checkpoint that is meant: what is there under that path comes first, then `models`, places by short name,
    then repositories in the hub's cache: by their name, or by a part of it that only one of them has.

    What is none of these is returned as it is. Raises UsageError for a name that means several repositories.
    """
    if not text or os.path.lexists(text):
        return Path(text)
    if text in models:
        place = os.path.expanduser(models[text])
        return Path(place) if os.path.lexists(place) else _in_the_cache(place) or Path(place)
    return _in_the_cache(text) or _by_part(text) or Path(text)


def shown_name(path: Path) -> str:
    """A folder's name, or that of the repository whose snapshot it is."""
    parts = path.absolute().parts
    return parts[-3].removeprefix(_PREFIX).replace("--", "/", 1) if "snapshots" in parts[-2:-1] else parts[-1]


def cached_models() -> dict[str, Path]:
    """The newest snapshot of every repository in the hub's cache that has a checkpoint, by the repository's name."""
    try:
        names = sorted(name for name in os.listdir(hub_cache()) if name.startswith(_PREFIX))
    except OSError:
        return {}
    found = {name.removeprefix(_PREFIX).replace("--", "/", 1): snapshots_of(hub_cache() / name) for name in names}
    return {name: snapshots[0] for name, snapshots in found.items() if snapshots}


def _in_the_cache(name: str) -> Path | None:
    repository = REPOSITORY.fullmatch(name)
    if repository is None:
        return None
    snapshots = snapshots_of(hub_cache() / f"{_PREFIX}{repository[1].replace('/', '--')}")
    return snapshots[0] if snapshots else None


def _by_part(text: str) -> Path | None:
    if "/" in text or not text[:1].isalnum():
        return None
    found = {name: place for name, place in cached_models().items() if text.casefold() in name.casefold()}
    if len(found) > 1:
        names = ", ".join(map(printable, list(found)[:4]))
        raise UsageError(f"--model {printable(text)}: there are several in the hub's cache: {names}; give one of these")
    return next(iter(found.values()), None)
