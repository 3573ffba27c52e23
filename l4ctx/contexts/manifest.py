"""The manifest of a saved context: what it was made with. Written once, checked before each use, never changed.

Imports no torch.
"""

from __future__ import annotations

import datetime
import json
import os
import stat
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cache.layout import KV_DTYPES, QUANTIZED
from l4ctx.contexts.folder import (
    BLOCKS,
    FILE,
    FORMAT,
    READERS_LOCK,
    RECREATE,
    VERSION,
    WRITER_LOCK,
    digest,
    read_json,
    typed,
)
from l4ctx.errors import ContextError
from l4ctx.machine.files import write_atomically
from model.bounds import shown
from model.config import BACKEND_NAMES
from model.quantization.choice import NONE, Quantization

_WHAT = {
    "block_tokens": "block size",
    "segment_tokens": "segment size",
    "config": "configuration",
    "template": "chat template",
}


@dataclass(frozen=True)
class Recipe:
    """Everything that the bytes of a context depend on, besides its documents. Raises ValueError for invalid values.

    The first four are the SHA-256 fingerprints of `l4ctx.checkpoint.fingerprint`. `dtype` is what the model computed
    in, `kv_dtype` what sealed blocks are stored in; sizes are in tokens. `date` is the date that the chat template was
    given, in ISO format; `quantize` how weights were quantized on loading, as `Quantization.parse` reads it.
    """

    config: str
    weights: str
    tokenizer: str
    template: str
    dtype: str
    kv_dtype: str
    attention: str
    prefill_chunk_size: int
    block_tokens: int
    segment_tokens: int
    date: str
    quantize: str = NONE  # absent from contexts of version 0.1.0

    def __post_init__(self) -> None:
        """A manifest is untrusted input, and its values are used as sizes and names."""
        for name in ("prefill_chunk_size", "block_tokens", "segment_tokens"):
            if not 0 < getattr(self, name) < 2**40:
                raise ValueError(f"{name} {shown(getattr(self, name))}")
        for name, known in (
            ("dtype", KV_DTYPES.keys() - set(QUANTIZED)),
            ("kv_dtype", KV_DTYPES.keys()),
            ("attention", set(BACKEND_NAMES)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {shown(getattr(self, name))}")
        datetime.datetime.fromisoformat(self.date)
        if self.quantize != NONE:
            Quantization.parse(self.quantize)

    @property
    def pinned_date(self) -> datetime.datetime:
        return datetime.datetime.fromisoformat(self.date)

    def check(self, folder: Path, wanted: dict[str, Any], where: str = "") -> None:
        """Raises ContextError where fields differ from `wanted`; `where` says where the right checkpoint may be."""
        for name, other in wanted.items():
            mine = getattr(self, name)
            if mine == other:
                continue
            option = {
                "dtype": "--dtype",
                "kv_dtype": "--kv-dtype",
                "attention": "--attention",
                "prefill_chunk_size": "--prefill-chunk-size",
                "quantize": "--quantize",
            }.get(name)
            if option:
                raise ContextError(f"{folder}: made with {option} {mine}, not {other}; use that, or another folder")
            differing = [_WHAT.get(name, name) for name in wanted if getattr(self, name) != wanted[name]]
            what = " and ".join([", ".join(differing[:-1])] * (len(differing) > 1) + differing[-1:])
            raise ContextError(
                f"{folder}: made with another {what} than this checkpoint's ({name} differs); nothing "
                f"was changed: use the checkpoint that it was made with{where}, or another folder"
            )


def write_manifest(folder: Path, recipe: Recipe, checkpoint: Path | None = None) -> None:
    """Writes the manifest atomically. `checkpoint` is the model's folder. Raises OSError."""
    content: dict[str, Any] = {"format": FORMAT, "version": VERSION, "made_with": asdict(recipe)}
    if checkpoint is not None:
        content["checkpoint"] = str(checkpoint.absolute())
    write_atomically(folder / FILE, json.dumps({**content, "sha256": digest(content)}, indent=1) + "\n")


def read_manifest(folder: Path) -> Recipe:
    """What the context was made with. Raises ContextError where it is damaged, or not a context of this version."""
    return _read(folder)[0]


def saved_checkpoint(folder: Path) -> Path | None:
    """Where the checkpoint was that the context was made with: a hint, which the fingerprints must confirm.

    None where the manifest does not say. Raises ContextError.
    """
    return _read(folder)[1]


def _read(folder: Path) -> tuple[Recipe, Path | None]:
    file = folder / FILE
    try:
        content = read_json(file)
        said = content.pop("sha256")
        if content["format"] != FORMAT:
            raise ValueError(f"format {shown(content['format'])}")
        if content["version"] != VERSION:
            raise ContextError(
                f"{file}: version {shown(content['version'])} of the format is not supported, only "
                f"{VERSION}: {RECREATE}, or use the l4ctx that made it"
            )
        if digest(content) != said:
            raise ValueError("its checksum does not match")
        made = content["made_with"]
        known = [field for field in fields(Recipe) if field.default is MISSING or field.name in made]
        values: dict[str, Any] = {
            field.name: typed(made[field.name], int if field.type == "int" else str) for field in known
        }
        recipe = Recipe(**values)
        said_path = content.get("checkpoint")
        if said_path is not None and (not os.path.isabs(typed(said_path, str)) or "\0" in said_path):
            raise ValueError(f"checkpoint {shown(said_path)}")
    except FileNotFoundError:
        from l4ctx.machine.suggestions import did_you_mean

        what = (
            f"not a saved context: it has no {FILE}"
            if os.path.exists(folder)
            else (f"no such folder{did_you_mean(str(folder))}")
        )
        raise ContextError(f"{folder}: {what} (l4ctx prefill PATH... -o {folder} makes one)") from None
    except OSError as error:
        raise ContextError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ContextError(
            f"{file}: damaged ({type(error).__name__}: {error}); what the context holds cannot be "
            f"trusted without it: {RECREATE}"
        ) from None
    return recipe, None if said_path is None else Path(said_path)


def saved_recipe(folder: Path) -> Recipe | None:
    """What the context in `folder` was made with; None where a new one can be made there. Raises ContextError."""
    try:
        is_folder = stat.S_ISDIR(os.stat(folder).st_mode)
        has_manifest = is_folder and FILE in os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None  # where it cannot be made either, making it says so
    except OSError as error:
        raise ContextError(f"{folder}: cannot be read: {error.strerror}") from None
    if not is_folder:
        raise ContextError(f"{folder}: a file, not a folder; name a folder for the context")
    if has_manifest:
        return read_manifest(folder)
    for name in (BLOCKS, WRITER_LOCK, READERS_LOCK):
        if (folder / name).is_symlink():
            raise ContextError(f"{folder / name}: a symbolic link; what belongs to a context lies in its own folder")
    ours = {WRITER_LOCK, READERS_LOCK}
    if (folder / BLOCKS).is_dir() and not any((folder / BLOCKS).iterdir()):
        ours.add(BLOCKS)
    others = sorted(
        entry.name for entry in folder.iterdir() if entry.name not in ours and not entry.name.startswith(f".{FILE}.")
    )
    if others:
        raise ContextError(
            f"{folder}: holds other files ({', '.join(others[:3])}) and no saved context; name a new or an empty folder"
        )
    return None
