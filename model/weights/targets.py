"""Which of a configuration's groups of settings a module belongs to: names, patterns and classes, in two spellings.

The tensors themselves say how they are stored; this is asked only for what they cannot say.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from model.weights.settings import compiled
from model.weights.sources import Group

_PATTERN = "re:"


def weights_settings(group: Group) -> Mapping[str, Any]:
    """What the configuration says of this module's weights: num_bits, strategy, ...; empty if it says nothing.

    Groups are asked in their order, the most specific kind of target first, as compressed-tensors does. Raises
    CheckpointError for patterns that are not read.
    """
    module = module_name(group)
    if matches(module, group.settings.get("ignore")) is not None:
        return {}
    found: tuple[int, Mapping[str, Any]] | None = None
    groups = group.settings.get("config_groups")
    for settings in groups.values() if isinstance(groups, Mapping) else ():
        if not isinstance(settings, Mapping):
            continue
        kind = matches(module, settings.get("targets"))
        if kind is not None and (found is None or kind < found[0]):
            weights = settings.get("weights")
            found = kind, weights if isinstance(weights, Mapping) else {}
    return {} if found is None else found[1]


def matches(module: str, targets: object) -> int | None:
    """0 if the module of linear weights is named in `targets`, 1 by a pattern, 2 by its class; None if not at all.

    Patterns are regular expressions after `re:`, which hold from the start (compressed-tensors), or have * for any
    characters (modelopt). Raises CheckpointError.
    """
    names = [target for target in targets if isinstance(target, str)] if isinstance(targets, Iterable) else []
    if module in names:
        return 0
    for name in names:
        if name.startswith(_PATTERN):
            if compiled(name.removeprefix(_PATTERN)).match(module):
                return 1
        elif "*" in name and fnmatch.fnmatchcase(module, name):
            return 1
    return 2 if "Linear" in names else None


def module_name(group: Group) -> str:
    """The module's name in the file, which the configuration's names refer to."""
    suffix, tensor = next(iter(group.tensors.items()))
    return tensor.name.removesuffix(suffix)
