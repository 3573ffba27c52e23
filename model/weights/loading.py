"""Loads a published checkpoint into a Transformer or a VisionTower built on the meta device.

Headers are checked before any tensor is read: missing or extra tensors, wrong shapes, truncated files. On a CPU,
weights stay memory-mapped in their stored form. Checkpoints are untrusted: no pickle, and no path outside the folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from model.config import TextConfig
from model.context_attention import ContextExchange
from model.context_parallel import ContextTransformer
from model.errors import CheckpointError
from model.gguf.files import find_gguf, read_gguf
from model.layers import Embedding, Linear, looked_up, set_weight
from model.moe import Expert, SplitExperts
from model.parallel import Exchange, divided_model
from model.quantization.choice import Quantization
from model.quantization.form import StoredMatrix, Weight
from model.quantization.plain import PlainMatrix
from model.spread import Spread
from model.transformer import Transformer
from model.vision.config import VisionConfig
from model.vision.tower import VisionTower
from model.weights.cutting import cut_sources
from model.weights.expert_parts import ExpertPart
from model.weights.formats import find_sources
from model.weights.gguf import check_complete
from model.weights.mapping import MappedFiles
from model.weights.owners import Owner, owner_of
from model.weights.plain import PlainScheme
from model.weights.quantizing import quantized_sources
from model.weights.settings import quantization_settings
from model.weights.shards import EMBEDDINGS, text_tensors, vision_tensors
from model.weights.sources import StoredTensor, WeightSource

COMPUTED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes that a model can compute in."""

COMPARED_ROWS = 1024


def load_checkpoint(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    attention: str = "sdpa",
    is_mapped: bool = True,
    quantization: Quantization | None = None,
    exchange: Exchange | None = None,
    context: ContextExchange | None = None,
    spread: Spread | None = None,
) -> Transformer:
    """Loads the text model of the checkpoint `path`, a folder or a GGUF file.

    `dtype`, in which it computes, is a torch.dtype, its name, or "auto": the dtype of the stored embeddings, or
    bfloat16 if these are quantized. Matrices keep their stored form; float32 ones are converted to a 16-bit dtype. On a
    CPU, what keeps its form stays memory-mapped, unless `is_mapped` is false. With `quantization`, weights that are
    stored in a floating-point dtype are quantized in memory, one at a time. With `exchange` the model is one rank's,
    and only its part is read; with `context` it computes one rank's part of a sequence. With `spread` its layers are on
    those devices instead of `device`. Raises CheckpointError, ConfigError and DivisionError.
    """
    folder = Path(path)
    config = TextConfig.from_folder(folder)
    model, sources = _checked_text(folder, config, attention)
    if exchange is not None:
        model = divided_model(config, attention, exchange, context)
        sources = cut_sources(sources, config, exchange.rank)
    elif context is not None:
        with torch.device("meta"):
            model = ContextTransformer(config, attention, context)
    sources = quantized_sources(sources, quantization)
    wanted = _wanted_dtype(dtype, sources[EMBEDDINGS])
    divided = [(torch.device(device), dict(sources))] if spread is None else spread.divided(sources.items())
    for where, part in divided:
        _Loader(wanted, where, is_mapped).fill_text(model, part)
    model.spread = spread
    if config.tie_word_embeddings:
        _tie(folder, model, "lm_head.weight" in sources)
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

    `dtype`, `device` and `is_mapped` are as in `load_checkpoint`, but all weights are converted to `dtype`; "auto"
    keeps the dtype of the stored class embedding. Raises CheckpointError.
    """
    tower, sources = _checked_vision(Path(path), config, text_hidden_size)
    wanted = _wanted_dtype(dtype, sources["vision_model.class_embedding"])
    _Loader(wanted, torch.device(device), is_mapped).fill(tower, sources)
    return tower.eval()


def checked_sources(path: Path, config: TextConfig) -> dict[str, WeightSource]:
    """How the text model's weights are stored, by their names in Transformer, checked to be complete, with no others.

    Experts that are stored apart keep names of their own (see model.weights.expert_parts). Reads only headers. Raises
    CheckpointError.
    """
    return _checked_text(path, config)[1]


def checked_vision_sources(path: Path, config: VisionConfig, text_hidden_size: int) -> dict[str, WeightSource]:
    """The same for the vision tower's weights, by their names in VisionTower. Raises CheckpointError."""
    return _checked_vision(path, config, text_hidden_size)[1]


