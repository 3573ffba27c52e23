"""FP8 weights of fused experts, as transformers writes them with FBGEMM. Linear layers are read with others' FP8.

Experts keep the published layout (E, C_in, C_out), and each output has a scale: (E, 1, C_out) for gate_up_proj, but
(E, C_out, 1) for down_proj, which does not broadcast.
"""

from __future__ import annotations

from model.quantization.float8 import Float8Scheme
from model.quantization.scaled import PER_CHANNEL, PER_TENSOR
from model.weights.companions import FLOATS, Companions
from model.weights.sources import Group, WeightSource


def read(group: Group) -> WeightSource | None:
    """See model.weights.sources.Reader."""
    codes = group.tensors.get("")
    if codes is None or codes.dtype != "F8_E4M3" or len(group.shape) != 3:
        return None
    return fused_float8(group, "_scale")


def fused_float8(group: Group, scale_suffix: str) -> WeightSource:
    """Fused FP8 experts with a scale a tensor, expert or output. Raises CheckpointError."""
    parts = Companions(group, "FP8 experts")
    codes, scale = parts.need("", ["F8_E4M3"]), parts.need(scale_suffix, FLOATS)
    parts.check_shape(codes, group.shape)
    experts, outputs = group.shape[0], group.shape[-1]
    whole = ((), (1,), (experts,), (experts, 1), (experts, 1, 1))
    channels = ((experts, outputs), (experts, 1, outputs), (experts, outputs, 1))
    parts.check_shape(scale, *whole, *channels)
    parts.finish()
    scheme = Float8Scheme(PER_TENSOR if scale.shape in whole else PER_CHANNEL, is_transposed=True)
    return WeightSource(group.shape, scheme, {"codes": codes, "scale": scale})
