"""Makes torchvision's Python parts importable if its native library does not match the installed torch.

Our oracle, the image processor of `transformers`, resizes and pads with those parts only. Without this, a CUDA build of
torchvision with a CPU build of torch fails on import, and so does every import of a Llama 4 class.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

# Operators for which torchvision's Python parts register kernels, even if the native library could not be loaded.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[object] = []  # a schema lives as long as the library object that declared it


class _BeforeTorchvision(MetaPathFinder):
    """Finds no modules; declares the missing operators just before torchvision is first imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            declare_missing_operators()
        return None


def prepare() -> None:
    """Makes torchvision importable in this process; costs nothing if nobody imports it."""
    if "torchvision" not in sys.modules and not any(isinstance(each, _BeforeTorchvision) for each in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorchvision())


def prepare_processes(folder: Path) -> None:
    """Writes a file to `folder` that does the same in every Python process with `folder` in PYTHONPATH."""
    here = str(Path(__file__).resolve().parent)
    (folder / "sitecustomize.py").write_text(
        f"import sys\nsys.path.insert(0, {here!r})\nimport torchvision_oracle\nsys.path.remove({here!r})\n"
        "torchvision_oracle.prepare()\n",
        encoding="utf-8",
    )


def declare_missing_operators() -> None:
    """Declares the operators of the native library if it cannot be loaded. Imports torch."""
    import torch

    spec = PathFinder.find_spec("torchvision")
    if spec is None or spec.origin is None or _declared:
        return
    for library in Path(spec.origin).parent.glob("_C*"):
        try:
            torch.ops.load_library(library)
        except OSError:
            continue  # it was built for another torch
        return
    fragment = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        fragment.define(schema)
    _declared.append(fragment)
