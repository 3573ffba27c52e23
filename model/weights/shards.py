"""Safetensors shards: which files hold the weights, and their headers, validated before anything is mapped."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any

from model.bounds import shown
from model.errors import CheckpointError
from model.folder import INDEX, MAX_INDEX_BYTES, PICKLED_WEIGHTS, SINGLE, is_listed, open_regular, read_json, reason_of
from model.gguf.files import SUFFIX, find_gguf, read_gguf
from model.gguf.vision import find_vision
from model.weights.gguf import gguf_tensors, gguf_vision_tensors
from model.weights.mapping import DTYPES
from model.weights.sources import StoredTensor

VISION_PREFIXES = ("vision_model.", "multi_modal_projector.")
IGNORED_PREFIXES = (*VISION_PREFIXES, *(f"model.{prefix}" for prefix in VISION_PREFIXES))
"""Prefixes of tensors that do not belong to the text model; like transformers, with and without `model.`."""
EMBEDDINGS = "model.embed_tokens.weight"
MAX_HEADER_BYTES = 2**24
"""The format allows 100 MB, which would take 2 GB of memory; 37,000 tensors of Llama 4's experts take 6 MB."""

MOST_DIMENSIONS, MOST_ELEMENTS, LONGEST_DTYPE, LONGEST_NAME = 8, 2**48, 16, 1024
"""Of one tensor, and of one of its dimensions; what is longer is no header, and fits into no message."""


def text_tensors(path: Path) -> dict[str, StoredTensor]:
    """The text model's tensors by their names in Transformer, from the headers of shards or of GGUF files alone.

    Raises CheckpointError for a missing or damaged file.
    """
    file = find_gguf(path)
    return _named_tensors(path, text_name) if file is None else gguf_tensors(read_gguf(file))


def vision_tensors(path: Path) -> dict[str, StoredTensor]:
    """The vision model's and the projector's tensors by their names in VisionTower; otherwise as `text_tensors`.

    Those of a model in GGUF files are in a file beside them; there may be none.
    """
    file = find_gguf(path)
    if file is None:
        return _named_tensors(path, _vision_name)
    vision = find_vision(file.parent)
    return {} if vision is None else gguf_vision_tensors(read_gguf(vision))


def text_name(stored: str) -> str | None:
    name = stored.removeprefix("language_model.")
    return None if name.startswith(IGNORED_PREFIXES) or name.endswith("rotary_emb.inv_freq") else name


def _vision_name(stored: str) -> str | None:
    name = stored.removeprefix("model.")
    return name if name.startswith(VISION_PREFIXES) else None


def _named_tensors(folder: Path, name_of: Callable[[str], str | None]) -> dict[str, StoredTensor]:
    """The tensors that `name_of` maps to a name, by that name."""
    tensors: dict[str, StoredTensor] = {}
    for stored in _stored_tensors(folder):
        name = name_of(stored.name)
        if name is None:
            continue
        if name in tensors:
            raise CheckpointError(
                f"{stored.file}: tensor {stored.name} appears twice (also in {tensors[name].file.name})"
            )
        tensors[name] = stored
    return tensors


def shard_files(folder: Path) -> list[Path]:
    """The files that hold the weights, even if some are missing; empty if there is neither a single file nor an index.

    As in transformers, model.safetensors takes precedence over an index, and other files are not read. Of a model in
    GGUF files, all parts and the vision tower's file.
    """
    if (file := find_gguf(folder)) is not None:
        vision = find_vision(file.parent)
        return [*read_gguf(file).parts, *([] if vision is None else [vision])]
    single, index_file = folder / SINGLE, folder / INDEX
    if os.path.isfile(single):
        return [single]
    try:
        has_index, has_single = is_listed(index_file), is_listed(single)  # dangling links count as damage
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({reason_of(error)})") from None
    if has_index:
        return [folder / shard for shard in sorted(set(_weight_map(index_file).values()))]
    return [single] if has_single else []


def unused_weights(folder: Path) -> str | None:
    """A line that names weight files in the folder that are not read, such as those of an earlier training run.

    None if there are none, and for a GGUF file, which names what is read. Raises CheckpointError.
    """
    if find_gguf(folder) is not None:
        return None
    used = {file.name for file in shard_files(folder)}
    if SINGLE not in used:
        used.add(INDEX)
    others = sorted(
        (file.name for file in folder.iterdir() if file.name not in used and _holds_weights(file.name)),
        key=lambda name: (name != INDEX, name),
    )
    if not others or used == {INDEX}:
        return None
    read = SINGLE if SINGLE in used else f"what {INDEX} names"
    return f"{folder}: {read} is read, as transformers does; not read: {_listed(others)}"


def _holds_weights(name: str) -> bool:
    return name == INDEX or name.endswith((".safetensors", ".gguf")) or bool(PICKLED_WEIGHTS.fullmatch(name))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _no_weights(folder: Path) -> CheckpointError:
    """The error for a folder with neither of the two files."""
    others = sorted(file.name for file in folder.iterdir() if _holds_weights(file.name)) if folder.is_dir() else []
    safe = [name for name in others if name.endswith(".safetensors")]
    message = f"{folder}: neither {SINGLE} nor {INDEX} is there"
    if any(name.startswith("model-") for name in safe):
        message += f", though there is {_listed(safe)}: download the index, too"
    elif safe:
        message += f", though there is {_listed(safe)}"
    elif gguf := [name for name in others if name.endswith(SUFFIX)]:
        message += f"; of the GGUF files there, give one: --model {folder / gguf[0]}"
    elif others:
        message += (
            f"; {_listed(others)} is not read: convert it to safetensors with save_pretrained of transformers, "
            "on a machine where you trust the file"
        )
    return CheckpointError(message)


