"""One rank's part of every stored form: together the ranks compute what one process computes, and read each byte once.

The ranks are threads here; processes are in tests/model/test_parallel.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import TextConfig
from model.division import TensorRank, division_of
from model.errors import CheckpointError, DivisionError
from model.quantization.choice import Quantization
from model.transformer import Transformer
from model.weights.cutting import cut_sources, read_bytes
from model.weights.loading import checked_sources, load_checkpoint
from model.weights.sources import StoredPart, WeightSource
from support.compressed import RECIPES
from support.quantized_toys import write_compressed, write_fused
from support.rank_threads import ThreadExchange, Together
from support.toy_checkpoints import DIVISIBLE, MAVERICK, SCOUT, VOCABULARY, Kind, write_kind

MOE, DENSE, NESTED = Kind(DIVISIBLE | SCOUT), Kind(DIVISIBLE | MAVERICK), Kind(DIVISIBLE | SCOUT, nested=True)
LINEAR, HEAD = ["Linear"], "re:.*lm_head"

PLAIN = {
    "as published": MOE,
    "dense layers, biases": Kind(DIVISIBLE | MAVERICK | {"attention_bias": True}),
    "tied": Kind(DIVISIBLE | {"tie_word_embeddings": True}),
    "bfloat16, two experts a token": Kind(DIVISIBLE | {"num_experts_per_tok": 2}, dtype=torch.bfloat16),
}
COMPRESSED: dict[str, tuple[Kind, str]] = {
    "int4": (NESTED, "w4a16"),
    "int4 with zero points, dense layers": (DENSE, "w4a16_asym"),
    "int8": (DENSE, "int8"),
    "FP8 per channel": (NESTED, "fp8_dynamic"),
    "FP8 per tensor": (MOE, "fp8_tensor"),
    "NVFP4": (NESTED, "nvfp4"),
}
FUSED = {"modelopt FP8": (NESTED, "FP8"), "modelopt NVFP4": (DENSE, "NVFP4"), "FBGEMM": (NESTED, "fbgemm_fp8")}
FORMS = [*PLAIN, *COMPRESSED, *FUSED]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of checkpoints by name, each written once."""
    root = tmp_path_factory.mktemp("cut")

    def write(name: str) -> Path:
        folder = root / name / "stored"
        if folder.exists():
            return folder
        if name in PLAIN:
            write_kind(folder, name, PLAIN[name], 0.2, seed=3)
        elif name in FUSED:
            write_fused(folder.parent, *FUSED[name])
        else:
            kind, recipe = COMPRESSED[name]
            write_compressed(folder.parent, kind, {"a": (RECIPES[recipe], LINEAR)}, [HEAD])
        return folder

    return write


def ids() -> Tensor:
    return torch.randint(VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(5))


def logits(model: Transformer) -> Tensor:
    found = model(ids())
    assert found is not None
    return found


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", FORMS)
def test_ranks_compute_what_one_process_computes(written: Callable[[str], Path], name: str, count: int) -> None:
    """With four ranks, each KV head is on two."""
    folder = written(name)
    expected = logits(load_checkpoint(folder, dtype="float32"))

    def one(exchange: ThreadExchange) -> Tensor:
        model = load_checkpoint(folder, dtype="float32", exchange=exchange, is_mapped=exchange.rank.number % 2 == 0)
        return logits(model)

    for found in Together(count).run(one):
        assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", FORMS)
