"""Safetensors shards of a published checkpoint -> a Transformer or a VisionTower built on the meta device.

Every tensor is accounted for before the first one is read: missing, extra, wrongly shaped, truncated files. Tensors
whose stored dtype and device are the wanted ones stay mapped files; others are converted one at a time, so that peak
memory is the weights plus one tensor. Checkpoints are untrusted: no pickle, and no path that leaves the folder.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from model.config import TextConfig
from model.linearized import ExpertPart, empty_fused, expert_parts, missing_part, surplus_part
from model.transformer import Transformer
from model.vision import VisionTower
from model.vision_config import VisionConfig

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
VISION_PREFIXES = ("vision_model.", "multi_modal_projector.")
IGNORED_PREFIXES = (*VISION_PREFIXES, *(f"model.{prefix}" for prefix in VISION_PREFIXES))
"""Of the tensors that are none of the text model's; transformers, too, reads them with and without `model.`."""

EMBEDDINGS = "model.embed_tokens.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED_WEIGHTS = re.compile(r"(pytorch_model|model|consolidated|adapter_model)[\w.-]*\.(bin|pth|pt|ckpt)")
"""Never read: such a file can run any program."""

MAX_HEADER_BYTES = 100_000_000


class CheckpointError(Exception):
    """A checkpoint that cannot be loaded; the message names the file or tensor and what is wrong with it."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a shard's header describes it."""

    file: Path
    name: str  # in the file
    dtype: str  # as safetensors spells it: F32, BF16, ...
    shape: tuple[int, ...]
    num_bytes: int
    offset: int  # of its first byte in the file

    @property
    def dtype_name(self) -> str:
        """As torch spells it: float32, bfloat16, ..."""
        return str(DTYPES[self.dtype]).removeprefix("torch.")


def load_checkpoint(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    attention: str = "sdpa",
    is_mapped: bool = True,
) -> Transformer:
    """Loads the text model of the checkpoint folder `path`.

    `dtype` is a torch.dtype, its name, or "auto", which keeps the dtype of the stored embeddings. On a CPU, weights
    stored in that dtype stay in the files' mapped pages, unless `is_mapped` is false; experts that are stored one by
    one are joined in memory. Raises CheckpointError and
    model.config.ConfigError.
    """
    folder = Path(path)
    config = TextConfig.from_folder(folder)
    model, stored = _checked_text(folder, config, attention)
    _fill(model, stored, _wanted_dtype(dtype, stored[EMBEDDINGS]), device, is_mapped)
    if config.tie_word_embeddings:
        _tie(folder, model, "lm_head.weight" in stored)
    return model.eval()


def load_vision(
    path: str | Path,
    config: VisionConfig,
    text_hidden_size: int,
    *,
    dtype: torch.dtype | str,
    device: torch.device | str = "cpu",
    is_mapped: bool = True,
) -> VisionTower:
    """Loads the vision tower of the checkpoint folder `path`, for a text model of width `text_hidden_size`.

    `dtype`, `device` and `is_mapped` are as in `load_checkpoint`; "auto" keeps the dtype of the stored class
    embedding. Raises CheckpointError.
    """
    tower, stored = _checked_vision(Path(path), config, text_hidden_size)
    _fill(tower, stored, _wanted_dtype(dtype, stored["vision_model.class_embedding"]), device, is_mapped)
    return tower.eval()


def checked_tensors(folder: Path, config: TextConfig) -> dict[str, StoredTensor]:
    """The text model's tensors by their names in Transformer: all that it needs, nothing else, each of its shape.

    Experts that are stored one by one keep their own names (see model.linearized).

    Reads the shards' headers alone. Raises CheckpointError.
    """
    return _checked_text(folder, config)[1]


def checked_vision_tensors(folder: Path, config: VisionConfig, text_hidden_size: int) -> dict[str, StoredTensor]:
    """The vision tower's tensors by their names in VisionTower: all that it needs, nothing else, each of its shape.

    Reads the shards' headers alone. Raises CheckpointError.
    """
    return _checked_vision(folder, config, text_hidden_size)[1]


def stored_dtype(tensors: dict[str, StoredTensor]) -> str:
    """The name of the dtype that the text model's embeddings are stored in."""
    return tensors[EMBEDDINGS].dtype_name


def can_be_mapped(tensors: dict[str, StoredTensor]) -> bool:
    """Whether weights can stay in the files' mapped pages: experts that are stored one by one have to be joined."""
    return not expert_parts(tensors)


def stored_parameters(tensors: dict[str, StoredTensor], config: TextConfig) -> int:
    """The number of weights; tied embeddings count once."""
    return sum(
        math.prod(tensor.shape)
        for name, tensor in tensors.items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    )


def text_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The text model's tensors by their names in Transformer, from the shards' headers alone.

    Raises CheckpointError for a missing or damaged shard, and for dtypes that are not floating point numbers.
    """
    return _named_tensors(folder, _text_name)


def vision_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The vision model's and the projector's tensors by their names in VisionTower; otherwise as `text_tensors`."""
    return _named_tensors(folder, _vision_name)


