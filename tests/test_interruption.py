"""Ctrl-C at any moment of a forward leaves the cache either as it was or with the whole step committed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cached_paths import new_cache

from cache.chunked import ChunkedKVCache
from cache.offloaded import OffloadedKVCache
from model.checkpoint import load_checkpoint


class InterruptedOnce:
    """Wraps a method: its `number`-th call raises KeyboardInterrupt, before its work or after it."""

    def __init__(self, method: Callable[..., Any], number: int, *, after: bool) -> None:
        self.method, self.left, self.after = method, number, after

    def __get__(self, instance: object, owner: type) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.left -= 1
            if self.left == 0 and not self.after:
                raise KeyboardInterrupt
            result = self.method(instance, *args)
            if self.left == 0:
                raise KeyboardInterrupt
            return result
        return call


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("kind", "name"), [
    (ChunkedKVCache, "append"), (ChunkedKVCache, "finish"), (ChunkedKVCache, "settle"),
    (OffloadedKVCache, "append"), (OffloadedKVCache, "settle"),
])
def test_the_cache_goes_on_from_its_offset(toys: Any, monkeypatch: pytest.MonkeyPatch, kind: type, name: str,
                                           after: bool) -> None:
    """Steps shorter and longer than the attention chunk of 7, begun inside one and at its boundary."""
    model = load_checkpoint(toys("scout", 0.25).folder, dtype=torch.float32)
    ids = torch.arange(61).remainder(model.config.vocab_size)[None]
    expected = model(ids)
    assert expected is not None
    for number in (1, 2, 5, 7, 13, 20):
        cache = new_cache(model, ids)
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, InterruptedOnce(getattr(kind, name), number, after=after))
            while cache.offset < ids.shape[1]:
                start = cache.offset
                stop = min(start + (5, 16, 9, 2, 14)[start % 5], ids.shape[1])
                try:
                    logits = model(ids[:, start:stop], cache)
                except KeyboardInterrupt:
                    assert cache.offset in (start, stop)
                    continue
                assert logits is not None
                difference = (logits - expected[:, start:stop]).abs().max()
                assert difference <= 1e-5 * expected.abs().max()
