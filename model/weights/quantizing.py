"""Quantizes weights while they are loaded: each as it is built, so that memory holds the result and one tensor more."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from model.errors import CheckpointError
from model.quantization.affine import AffineScheme
from model.quantization.choice import CHANNEL, Quantization
from model.quantization.float8 import Float8Scheme
from model.quantization.form import Weight
from model.quantization.rounding import to_float8, to_int4, to_int8
from model.quantization.scaled import PER_CHANNEL, Grain
from model.weights.expert_parts import ExpertPart
from model.weights.plain import PlainScheme
from model.weights.sources import WeightSource


@dataclass(frozen=True)
class QuantizingScheme:
    """What a floating-point weight becomes. Role: "weight"; (C_in, C_out) of one expert if `is_turned`."""

    quantization: Quantization
    is_turned: bool
    columns: int  # C_in

    @property
    def label(self) -> str:
        return self._scheme.label

    def build(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Weight:
        weight = tensors["weight"].t() if self.is_turned else tensors["weight"]
        made = quantized(weight, self.quantization)
        return self._scheme.build(made, (weight.shape[0], weight.shape[1]))

    @property
    def _scheme(self) -> AffineScheme | Float8Scheme:
        size = self.quantization.group_size(self.columns)
        assert size is not None, self
        if self.quantization.kind == "fp8":
            return Float8Scheme(PER_CHANNEL)
        if size == CHANNEL:
            return AffineScheme(8, PER_CHANNEL, is_packed=False)
        return AffineScheme(4, Grain(1, size))


@dataclass(frozen=True)
class QuantizedSource(WeightSource):
    """A weight that is stored in a floating-point dtype and will be held quantized."""

    scheme: QuantizingScheme

    @property
    def num_bytes(self) -> int:
        """Once it is quantized."""
        columns = self.scheme.columns
        of_row = self.scheme.quantization.num_bytes(1, columns)
        assert of_row is not None
        return math.prod(self.shape) // columns * of_row


def quantized(weight: Tensor, quantization: Quantization) -> dict[str, Tensor]:
    """Codes and scales of a matrix (C_out, C_in), new tensors."""
    size = quantization.group_size(weight.shape[1])
    assert size is not None, (weight.shape, quantization)
    if quantization.kind == "fp8":
        return to_float8(weight)
    return to_int8(weight) if size == CHANNEL else to_int4(weight, size)


def quantized_sources(
    sources: Mapping[str, WeightSource], quantization: Quantization | None
) -> dict[str, WeightSource]:
    """The sources, those that `quantization` covers as QuantizedSource; already quantized ones stay.

    Raises CheckpointError if none is covered.
    """
    if quantization is None:
        return dict(sources)
    made = {name: _source(name, source, quantization) for name, source in sources.items()}
    if all(made[name] is source for name, source in sources.items()):
        covered = next((source for name, source in sources.items() if quantization.covers(name)), None)
        stored = "no weights that it applies to" if covered is None else f"stored as {covered.scheme.label}"
        raise CheckpointError(f"--quantize {quantization.kind}: nothing to quantize: {stored}; leave it out")
    return made


def _source(name: str, source: WeightSource, quantization: Quantization) -> WeightSource:
    if not isinstance(source.scheme, PlainScheme) or not quantization.covers(name):
        return source
    part = ExpertPart.of(name)
    is_turned = part is not None and part.is_fused
    columns = source.shape[-2 if is_turned else -1]
    if quantization.group_size(columns) is None:
        return source
    return QuantizedSource(source.shape, QuantizingScheme(quantization, is_turned, columns), source.tensors)
