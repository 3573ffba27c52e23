"""What one rank computes in each layer, and what comes to its GPU for it. Closed forms; imports no torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from l4ctx.planning.mesh import RankPlan
from model.costs import kv_size, layer_parameters


@dataclass(frozen=True)
class LayerKind:
    """Layers that take equally long: what a rank does for a token, and reads for all of them."""

    is_whole: bool  # False: keys and values alone are computed, as in the last layer while a prompt is read
    uses_rope: bool
    parameters: int  # that a token multiplies
    weight_bytes: int  # of these
    copied: int  # bytes of weights that come from host memory

    @property
    def is_nope(self) -> bool:
        """Whether all keys and values are attended."""
        return self.is_whole and not self.uses_rope


def layer_kinds(rank: RankPlan, *, is_decode: bool) -> Counter[LayerKind]:
    """How many layers there are of each kind, in a prefill step or for a token of an answer."""
    layers, config = _layers(rank), rank.exchange.config
    if not is_decode:
        keys_values = 2 * config.hidden_size * kv_size(config)
        layers[-1] = replace(layers[-1], is_whole=False, parameters=keys_values)
    return Counter(layers)


def _layers(rank: RankPlan) -> list[LayerKind]:
    config, plan = rank.exchange.config, rank.plan
    stored, device = plan.workload.stored, plan.device_weights
    assert stored is not None
    found = []
    for number, layer in enumerate(stored.layers_in(rank.workload.dtype)):
        active = layer.always + layer.experts * config.num_experts_per_tok // config.num_local_experts
        copied = device.residency.streamed(number).total if device else 0
        parameters = layer_parameters(config, number, active=True)
        found.append(LayerKind(True, config.uses_rope(number), parameters, active, copied))
    return found


@dataclass(frozen=True)
class Copies:
    """What comes to a rank's GPU in every step. Rates in bytes a second."""

    rank: RankPlan
    host_link: float
    disk: float

    def seconds(self, kind: LayerKind, tokens: int) -> float:
        """In which what a layer needs arrives, once so many tokens are read."""
        host, disk = self.num_bytes(kind, tokens)
        return max(host / self.host_link, disk / self.disk)

    def num_bytes(self, kind: LayerKind, tokens: int) -> tuple[int, int]:
        """Bytes that come to the GPU for a layer, and how many of them are read from disk before."""
        layout, weights = self.rank.plan.layout, self.rank.plan.device_weights
        host, disk = self._rows(tokens) if kind.is_nope else (0, 0)
        a_row = layout.segments_per_block * layout.sealed_segment_bytes
        weights_on_disk = weights is not None and not weights.is_pinned
        return kind.copied + (host + disk) * a_row, disk * a_row + kind.copied * weights_on_disk

    def tokens(self, tokens: int) -> int:
        """How many of a rank's tokens have their NoPE keys and values elsewhere, once so many are read by all."""
        return sum(self._rows(tokens)) * self.rank.plan.layout.block_tokens

    def _rows(self, tokens: int) -> tuple[int, int]:
        """Blocks of one NoPE layer that a rank holds in host memory, and on disk alone."""
        plan = self.rank.plan
        own = self.rank.mesh.tokens_of_a_rank(self.rank.workload.config, tokens)
        _, host, disk = plan.residency.split(plan.layout.sealed_rows(own))
        return host, disk
