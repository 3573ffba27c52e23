"""Saved contexts with images: equal tokens are not equal images."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cache.hybrid import HybridKVCache
from l4ctx.contexts.reader import ContextReader
from l4ctx.contexts.reuse import reusable
from l4ctx.engine.prefill import as_batch, prefill
from l4ctx.spans import ImageSpan
from support import context_toys
from support.context_toys import CONFIG, Kind, close, model, tokens

KIND = Kind()
CHUNK, BLOCK = CONFIG.attention_chunk_size, KIND.block_tokens
LENGTH = 3 * BLOCK + 5
IDS = tokens(LENGTH)
IMAGES = (ImageSpan(4, 9, "aa" * 32), ImageSpan(2 * BLOCK + CHUNK + 1, 2 * BLOCK + CHUNK + 4, "bb" * 32))
CHANGED = (IMAGES[0], IMAGES[1]._replace(sha256="cc" * 32))


class Features:
    """Stands in for image features: every position of an image gets a value derived from its digest."""

    def __init__(self, images: tuple[ImageSpan, ...]) -> None:
        self.images = images

    def among(self, positions: range) -> list[ImageSpan]:
        return [span for span in self.images if set(range(span.start, span.stop)) & set(positions)]

    @torch.inference_mode()
    def splice(self, embeddings: Tensor, ids: Tensor, positions: range) -> None:
        for span in self.among(positions):
            for position in set(range(span.start, span.stop)) & set(positions):
                generator = torch.Generator().manual_seed(int(span.sha256[:4], 16) + position - span.start)
                embeddings[0, position - positions.start] = torch.randn(embeddings.shape[-1], generator=generator)


def read(cache: HybridKVCache, images: tuple[ImageSpan, ...]) -> Tensor:
    """The rest of IDS; the logits of its last token."""
    for _ in prefill(
        model(),
        cache,
        memoryview(IDS)[cache.offset : -1],
        prefill_chunk_size=KIND.prefill_chunk_size,
        features=Features(images),
    ):  # type: ignore[arg-type]
        pass
    logits = model()(as_batch(IDS[-1:], torch.device("cpu")), cache, "last")
    assert logits is not None
    return logits


def keep(folder: Path, images: tuple[ImageSpan, ...]) -> int:
    """Reads into the context; returns how many tokens it held already."""
    return context_toys.keep(folder, IDS, KIND, images=images, features=Features(images))


def from_context(folder: Path, images: tuple[ImageSpan, ...]) -> tuple[int, Tensor]:
    """How many tokens of the context can be reused with these images, and the logits that follow."""
    with closing(ContextReader(folder)) as reader:
        layout = KIND.layout(LENGTH)
        reuse = reusable(reader.context, memoryview(IDS)[:-1], layout, [reader.state], images)
        cache = HybridKVCache(CONFIG, length=LENGTH, layout=layout)
        if reuse.tokens:
            reader.context.restore(reader.state, cache, reuse.tokens)
        return reuse.tokens, read(cache, images)


def fresh(images: tuple[ImageSpan, ...]) -> Tensor:
    return read(HybridKVCache(CONFIG, length=LENGTH, layout=KIND.layout(LENGTH)), images)


def test_the_digests_are_kept(tmp_path: Path) -> None:
    assert keep(tmp_path / "c", IMAGES) == 0 and keep(tmp_path / "c", IMAGES) == LENGTH
    with closing(ContextReader(tmp_path / "c")) as reader:
        assert tuple(reader.context.images(reader.state)) == IMAGES
    keep(tmp_path / "text", ())
    with closing(ContextReader(tmp_path / "text")) as reader:
        assert reader.context.images(reader.state) == []


@pytest.mark.parametrize(
    ("images", "first_difference"),
    [
        (IMAGES, LENGTH),
        (CHANGED, IMAGES[1].start),
        (IMAGES[:1], IMAGES[1].start),
        ((), IMAGES[0].start),
        (IMAGES[1:], IMAGES[0].start),
    ],
)
def test_a_context_serves_up_to_the_first_other_image(
    tmp_path: Path, images: tuple[ImageSpan, ...], first_difference: int
) -> None:
    keep(tmp_path / "c", IMAGES)
    served, logits = from_context(tmp_path / "c", images)
    assert served == min(first_difference, LENGTH - 1) // CHUNK * CHUNK
    assert close(logits, fresh(images))
    assert keep(tmp_path / "c", images) == (LENGTH if images == IMAGES else served)
    assert close(from_context(tmp_path / "c", images)[1], logits)


def test_other_images_give_other_answers() -> None:
    """Otherwise the tests above would prove nothing."""
    assert (fresh(IMAGES) - fresh(CHANGED)).abs().max() > 1e-2


def test_a_damaged_list_of_images_is_named(tmp_path: Path) -> None:
    from cache.errors import DiskError

    keep(tmp_path / "c", IMAGES)
    file = next((tmp_path / "c").glob("tokens-*.safetensors"))
    content = bytearray(file.read_bytes())
    at = content.index(b"bb" * 32)
    content[at] ^= 1
    file.write_bytes(content)
    with closing(ContextReader(tmp_path / "c")) as reader, pytest.raises(DiskError, match=file.name):
        reader.context.images(reader.state)
