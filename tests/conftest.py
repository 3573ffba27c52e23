"""Fixtures shared by several test files."""

from __future__ import annotations

import functools
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from support import torchvision_oracle

if TYPE_CHECKING:
    from support.toy_checkpoints import Toy, Toys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # toy shapes: more threads only slow each other down
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):  # every process that tests start would compile all sources again
    sys.dont_write_bytecode = False
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's & ignores it, and our processes inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
torchvision_oracle.prepare()  # before anything imports transformers, which imports torchvision if installed


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    """Toy checkpoints by name and standard deviation of the weights, each written only once."""
    import transformers  # imported here, so that tests without a model need neither this nor torch

    from support.toy_checkpoints import write_toy

    transformers.logging.set_verbosity_error()  # it warns about low_freq == high_freq, which Scout's own files have
    transformers.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("toys")

    @functools.cache
    def toy(name: str, std: float) -> Toy:
        return write_toy(root / f"{name}-{std}", name, std)

    return toy


@pytest.fixture(scope="module")
def small_rows() -> Iterator[None]:
    """Makes blocks small, so that toy contexts have several rows of them, and disables fsync.

    test_context_kill.py checks that fsync is called.
    """
    from cache import layout as store_layout

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_layout, "MIN_BLOCK_BYTES", 3 * 2**18)
        patch.setattr(store_layout, "MIN_SEGMENT_BYTES", 1)
        patch.setattr(store_layout, "MIN_SEGMENT_TOKENS", 1)
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the matmul backend's blocks so small that toys have several, including partial ones."""
    from model.kernels import matmul as matmul_module

    sizes = {"KEY_BLOCK": 6, "QUERY_BLOCK": 5, "DIAGONAL": 3, "FEWEST_QUERIES": 1, "SAMPLED_KEYS": 2}
    for name, value in sizes.items():
        monkeypatch.setattr(matmul_module, name, value)


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps the program, and processes that tests start, from what the user has set and what it remembers of them."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for variable, folder in (("XDG_CONFIG_HOME", "config"), ("XDG_STATE_HOME", "state")):
            patch.setenv(variable, str(home / folder))
        for variable in [name for name in os.environ if name.startswith("L4CTX_") and "FUZZ" not in name]:
            patch.delenv(variable)
        yield


@pytest.fixture(scope="session", autouse=True)
def _plain_processor() -> Iterator[None]:
    """Makes defaults independent of the machine that the tests run on: float32 and sdpa."""
    from l4ctx.machine import processor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processor, "processor_flags", lambda: frozenset[str]())
        patch.setattr(processor, "newest_instructions", lambda: "")
        patch.setattr(processor, "processor_vendor", lambda: "")
        patch.setattr(processor, "usable_cores", lambda: 2)
        yield


@pytest.fixture(scope="session", autouse=True)
def _importable_torchvision(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Does what `torchvision_oracle.prepare` does, for processes that tests start: the benchmark's peers."""
    if importlib.util.find_spec("torchvision") is None:
        yield
        return
    folder = tmp_path_factory.mktemp("site")
    torchvision_oracle.prepare_processes(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield
