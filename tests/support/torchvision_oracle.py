"""Makes torchvision's Python parts importable where its native library does not fit the torch that is installed.

`transformers`' image processor, our oracle, resizes and pads with those parts alone. Without this, a CUDA build of
torchvision beside a CPU build of torch fails on import, and with it every import of a Llama 4 class.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

# What torchvision's Python parts register something for, whether or not the native library could be loaded.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[object] = []  # a schema lives as long as the library object that declared it


class _BeforeTorchvision(MetaPathFinder):
    """Finds nothing itself: just before torchvision is imported for the first time, it sees to the operators."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            declare_missing_operators()
        return None


def prepare() -> None:
    """Let torchvision be imported from now on, by whomever; costs nothing where nobody does."""
    if "torchvision" not in sys.modules and not any(isinstance(each, _BeforeTorchvision) for each in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorchvision())


def prepare_processes(folder: Path) -> None:
    """Write to `folder` what does the same in every Python process that has `folder` in its PYTHONPATH."""
    here = str(Path(__file__).resolve().parent)
    (folder / "sitecustomize.py").write_text(
        f"import sys\nsys.path.insert(0, {here!r})\nimport torchvision_oracle\nsys.path.remove({here!r})\n"
        "torchvision_oracle.prepare()\n",
        encoding="utf-8",
    )


def declare_missing_operators() -> None:
    """Declare the operators that the native library would have brought, if it cannot be loaded. Imports torch."""
    import torch

    spec = PathFinder.find_spec("torchvision")
    if spec is None or spec.origin is None or _declared:
        return
    for library in Path(spec.origin).parent.glob("_C*"):
        try:
            torch.ops.load_library(library)
        except OSError:
            continue  # another build of torch is what it wants
        return
    fragment = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        fragment.define(schema)
    _declared.append(fragment)
