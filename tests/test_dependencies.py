"""The versions that pyproject.toml allows, checked against its list of advisories and the pins of constraints.txt."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from support.places import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
GROUPS = {"": PROJECT["project"]["dependencies"], **PROJECT["project"]["optional-dependencies"]}
REQUIREMENTS = [(group, Requirement(text)) for group, texts in GROUPS.items() for text in texts]
ADVISORIES = PROJECT["tool"]["l4ctx"]["advisories"]
PINNED = {
    canonicalize_name(requirement.name): requirement
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
    for requirement in [Requirement(line)]
}


def minimum(requirement: Requirement) -> Version:
    """The lowest allowed version."""
    bounds = [Version(bound.version) for bound in requirement.specifier if bound.operator in (">=", "==", "~=")]
    assert bounds, f"{requirement} allows every version that there ever was"
    return max(bounds)


def pinned(name: str) -> Version:
    (specifier,) = PINNED[canonicalize_name(name)].specifier
    assert specifier.operator == "=="
    return Version(specifier.version)


@pytest.mark.parametrize("advisory", ADVISORIES, ids=lambda advisory: advisory["id"])
def test_no_version_before_a_fix_is_allowed(advisory: dict[str, str]) -> None:
    """If this fails, raise the minimum in pyproject.toml."""
    assert advisory.keys() == {"package", "fixed", "id", "what"} and re.match(r"(CVE|GHSA|PYSEC)-", advisory["id"])
    fixed, name = Version(advisory["fixed"]), canonicalize_name(advisory["package"])
    concerned = [(group, each) for group, each in REQUIREMENTS if canonicalize_name(each.name) == name]
    assert concerned, f"{name} is not required any more: take {advisory['id']} off the list"
    for group, requirement in concerned:
        assert minimum(requirement) >= fixed, f"{group}: {requirement} allows versions with {advisory['id']}"
    assert pinned(name) >= fixed


@pytest.mark.parametrize(("group", "requirement"), REQUIREMENTS, ids=str)
def test_what_is_tested_is_what_is_allowed(group: str, requirement: Requirement) -> None:
    assert minimum(requirement) <= pinned(requirement.name)
    assert pinned(requirement.name) in requirement.specifier, f"{group}: constraints.txt pins another {requirement}"


def test_an_exemption_holds_and_has_its_reason() -> None:
    """Exempt is only what the program does not do: it loads no pickles."""
    for advisory in PROJECT["tool"]["l4ctx"]["not_affected"]:
        assert advisory.keys() == {"package", "fixed", "id", "why"} and advisory["why"]
    sources = [file for package in ("l4ctx", "cache", "model") for file in (ROOT / package).rglob("*.py")]
    assert len(sources) > 50
    for file in sources:
        assert not re.search(r"torch\.load\(|import pickle|pickle\.load", file.read_text(encoding="utf-8")), file