def feed_forward_matrix(sources: Mapping[str, WeightSource], *, dtype: torch.dtype | str) -> Weight | None:
    """A gate or up matrix (C_out, C_in), of an expert if there are any, as a model that computes in `dtype` on a CPU
    multiplies it, mapped. None if there is none. Raises CheckpointError.
    """
    names = [name for name in sources if ".down" not in name]
    owners = (Owner.ROUTED, Owner.SHARED, Owner.DENSE)
    found = next((name for owner in owners for name in names if owner_of(name) is owner), None)
    if found is None:
        return None
    source, part = sources[found], ExpertPart.of(found)
    loader = _Loader(_wanted_dtype(dtype, sources[EMBEDDINGS]), torch.device("cpu"), is_mapped=True)
    expert = 0 if len(source.shape) > 2 else None
    weight = loader._weight(source, expert, is_turned=part is not None and part.is_fused)
    return PlainMatrix(weight) if isinstance(weight, Tensor) and weight.dtype != loader.dtype else weight


def stored_tensors(sources: Mapping[str, WeightSource]) -> dict[str, StoredTensor]:
    """The tensors of these weights, each by its weight's name and, for those of quantized weights, its role."""
    return {
        name if len(source.tensors) == 1 else f"{name}:{role}": tensor
        for name, source in sources.items()
        for role, tensor in source.tensors.items()
    }


def stored_parameters(sources: Mapping[str, WeightSource], config: TextConfig) -> int:
    """Number of weights; tied embeddings count once."""
    return sum(
        source.parameters
        for name, source in sources.items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    )


def stored_dtype(sources: Mapping[str, WeightSource]) -> str:
    """Name of the dtype that the embeddings are stored in, or bfloat16 if they are quantized."""
    scheme = sources[EMBEDDINGS].scheme
    return scheme.dtype if isinstance(scheme, PlainScheme) else "bfloat16"


