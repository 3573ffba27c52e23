"""Models by name: from the settings and from the hub's cache, never by asking anyone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from l4ctx.errors import UsageError
from l4ctx.inspection.model_names import cached_models, meant_model
from support.cli_runner import TINY, check_refused, run_here, text_file

SCOUT, MAVERICK = "meta-llama/Llama-4-Scout-17B-16E-Instruct", "meta-llama/Llama-4-Maverick-17B-128E-Instruct"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("L4CTX_MODEL", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


def cached(name: str, revision: str = "main") -> Path:
    """A repository as the hub's library lays it down: links to blobs, and the revision that a branch has."""
    root = Path("hub").absolute() / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / revision
    for file in TINY.iterdir():
        if file.is_file():
            snapshot.mkdir(parents=True, exist_ok=True)
            (snapshot / file.name).symlink_to(file)
    text_file(root / "refs" / "main", "main\n")
    return snapshot


def test_names_of_the_settings_and_of_the_cache() -> None:
    scout = cached(SCOUT)
    models = {"big": "/data/big", "s": SCOUT, "home": "~/models", "gone": "somebody/else"}
    assert meant_model(SCOUT, {}) == meant_model("scout", {}) == meant_model("Scout-17B", {}) == scout
    assert meant_model("s", models) == scout
    assert meant_model("big", models) == Path("/data/big")
    assert meant_model("home", models) == Path.home() / "models"
    assert meant_model("gone", models) == Path("somebody/else")
    for text in ("", "nowhere", "no/where", "../scout", "-scout", "x" * 300, "a\0b", MAVERICK):
        assert meant_model(text, models) == Path(text)
    assert cached_models() == {SCOUT: scout}


def test_what_is_there_comes_first() -> None:
    cached(SCOUT)
    Path("scout").mkdir()
    Path("big").symlink_to("nothing")
    assert meant_model("scout", {"scout": "/data"}) == Path("scout")
    assert meant_model("big", {"big": "/data"}) == Path("big")


def test_a_name_of_several_is_refused() -> None:
    cached(SCOUT)
    cached(MAVERICK)
    with pytest.raises(UsageError, match=f"several in the hub's cache: {MAVERICK}, {SCOUT}; give one"):
        meant_model("llama-4", {})
    assert meant_model("maverick", {}).parent.parent.name.endswith("Maverick-17B-128E-Instruct")


def test_an_unfinished_download_is_none() -> None:
    text_file(Path("hub/models--a--b/snapshots/x/README.md"), "")
    text_file(Path("hub/models--broken"), "")
    assert cached_models() == {} and meant_model("a/b", {}) == Path("a/b")


def test_commands_take_names() -> None:
    snapshot = cached(SCOUT)
    text_file(Path("config/l4ctx/config.toml"), f'model = "mine"\n[models]\nmine = "{TINY}"\n')
    for given in ((), ("-m", "mine"), ("-m", "scout"), ("--model", SCOUT)):
        result = run_here("plan", "--tokens", "5000", "--json", *given)
        assert result.code == 0 and json.loads(result.stdout)["fits"], result
    assert json.loads(run_here("inspect", "scout", "--json").stdout)["path"] == str(snapshot)
    check_refused(
        run_here("plan", "--tokens", "5", "-m", MAVERICK),
        3,
        f"no such repository in the hub's cache; to download it: hf download {MAVERICK}",
    )