def _stored_tensors(folder: Path) -> Iterator[StoredTensor]:
    files, index_file = shard_files(folder), folder / INDEX
    if not files:
        raise _no_weights(folder)
    if files == [folder / SINGLE]:
        yield from read_header(files[0]).values()
        return
    expected: dict[str, set[str]] = {}
    for name, shard in _weight_map(index_file).items():
        expected.setdefault(shard, set()).add(name)
    for shard, names in sorted(expected.items()):
        file = folder / shard
        if not _is_there(file):
            raise CheckpointError(f"{file}: missing shard, named in {index_file.name}; download it again")
        header = read_header(file)
        for name in names - header.keys():
            raise CheckpointError(f"{file}: tensor {name} is missing, though {index_file.name} places it there")
        for name in header.keys() - names:
            raise CheckpointError(f"{file}: extra tensor {name}, not listed in {index_file.name}")
        yield from header.values()


def _is_there(file: Path) -> bool:
    """Whether there is such a file; what else is wrong with it, reading it says."""
    try:
        os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _weight_map(index_file: Path) -> Mapping[str, str]:
    """The shard of each tensor, by its name. Raises CheckpointError."""
    try:
        status = os.stat(index_file)
        return _read_weight_map(index_file, (status.st_mtime_ns, status.st_size, status.st_ino))
    except OSError as error:
        raise CheckpointError(f"{index_file}: not a safetensors index that can be read ({reason_of(error)})") from None


@functools.lru_cache(maxsize=2)
def _read_weight_map(index_file: Path, state: tuple[int, int, int]) -> Mapping[str, str]:
    """`state`: of the file, so that a changed one is read again."""
    try:
        weight_map = read_json(index_file, MAX_INDEX_BYTES)["weight_map"]
        pairs = [(str(name), str(shard)) for name, shard in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index_file}: not a safetensors index ({type(error).__name__}: {error})") from None
    for _, shard in pairs:
        parts = PurePosixPath(shard)
        if (
            parts.is_absolute()
            or ".." in parts.parts
            or "\\" in shard
            or not shard.isprintable()
            or not shard.endswith(".safetensors")
        ):
            raise CheckpointError(f"{index_file}: shard {shard!r} is not a safetensors file inside the folder")
    return dict(pairs)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """A shard's tensors by name. Raises CheckpointError if the file's size contradicts its header.

    Format: an unsigned 64-bit little-endian length, that many bytes of JSON, then the data.
    """
    try:
        with BufferedReader(open_regular(file)) as stream:
            size = os.fstat(stream.fileno()).st_size
            beginning = stream.read(8)
            length = int.from_bytes(beginning, "little")
            if beginning == b"version ":  # git without LFS leaves this; as a length it would be impossible
                raise CheckpointError(
                    f"{file}: a Git LFS pointer, not the weights themselves: run git lfs pull in "
                    "the clone, or download the file"
                )
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{file}: not a safetensors file, or cut short inside its header ({size} bytes)")
            header = json.loads(stream.read(length))
        entries = [(name, *_entry(name, entry)) for name, entry in header.items() if name != "__metadata__"]
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({reason_of(error)})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: its header cannot be read ({type(error).__name__}: {error})") from None
    end = 8 + length + max((entry[-1] for entry in entries), default=0)
    if size != end:
        state = "truncated" if size < end else "longer than its header says"
        raise CheckpointError(f"{file}: {state}: {size} bytes instead of {end}; download it again")
    tensors, reached = {}, 0
    for name, dtype, shape, begin, stop in sorted(entries, key=lambda entry: entry[3:]):
        if begin != reached or stop < begin:
            raise CheckpointError(f"{file}: tensor {name} overlaps another one, or leaves a gap before it")
        reached = stop
        if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != stop - begin:
            raise CheckpointError(f"{file}: tensor {name}: shape {list(shape)} in {dtype} is not {stop - begin} bytes")
        tensors[name] = StoredTensor(file, name, dtype, shape, stop - begin, 8 + length + begin)
    return tensors


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Dtype, shape, begin and end of a tensor. Raises ValueError, KeyError and TypeError."""
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        raise TypeError("a dtype that is no text, or a shape or offsets that are no list")
    begin, end = offsets
    if len(name) > LONGEST_NAME:
        raise ValueError(f"a name of {len(name):,} characters, more than {LONGEST_NAME:,}")
    if len(dtype) > LONGEST_DTYPE or len(shape) > MOST_DIMENSIONS:
        raise ValueError(f"a dtype longer than {LONGEST_DTYPE} characters, or more than {MOST_DIMENSIONS} dimensions")
    for number in (*shape, begin, end):
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{shown(number)} is not a whole number")
    if not all(0 <= number <= MOST_ELEMENTS for number in shape) or not 0 <= begin <= end <= 16 * MOST_ELEMENTS:
        raise ValueError(f"tensor {name}: impossible sizes: shape {shown(shape)} at {shown(offsets)}")
    return dtype, tuple(shape), begin, end