def in_memory(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy on the CPU. 16-bit experts (E, C_in, C_out) get the strides of (E, C_out, C_in).

    `model.layers.linear` is faster with those strides.
    """
    if weights.dim() < 3 or dtype == torch.float32:
        return weights.to(dtype, copy=True)
    turned = torch.empty(len(weights), weights.shape[2], weights.shape[1], dtype=dtype)
    for expert, source in zip(turned, weights, strict=True):
        expert.copy_(source.to(dtype).t())
    return turned.transpose(1, 2)


def _wanted_dtype(dtype: torch.dtype | str, example: WeightSource) -> torch.dtype:
    if dtype == "auto":
        return COMPUTED[stored_dtype({EMBEDDINGS: example})]
    wanted = COMPUTED.get(dtype) if isinstance(dtype, str) else dtype
    if wanted is None or wanted not in COMPUTED.values():
        raise CheckpointError(f"dtype {dtype!r} is not one of auto, {', '.join(COMPUTED)}")
    return wanted


def _checked_text(
    path: Path, config: TextConfig, attention: str = "sdpa"
) -> tuple[Transformer, dict[str, WeightSource]]:
    """The model on the meta device, and how its weights are stored."""
    with torch.device("meta"):
        model = Transformer(config, attention)
    stored = text_tensors(path)
    if config.tie_word_embeddings and EMBEDDINGS not in stored and "lm_head.weight" in stored:
        stored[EMBEDDINGS] = stored.pop("lm_head.weight")  # files may store either of the two
    optional = frozenset(["lm_head.weight"] if config.tie_word_embeddings else [])
    expected = _shapes(model)
    if (file := find_gguf(path)) is not None:
        check_complete(read_gguf(file), stored, expected.keys() - optional)
    return model, find_sources(path, stored, expected, quantization_settings(path), optional)


def _checked_vision(
    folder: Path, config: VisionConfig, text_hidden_size: int
) -> tuple[VisionTower, dict[str, WeightSource]]:
    with torch.device("meta"):
        tower = VisionTower(config, text_hidden_size)
    stored = vision_tensors(folder)
    if not stored:
        raise CheckpointError(
            f"{folder}: config.json describes a vision model, but none of its tensors is there; "
            "--no-images reads the text alone"
        )
    return tower, find_sources(folder, stored, _shapes(tower), quantization_settings(folder))


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


class _Loader:
    """Builds weights from mapped tensors, for a model that computes in `dtype` on `device`."""

    def __init__(self, dtype: torch.dtype, device: torch.device, is_mapped: bool) -> None:
        self.dtype = dtype
        self.device = device
        self.is_mapped = is_mapped and device.type == "cpu"
        self.files = MappedFiles()

    def fill_text(self, model: Transformer, sources: Mapping[str, WeightSource]) -> None:
        """Matrices keep their stored form, other weights are converted."""
        apart: dict[str, dict[str, WeightSource]] = {
            part.experts: {}
            for name, source in sources.items()
            if (part := ExpertPart.of(name)) is not None and not (part.is_fused and self._stays_a_tensor(source))
        }
        for name, source in sources.items():
            part = ExpertPart.of(name)
            if part is not None and part.experts in apart:
                apart[part.experts][name] = source
                continue
            path, _, parameter = name.rpartition(".")
            module, weight = model.get_submodule(path), self._weight(source)
            if isinstance(weight, Tensor) and weight.dtype != self.dtype:
                weight = PlainMatrix(weight) if weight.dim() == 2 else weight
            if path.endswith(".router") or not isinstance(module, Linear | Embedding):
                weight = self._converted(weight)
            set_weight(module, parameter, self._converted(weight) if isinstance(weight, Tensor) else weight)
        for path, those in apart.items():
            set_weight(model.get_submodule(path.rpartition(".")[0]), "experts", self._experts(those))

    def fill(self, model: nn.Module, sources: Mapping[str, WeightSource]) -> None:
        """All weights are converted."""
        for name, source in sources.items():
            path, _, parameter = name.rpartition(".")
            set_weight(model.get_submodule(path), parameter, self._converted(self._weight(source)))

    def _stays_a_tensor(self, source: WeightSource) -> bool:
        """Whether it is computed in its stored dtype, or in a narrower one that it is converted to."""
        if not isinstance(source.scheme, PlainScheme):
            return False
        stored = COMPUTED[source.scheme.dtype]
        return stored == self.dtype or stored.itemsize > self.dtype.itemsize

    def _weight(self, source: WeightSource, expert: int | None = None, *, is_turned: bool = False) -> Weight:
        """The weight, or one matrix of a stack, transposed if asked for; in memory unless it may stay mapped."""
        shape = source.shape
        tensors = {
            role: self.files.tensor(t, None if t.shape[:1] != shape[:1] else expert)
            for role, t in source.tensors.items()
        }
        shape = shape if expert is None else shape[1:]
        if not isinstance(source.scheme, PlainScheme):
            if not self.is_mapped:
                tensors = {role: tensor.to(self.device, copy=True) for role, tensor in tensors.items()}
            return source.scheme.build(tensors, shape)
        weight = tensors["weight"].t() if is_turned else tensors["weight"]
        dtype = self.dtype if self._stays_a_tensor(source) else weight.dtype
        if self.is_mapped and weight.dtype == dtype:
            return weight
        if self.device.type == "cpu":
            return in_memory(weight, dtype)
        return weight.to(device=self.device, dtype=dtype)

    def _converted(self, weight: Weight) -> Tensor:
        """As a tensor of the computing dtype."""
        if isinstance(weight, StoredMatrix):
            return weight.expanded(self.dtype)
        return weight.to(device=self.device, dtype=self.dtype)

    def _experts(self, sources: Mapping[str, WeightSource]) -> SplitExperts:
        """One layer's experts, from whatever parts they are stored in."""
        found: dict[int, dict[str, Weight]] = {}
        for name, source in sources.items():
            part = ExpertPart.of(name)
            assert part is not None, name
            for number in range(source.shape[0]) if part.expert is None else (part.expert,):
                weight = self._weight(source, number if part.expert is None else None, is_turned=part.is_fused)
                if isinstance(weight, Tensor) and weight.dtype != self.dtype:
                    weight = PlainMatrix(weight)
                found.setdefault(number, {})[part.kind] = weight
        return SplitExperts(
            Expert(gate=kinds.get("gate"), up=kinds.get("up"), gate_up=kinds.get("gate_up"), down=kinds["down"])
            for _, kinds in sorted(found.items())
        )


def _tie(folder: Path, model: Transformer, stored_apart: bool) -> None:
    embeddings = model.model.embed_tokens.weight
    if stored_apart and not _equal(model.lm_head.weight, embeddings):
        raise CheckpointError(
            f"{folder}: lm_head.weight differs from the embeddings, though tie_word_embeddings is "
            "true (transformers 4 would take the embeddings, 5 lm_head.weight, which false in "
            "config.json makes plain)"
        )
    set_weight(model.lm_head, "weight", embeddings)


def _equal(a: Weight, b: Weight) -> bool:
    """Whether two matrices hold the same numbers."""
    indices = torch.arange(a.shape[0]).split(COMPARED_ROWS)
    return all(torch.equal(looked_up(here, a, torch.float32), looked_up(here, b, torch.float32)) for here in indices)
