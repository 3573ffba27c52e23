"""Writes a conversion: shard by shard, each complete under its name or not there, so that a later run goes on.

Memory holds one quantized matrix and what it is made from. config.json is written last: without it a folder is no
checkpoint.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from cache.errors import DiskFullError
from l4ctx.conversion.forms import Form
from l4ctx.conversion.layout import Conversion, Piece, Shard
from l4ctx.errors import RequestError
from l4ctx.formatting import human_bytes
from l4ctx.machine.files import sync_folder, sync_names
from l4ctx.machine.limits import largest_file
from l4ctx.machine.memory import available_disk
from model.errors import CheckpointError
from model.folder import CONFIG, INDEX, MAX_FILE_BYTES, PICKLED_WEIGHTS, SINGLE, open_regular, read_object, read_regular
from model.quantization.rounding import to_float8, to_int4, to_int8
from model.weights.mapping import MappedFiles
from model.weights.read_ahead import as_bytes

WRITTEN_BYTES = 2**24
"""Written at a time."""

WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
Progress = Callable[[int, int], None]  # bytes done, and in all


def check_output(conversion: Conversion, output: Path, *, replace: bool) -> None:
    """Raises RequestError for a folder that holds something else, DiskFullError where there is too little room."""
    if output.exists() and not output.is_dir():
        raise RequestError(f"{output}: a file, not a folder")
    if output.is_dir() and output.samefile(conversion.source):
        raise RequestError(f"{output}: the checkpoint itself; name another folder with -o")
    names = {entry.name for entry in output.iterdir()} if output.is_dir() else set()
    if CONFIG in names and not replace:
        raise RequestError(f"{output}: a checkpoint is there already; name another folder, or add --replace")
    ours = {shard.name for shard in conversion.shards} | {file.name for file in _others(conversion.source)}
    ours |= {_partial(Path(name)).name for name in (*ours, INDEX, CONFIG)} | {INDEX, CONFIG}
    if (others := sorted(names - ours)) and not replace:
        raise RequestError(f"{output}: holds other files ({', '.join(others[:3])}); name a new or an empty folder")
    needed = sum(shard.num_bytes for shard in conversion.shards if not is_finished(shard, output))
    largest, limit = max((shard.num_bytes for shard in conversion.shards), default=0), largest_file()
    if limit is not None and largest > limit:
        raise DiskFullError(
            f"{output}: a shard has {human_bytes(largest)}, and files may have {human_bytes(limit)} (ulimit -f)"
        )
    free = available_disk(output)
    if free is not None and needed > free:
        raise DiskFullError(
            f"{output}: {human_bytes(needed)} are to be written, and {human_bytes(free)} are free there"
        )


def is_finished(shard: Shard, output: Path) -> bool:
    """Whether an earlier run wrote this shard, from the same source and in the same form."""
    file = output / shard.name
    try:
        with BufferedReader(open_regular(file)) as stream:
            return file.stat().st_size == shard.num_bytes and stream.read(len(shard.header)) == shard.header
    except OSError:
        return False


def write(conversion: Conversion, output: Path, progress: Progress) -> int:
    """Writes what is not there yet; returns how many shards were. Raises DiskFullError and CheckpointError."""
    total, done = conversion.num_bytes, 0
    with _disk_errors(output):
        missing = [path for path in (output, *output.parents) if not os.path.lexists(path)]
        output.mkdir(parents=True, exist_ok=True)
        (output / CONFIG).unlink(missing_ok=True)
        (output / INDEX).unlink(missing_ok=True)
        sync_folder(output)  # before a shard is replaced that the old configuration would be read with
        sync_names(missing)
    finished = [shard for shard in conversion.shards if is_finished(shard, output)]
    for shard in conversion.shards:
        if shard not in finished:
            _write_shard(shard, conversion.form, output, partial(_tell, progress, done, total))
        done += shard.num_bytes
        progress(done, total)
    with _disk_errors(output):
        for file in _others(conversion.source):
            _copy(file, output / file.name)
        _write_index(conversion, output)
        config = read_object(conversion.source / CONFIG, CheckpointError)
        config["quantization_config"] = conversion.form.settings(conversion.ignore)
        _write_text(output / CONFIG, json.dumps(config, indent=2) + "\n")
    return len(finished)


def _tell(progress: Progress, before: int, total: int, written: int) -> None:
    progress(before + written, total)


def _write_shard(shard: Shard, form: Form, output: Path, progress: Callable[[int], None]) -> None:
    files, written = MappedFiles(), 0
    with _disk_errors(output), _replacing(output / shard.name) as descriptor:
        os.ftruncate(descriptor, 0)
        _reserve(descriptor, shard.num_bytes)
        _write_at(descriptor, memoryview(shard.header), 0)
        for piece in shard.pieces:
            source = files.tensor(piece.source)
            made = quantized(source, piece, form) if piece.is_quantized else [source]
            for entry, tensor in zip(piece.entries, made, strict=True):
                assert tensor.nbytes == entry.num_bytes, (entry, tensor.shape, tensor.dtype)
                _write_at(descriptor, as_bytes(tensor), len(shard.header) + shard.offsets[entry.name])
                written += entry.num_bytes
            progress(written)


def quantized(source: Tensor, piece: Piece, form: Form) -> list[Tensor]:
    """The tensors of a piece's entries, in their order."""
    weight = source if piece.expert is None else source[piece.expert]
    weight = weight.t() if piece.is_turned else weight
    if piece.half is not None:
        weight = weight.chunk(2)[piece.half]
    if form.name == "fp8":
        made = to_float8(weight)
        return [made["codes"].view(torch.uint8), made["scale"]]
    shape = torch.tensor(weight.shape, dtype=torch.int64)
    if form.name == "w4a16":
        made = to_int4(weight, form.group_size)
        return [made["codes"], made["scale"], shape]
    made = to_int8(weight)
    codes = torch.zeros(len(weight), piece.entries[0].shape[1] * 4, dtype=torch.int16)
    codes[:, : weight.shape[1]] = made["codes"].to(torch.int16) + 128
    return [codes.to(torch.uint8), made["scale"], shape]