def test_each_byte_is_read_by_one_rank_unless_all_need_it(
    written: Callable[[str], Path], name: str, count: int
) -> None:
    folder = written(name)
    config = TextConfig.from_folder(folder)
    whole = checked_sources(folder, config)
    ranks = [cut_sources(whole, config, TensorRank(number, count)) for number in range(count)]
    copies = max(1, count // config.num_key_value_heads)
    for weight, source in whole.items():
        is_divided = division_of(weight, config, TensorRank(0, count)) is not None
        is_kv = ".k_proj." in weight or ".v_proj." in weight
        for role, tensor in source.tensors.items():
            read = [rank[weight].tensors[role].num_bytes for rank in ranks if weight in rank]
            if max(read) == tensor.num_bytes:  # norms, routers, and scales of a whole tensor or its outputs
                assert not is_divided or role != "weight"
                continue
            assert sum(read) == tensor.num_bytes * (copies if is_kv else 1), (weight, role)
            assert max(read) - min(read) <= tensor.num_bytes // config.vocab_size + 1, (weight, role)


def test_a_rank_holds_its_share_in_memory(written: Callable[[str], Path]) -> None:
    """What is loaded is what the cut sources say."""
    folder = written("as published")
    config = TextConfig.from_folder(folder)
    whole = checked_sources(folder, config)

    def one(exchange: ThreadExchange) -> tuple[int, int]:
        model = load_checkpoint(folder, exchange=exchange, is_mapped=False)
        return model.weight_bytes, sum(s.num_bytes for s in cut_sources(whole, config, exchange.rank).values())

    for held, said in Together(2).run(one):
        assert held == said < 0.6 * sum(source.num_bytes for source in whole.values())


def test_weights_are_quantized_after_they_are_cut(written: Callable[[str], Path]) -> None:
    """Groups that lie within a rank's columns are those of one process, so the weights are the same."""
    folder = written("as published")
    options: dict[str, Any] = {"dtype": "float32", "quantization": Quantization("int4-g32")}
    expected = logits(load_checkpoint(folder, **options))
    for found in Together(2).run(lambda exchange: logits(load_checkpoint(folder, exchange=exchange, **options))):
        assert (found - expected).abs().max() <= 1e-4


def test_ranks_agree_when_they_decode(written: Callable[[str], Path]) -> None:
    folder = written("as published")
    found = Together(4).run(lambda exchange: logits(load_checkpoint(folder, exchange=exchange)))
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize(
    ("count", "changes", "named"),
    [
        (3, {}, "num_attention_heads 8"),
        (8, {"intermediate_size": 100}, "intermediate_size 100"),
        (4, {"num_attention_heads": 12, "num_key_value_heads": 3}, "num_key_value_heads 3"),
    ],
)
def test_sizes_that_cannot_be_divided_are_refused(
    tmp_path: Path, count: int, changes: dict[str, int], named: str
) -> None:
    folder = tmp_path / "toy"
    write_kind(folder, "toy", Kind(DIVISIBLE | changes), 0.2, seed=3)
    with pytest.raises(DivisionError, match=f"{count} ranks: {named} "):
        Together(count).run(lambda exchange: load_checkpoint(folder, exchange=exchange))


def test_groups_that_ranks_would_cut_are_refused(tmp_path: Path) -> None:
    kind = Kind(DIVISIBLE | SCOUT | {"intermediate_size": 48})  # groups of 16; a quarter is 12
    write_compressed(tmp_path, kind, {"a": (RECIPES["w4a16"], LINEAR)}, [HEAD])
    folder = tmp_path / "stored"
    load_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"is stored as w4a16 .* cannot be divided over 4 ranks between inputs"):
        Together(4).run(lambda exchange: load_checkpoint(folder, exchange=exchange))


@pytest.mark.parametrize("name", ["bfloat16, two experts a token", "int4", "FP8 per channel"])
def test_a_rank_reads_its_share_and_what_is_replicated(
    written: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """Counted byte by byte in the files: each byte of the text model is one rank's or all ranks', the others' may be
    anything, and what is replicated is little."""
    count, folder = 2, written(name)
    config, files = TextConfig.from_folder(folder), sorted(folder.glob("*.safetensors"))
    whole = checked_sources(folder, config)
    ranks = [cut_sources(whole, config, TensorRank(number, count)) for number in range(count)]
    read = [{file: bytes_of(sources, file) for file in files} for sources in ranks]
    for sources, masks in zip(ranks, read, strict=True):
        assert sum(int(mask.sum()) for mask in masks.values()) == sum(x.num_bytes for x in sources.values())
    total = {file: bytes_of(whole, file) for file in files}
    together = {file: sum(masks[file].int() for masks in read) for file in files}
    assert all(torch.equal(together[file] > 0, total[file]) for file in files)
    replicated = sum(int((together[file] == count).sum()) for file in files)
    assert 0 < replicated < 0.1 * sum(int(mask.sum()) for mask in total.values())
    for number, masks in enumerate(read):
        own = sum(int(mask.sum()) for mask in masks.values()) - replicated
        assert read_bytes(whole, config, TensorRank(number, count)) == (own, replicated)
    expected = Together(count).run(lambda exchange: tensors(load_checkpoint(folder, exchange=exchange)))
    for number, masks in enumerate(read):
        poisoned = Path(shutil.copytree(folder, tmp_path / str(number)))
        for file, mask in masks.items():
            content = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
            content[~mask & total[file]] = 0xFF
            (poisoned / file.name).write_bytes(content.numpy().tobytes())
        found = Together(count).run(lambda exchange, own=poisoned: tensors(load_checkpoint(own, exchange=exchange)))
        assert all(torch.equal(a, b) for a, b in zip(found[number], expected[number], strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(found[1 - number], expected[1 - number], strict=True))


def tensors(model: Transformer) -> list[Tensor]:
    """All that a rank holds, as bytes."""
    return [x.detach().contiguous().view(torch.uint8).clone() for x in (*model.parameters(), *model.buffers())]


def bytes_of(sources: Mapping[str, WeightSource], file: Path) -> Tensor:
    """Which bytes of the file these weights are made of."""
    found = torch.zeros(file.stat().st_size, dtype=torch.bool)
    for source in sources.values():
        for tensor in source.tensors.values():
            if tensor.file.name != file.name:
                continue
            if not isinstance(tensor, StoredPart):
                found[tensor.offset : tensor.offset + tensor.num_bytes] = True
                continue
            whole = tensor.whole
            here = found[whole.offset : whole.offset + whole.num_bytes].view(*whole.shape, -1)
            for part in tensor.parts:
                here.narrow(tensor.axis - 1, part.start, len(part)).fill_(True)
    return found
