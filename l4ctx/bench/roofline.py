"""The roofline of l4ctx on this machine: operations and bytes in closed form, and measured times as multiples of it.

Only useful work counts: not what a mask hides, what is skipped, or what is computed twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.config import TextConfig
from model.costs import Operations, kv_size, layer_parameters, query_size, reading_operations, weights_a_token


def first_token_operations(config: TextConfig, tokens: int) -> Operations:
    """Operations to read `tokens` tokens and compute the logits after them.

    The last layer counts for one token, but its keys and values for all.
    """
    c, q, kv = config.hidden_size, query_size(config), kv_size(config)
    read, last = reading_operations(config, 0, tokens), config.num_hidden_layers - 1
    linear = 2 * layer_parameters(config, last, active=True) - 2 * 2 * c * kv + 2 * c * config.vocab_size
    pairs = 4 * q * visible_tokens(config, last, tokens - 1)
    is_chunked = config.uses_rope(last)
    return replace(
        read,
        linear=read.linear + linear,
        chunked_attention=read.chunked_attention + (pairs if is_chunked else 0),
        full_attention=read.full_attention + (0 if is_chunked else pairs),
    )


def visible_tokens(config: TextConfig, layer: int, position: int) -> int:
    """Keys that the query at a position attends to in a layer, its own included."""
    return position % config.attention_chunk_size + 1 if config.uses_rope(layer) else position + 1


def weight_bytes(config: TextConfig, itemsize: int) -> int:
    """Bytes of weights that decoding a token must read: the matrices, norms, biases, and one row of the embeddings."""
    c = config.hidden_size
    biases = query_size(config) + 2 * kv_size(config) + c if config.attention_bias else 0
    vectors = 2 * c + config.num_hidden_layers * (2 * c + biases)  # the embedding and the last norm, those of layers
    return (weights_a_token(config) + vectors) * itemsize


def kv_bytes(config: TextConfig, position: int, itemsize: int) -> int:
    """Bytes of keys and values that the token at a position attends to."""
    elements = 2 * kv_size(config) * itemsize
    return sum(elements * visible_tokens(config, layer, position) for layer in range(config.num_hidden_layers))


def decoding_bytes(
    config: TextConfig, tokens: int, decode_tokens: int, itemsize: int, weights: int | None = None
) -> int:
    """Bytes that must be read to decode so many tokens after the first one, which follows `tokens` tokens.

    `weights`: those of the weights that one token reads as they are stored; by default all are of `itemsize`.
    """
    each = weight_bytes(config, itemsize) if weights is None else weights
    positions = range(tokens, tokens + decode_tokens)
    return decode_tokens * each + sum(kv_bytes(config, position, itemsize) for position in positions)


def prefill_share(
    config: TextConfig, tokens: int, seconds: float, ceilings: Mapping[str, Any], dtype: str, attention: str | None
) -> dict[str, Any] | None:
    """Seconds that the kernels alone would take for the useful operations, and the measured time as a multiple of it.

    None where the ceiling of a kernel is not known.
    """
    product = ceilings["product"].get(dtype)
    kernel = ceilings["attention"].get(attention or "", {}).get(dtype)
    if product is None or kernel is None:
        return None
    operations = first_token_operations(config, tokens)
    predicted = operations.linear / product + (operations.chunked_attention + operations.full_attention) / kernel
    return {
        "linear_operations": operations.linear,
        "chunked_attention_operations": operations.chunked_attention,
        "full_attention_operations": operations.full_attention,
        "predicted_seconds": predicted,
        "seconds": seconds,
        "times_predicted": seconds / predicted,
        "operations_per_second": operations.total / seconds,
    }


def decode_share(
    config: TextConfig,
    tokens: int,
    decode_tokens: int,
    seconds: float,
    ceilings: Mapping[str, Any],
    itemsize: int,
    weights: int | None = None,
) -> dict[str, Any]:
    """The same for decoding: the bytes that must be read, at the best rate of reading weights."""
    count = decoding_bytes(config, tokens, decode_tokens, itemsize, weights)
    rate = max(ceilings["read"].values())
    return {
        "bytes": count,
        "predicted_seconds": count / rate,
        "seconds": seconds,
        "times_predicted": seconds * rate / count,
        "bytes_per_second": count / seconds,
    }