@contextmanager
def _replacing(file: Path) -> Iterator[int]:
    """The descriptor of a file that takes the place of `file` at the end; what a killed run left is written over."""
    unfinished = _partial(file)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(unfinished, flags, 0o666)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:  # what is written would be in another's file
            raise RequestError(f"{unfinished}: not a file that a killed run left, but a pipe or a hard link; remove it")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(f"{file.parent}: another l4ctx quantize is writing there") from None
        try:
            yield descriptor
            os.fsync(descriptor)
            os.replace(unfinished, file)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
    finally:
        os.close(descriptor)
    sync_folder(file.parent)


@contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"cannot write ({error.strerror})"
        raise DiskFullError(f"{output}: {what}; finished shards are kept, and the same command goes on") from None


def _reserve(descriptor: int, size: int) -> None:
    """So that a full disk shows before any work is done. Does nothing where the file system cannot."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        os.ftruncate(descriptor, size)


def _write_at(descriptor: int, content: memoryview, offset: int) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done : done + WRITTEN_BYTES], offset + done)


def _write_text(file: Path, text: str) -> None:
    with _replacing(file) as descriptor:
        os.ftruncate(descriptor, 0)
        _write_at(descriptor, memoryview(text.encode("utf-8")), 0)


def _write_index(conversion: Conversion, output: Path) -> None:
    """None for a single file."""
    if [shard.name for shard in conversion.shards] == [SINGLE]:
        return
    entries = [(entry, shard) for shard in conversion.shards for piece in shard.pieces for entry in piece.entries]
    index = {
        "metadata": {"total_size": sum(entry.num_bytes for entry, _ in entries)},
        "weight_map": {entry.name: shard.name for entry, shard in entries},
    }
    _write_text(output / INDEX, json.dumps(index, indent=2) + "\n")


def _others(folder: Path) -> list[Path]:
    """Tokenizer, chat template and the like: what lies beside weights and configuration."""
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file()
        and not file.name.startswith(".")
        and not file.name.endswith(WEIGHTS)
        and not PICKLED_WEIGHTS.fullmatch(file.name)
        and file.name not in (CONFIG, INDEX)
        and file.stat().st_size <= MAX_FILE_BYTES
    )


def _copy(file: Path, to: Path) -> None:
    try:
        content = read_regular(file, MAX_FILE_BYTES)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    with _replacing(to) as descriptor:
        os.ftruncate(descriptor, 0)
        _write_at(descriptor, memoryview(content), 0)


def _partial(file: Path) -> Path:
    return file.with_name(f".{file.name}.partial")