def _text_name(stored: str) -> str | None:
    name = stored.removeprefix("language_model.")
    return None if name.startswith(IGNORED_PREFIXES) or name.endswith("rotary_emb.inv_freq") else name


def _vision_name(stored: str) -> str | None:
    name = stored.removeprefix("model.")
    return name if name.startswith(VISION_PREFIXES) else None


def _named_tensors(folder: Path, name_of: Callable[[str], str | None]) -> dict[str, StoredTensor]:
    """Those to which `name_of` gives a name."""
    tensors: dict[str, StoredTensor] = {}
    for stored in _stored_tensors(folder):
        name = name_of(stored.name)
        if name is None:
            continue
        if stored.dtype not in DTYPES:
            raise CheckpointError(
                f"{stored.file}: tensor {stored.name} has dtype {stored.dtype}; "
                f"only {', '.join(DTYPES)} are supported (quantized checkpoints are not, yet)"
            )
        if name in tensors:
            raise CheckpointError(
                f"{stored.file}: tensor {stored.name} is there twice (also in {tensors[name].file.name})"
            )
        tensors[name] = stored
    return tensors


def _wanted_dtype(dtype: torch.dtype | str, example: StoredTensor) -> torch.dtype:
    if dtype == "auto":
        return DTYPES[example.dtype]
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(wanted, torch.dtype) or wanted not in DTYPES.values():
        raise CheckpointError(f"dtype {dtype!r} is not one of auto, float32, bfloat16, float16")
    return wanted


def shard_files(folder: Path) -> list[Path]:
    """The files that hold the weights, whether they are there or not; none where there is nothing of the kind.

    As in transformers, model.safetensors goes before an index, and what else may be there is not read.
    """
    single, index_file = folder / SINGLE, folder / INDEX
    if single.is_file():
        return [single]
    if os.path.lexists(index_file):  # a link to nothing is damage, here and below
        return [folder / shard for shard in sorted(set(_weight_map(index_file).values()))]
    return [single] if os.path.lexists(single) else []


def unused_weights(folder: Path) -> str | None:
    """A line that names the sets of weights that are there and not read, such as those of an earlier run of training.

    None where there are none. Raises CheckpointError.
    """
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
    """What to say where there is neither of the two files."""
    others = sorted(file.name for file in folder.iterdir() if _holds_weights(file.name)) if folder.is_dir() else []
    safe = [name for name in others if name.endswith(".safetensors")]
    message = f"{folder}: neither {SINGLE} nor {INDEX} is there"
    if any(name.startswith("model-") for name in safe):
        message += f", though there is {_listed(safe)}: download the index, too"
    elif safe:
        message += f", though there is {_listed(safe)}"
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
    weight_map = _weight_map(index_file)
    for shard in sorted(set(weight_map.values())):
        file = folder / shard
        if not file.is_file():
            raise CheckpointError(f"{file}: missing shard, named in {index_file.name}; download it again")
        header = read_header(file)
        expected = {name for name, where in weight_map.items() if where == shard}
        for name in expected - header.keys():
            raise CheckpointError(f"{file}: tensor {name} is missing, though {index_file.name} places it there")
        for name in header.keys() - expected:
            raise CheckpointError(f"{file}: extra tensor {name}, not listed in {index_file.name}")
        yield from header.values()


