"""Fixtures shared by several test files."""

from __future__ import annotations

import functools
import importlib.util
import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from support import torchvision_oracle

if TYPE_CHECKING:
    from support.toy_checkpoints import Toy, Toys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # toy shapes: further threads only get in each other's way
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's & leaves it ignored, in our processes, too
    signal.signal(signal.SIGINT, signal.default_int_handler)
torchvision_oracle.prepare()  # before anything imports transformers, which imports torchvision where it is installed


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    """Toy checkpoints by name and standard deviation of the weights, each written once."""
    import transformers  # here, so that tests without a model import neither this nor torch

    from support.toy_checkpoints import write_toy

    transformers.logging.set_verbosity_error()  # it warns of what Scout's own files hold: low_freq == high_freq
    transformers.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("toys")

    @functools.cache
    def toy(name: str, std: float) -> Toy:
        return write_toy(root / f"{name}-{std}", name, std)

    return toy


@pytest.fixture(scope="module")
def small_rows() -> Iterator[None]:
    """Contexts of toys have several rows of blocks, and do not wait for the disk: that fsync is called is the matter of
    test_context_kill.py."""
    from cache import layout as store_layout

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_layout, "MIN_BLOCK_BYTES", 3 * 2**18)
        patch.setattr(store_layout, "MIN_SEGMENT_BYTES", 1)
        patch.setattr(store_layout, "MIN_SEGMENT_TOKENS", 1)
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of attention by matrix products so small that toys have several, with edges."""
    from model.kernels import matmul as matmul_module

    sizes = {"KEY_BLOCK": 6, "QUERY_BLOCK": 5, "DIAGONAL": 3, "FEWEST_QUERIES": 1, "SAMPLED_KEYS": 2}
    for name, value in sizes.items():
        monkeypatch.setattr(matmul_module, name, value)


@pytest.fixture(scope="session", autouse=True)
def _plain_processor() -> Iterator[None]:
    """Defaults do not depend on the machine that the tests run on: computing is in float32, attention is sdpa."""
    from l4ctx.machine import processor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processor, "processor_flags", lambda: frozenset[str]())
        patch.setattr(processor, "newest_instructions", lambda: "")
        yield


@pytest.fixture(scope="session", autouse=True)
def _importable_torchvision(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What `torchvision_oracle.prepare` does here, in the processes that tests start too: the benchmark's peers."""
    if importlib.util.find_spec("torchvision") is None:
        yield
        return
    folder = tmp_path_factory.mktemp("site")
    torchvision_oracle.prepare_processes(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield
