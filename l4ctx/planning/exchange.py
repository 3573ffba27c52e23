"""What the ranks of a mesh tell one another: bytes that each of them sends, in closed form. Imports no torch.

A sum over n ranks is counted as a ring has it: 2 (n - 1) / n of its bytes from each rank
(https://arxiv.org/abs/1909.08053 has two of them a layer). Sums are in float32, as `model.parallel` makes them. What
context ranks exchange follows from `model.context_division`.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import TextConfig
from model.context_division import ContextRank, Exchanged, exchanged

FLOAT32 = 4


@dataclass(frozen=True)
class Exchange:
    """By one tensor rank's configuration, whose heads are its own."""

    config: TextConfig
    tensor: int  # ranks that divide the layers
    context: int  # ranks that divide the text
    itemsize: int  # of the type computed in

    def sums(self, tokens: int) -> int:
        """Bytes that a rank sends for one sum over the tensor ranks, (tokens, hidden_size)."""
        return 2 * (self.tensor - 1) * tokens * self.config.hidden_size * FLOAT32 // self.tensor

    @property
    def logits(self) -> int:
        """Bytes that a rank sends for one token's logits, gathered from the tensor ranks."""
        return (self.tensor - 1) * self.config.vocab_size * self.itemsize // self.tensor

    def nope_layer(self, positions: range) -> Exchanged:
        """In one NoPE layer of a forward over these positions, from all context ranks together."""
        pieces = list(ContextRank(0, self.context).pieces(positions, self.config.attention_chunk_size))
        return exchanged(self.config, self.context, pieces, self.itemsize)