def _weight_map(index_file: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
        pairs = [(str(name), str(shard)) for name, shard in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index_file}: not a safetensors index ({type(error).__name__}: {error})") from None
    for _, shard in pairs:
        parts = PurePosixPath(shard)
        if parts.is_absolute() or ".." in parts.parts or "\\" in shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index_file}: shard {shard!r} is not a safetensors file inside the folder")
    return dict(pairs)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """A shard's tensors by name. Raises CheckpointError when the file's size contradicts its header.

    Format: an unsigned 64-bit little-endian length, as many bytes of JSON, then the data.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            beginning = stream.read(8)
            length = int.from_bytes(beginning, "little")
            if beginning == b"version ":  # as git without LFS leaves it; a header of that length is none
                raise CheckpointError(
                    f"{file}: a pointer of git LFS, not the weights themselves: run git lfs pull in "
                    "the clone, or download the file"
                )
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{file}: not a safetensors file, or cut short inside its header ({size} bytes)")
            header = json.loads(stream.read(length))
        entries = [
            (
                name,
                str(entry["dtype"]),
                tuple(int(n) for n in entry["shape"]),
                int(entry["data_offsets"][0]),
                int(entry["data_offsets"][1]),
            )
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        OverflowError,
        RecursionError,
    ) as error:
        raise CheckpointError(f"{file}: its header cannot be read ({type(error).__name__}: {error})") from None
    end = 8 + length + max((entry[-1] for entry in entries), default=0)
    if size != end:
        state = "truncated" if size < end else "longer than its header says"
        raise CheckpointError(f"{file}: {state}: {size} bytes instead of {end}; download it again")
    tensors = {}
    for name, dtype, shape, begin, stop in entries:
        if dtype in DTYPES and (min(shape, default=1) < 0 or math.prod(shape) * DTYPES[dtype].itemsize != stop - begin):
            raise CheckpointError(f"{file}: tensor {name}: shape {list(shape)} in {dtype} is not {stop - begin} bytes")
        tensors[name] = StoredTensor(file, name, dtype, shape, stop - begin, 8 + length + begin)
    return tensors


def _checked_text(
    folder: Path,
    config: TextConfig,
    attention: str = "sdpa",
) -> tuple[Transformer, dict[str, StoredTensor]]:
    """The model on the meta device, and its tensors."""
    with torch.device("meta"):
        model = Transformer(config, attention)
    stored = text_tensors(folder)
    if config.tie_word_embeddings and EMBEDDINGS not in stored and "lm_head.weight" in stored:
        stored[EMBEDDINGS] = stored.pop("lm_head.weight")  # either of the two may be the one that is stored
    _check_tensors(folder, model, stored, frozenset(["lm_head.weight"] if config.tie_word_embeddings else []))
    return model, stored


def _checked_vision(
    folder: Path,
    config: VisionConfig,
    text_hidden_size: int,
) -> tuple[VisionTower, dict[str, StoredTensor]]:
    with torch.device("meta"):
        tower = VisionTower(config, text_hidden_size)
    stored = vision_tensors(folder)
    if not stored:
        raise CheckpointError(
            f"{folder}: config.json describes a vision model, but none of its tensors is there; "
            "--no-images reads the text alone"
        )
    _check_tensors(folder, tower, stored)
    return tower, stored


def _check_tensors(
    folder: Path, model: nn.Module, stored: dict[str, StoredTensor], optional: frozenset[str] = frozenset()
) -> None:
    expected = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    shapes, joined = dict(expected), {name: parts for name, parts in expert_parts(stored).items() if name in expected}
    for fused, parts in joined.items():
        experts = expected[fused][0]
        surplus = (min(parts), f"{fused} holds all experts") if fused in stored else surplus_part(parts, experts)
        if surplus is not None:
            raise CheckpointError(f"{stored[surplus[0]].file}: extra tensor {stored[surplus[0]].name}: {surplus[1]}")
        if (missing := missing_part(parts, experts)) is not None:
            raise CheckpointError(f"{folder}: tensor {missing} is missing, though other experts are there")
        shapes |= {name: part.shape(expected[fused]) for name, part in parts.items()}
    extra = sorted(stored.keys() - shapes.keys())
    for name in expected:
        if name not in stored and name not in optional and name not in joined:
            near = difflib.get_close_matches(name, extra, 1, 0.8)
            hint = f", though {stored[near[0]].name} is there" if near else ""
            raise CheckpointError(f"{folder}: tensor {name} is missing{hint}")
    for name in extra:
        raise CheckpointError(f"{stored[name].file}: extra tensor {stored[name].name}, which the model does not have")
    for name, tensor in stored.items():
        if tensor.shape != shapes[name]:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)} instead of {list(shapes[name])}"
            )


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: {error}") from None


def in_memory(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy on the CPU. 16-bit experts (E, C_in, C_out) get the strides of (E, C_out, C_in), for layers.linear."""
    if weights.dim() < 3 or dtype == torch.float32:
        return weights.to(dtype, copy=True)
    turned = torch.empty(len(weights), weights.shape[2], weights.shape[1], dtype=dtype)
    for expert, source in zip(turned, weights, strict=True):
        expert.copy_(source.to(dtype).t())
    return turned.transpose(1, 2)


def _fill(
    model: nn.Module, stored: dict[str, StoredTensor], dtype: torch.dtype, device: torch.device | str, is_mapped: bool
) -> None:
    """Reads the model's tensors file by file; on a CPU those of the wanted dtype stay mapped if `is_mapped`."""
    by_file: dict[Path, list[tuple[str, StoredTensor]]] = {}
    for name, tensor in stored.items():
        by_file.setdefault(tensor.file, []).append((name, tensor))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    on_cpu = torch.device(device).type == "cpu"
    for file, tensors in by_file.items():
        with _opened(file) as shard:
            for name, tensor in tensors:
                weights = shard.get_tensor(tensor.name)
                if (part := ExpertPart.of(name)) is not None:
                    if model.get_parameter(part.fused).is_meta:
                        _assign(model, part.fused, empty_fused(shapes[part.fused], dtype, device))
                    part.place(model.get_parameter(part.fused)).copy_(weights)
                elif on_cpu and not (is_mapped and weights.dtype == dtype):
                    _assign(model, name, in_memory(weights, dtype))
                else:
                    _assign(model, name, weights.to(device=device, dtype=dtype))


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    module_name, _, parameter = name.rpartition(".")
    setattr(model.get_submodule(module_name), parameter, nn.Parameter(tensor, requires_grad=False))


def _tie(folder: Path, model: Transformer, stored_apart: bool) -> None:
    embeddings = model.model.embed_tokens.weight
    if stored_apart and not torch.equal(model.lm_head.weight, embeddings):
        raise CheckpointError(
            f"{folder}: lm_head.weight differs from the embeddings, though tie_word_embeddings is "
            "true (transformers 4 would take the embeddings, 5 lm_head.weight, which false in "
            "config.json makes plain)"
        )
    model.lm_head.weight = embeddings
