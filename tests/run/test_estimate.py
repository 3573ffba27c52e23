"""`l4ctx plan`'s reports: of tokens without torch, of documents as they are tokenized, and of machines of all kinds."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from cache import layout as store_layout
from cache.disk import Scratch, UnitFile
from cache.hybrid import HybridKVCache
from l4ctx.checkpoint.chat_template import ChatTemplate
from l4ctx.checkpoint.tokenizer import Tokenizer
from l4ctx.cli.tables.plan import plan_table
from l4ctx.documents.document import DocumentError
from l4ctx.documents.reader import read_documents
from l4ctx.engine.prefill import prefill
from l4ctx.errors import RequestError
from l4ctx.formatting import human_bytes
from l4ctx.machine import device as device_module
from l4ctx.machine import processor
from l4ctx.planning import step_time
from l4ctx.planning.fitting import plan_memory
from l4ctx.planning.memory_plan import MARGIN_BYTES
from l4ctx.planning.published import PUBLISHED
from l4ctx.planning.speed import Speed, measured_speed
from l4ctx.prompt.builder import build_prompt
from l4ctx.run import estimate, sizing
from l4ctx.run.estimate import PlanReport, make_plan
from l4ctx.run.forms import read_a_token
from l4ctx.run.measuring import feed_forward_weight
from model.config import TextConfig
from model.costs import parameter_count, reading_operations
from model.errors import ConfigError, UserError
from model.quantization.affine import AffineMatrix
from model.quantization.float8 import Float8Matrix
from model.quantization.form import StoredMatrix
from model.quantization.plain import PlainMatrix
from model.weights.loading import load_checkpoint
from support.counts import small_parameter_count
from support.gguf_files import all_in, write_gguf
from support.places import ROOT, TINY
from support.quantized_checkpoints import KINDS
from support.quantized_toys import write_fused
from support.requests import plan_request
from support.toy_checkpoints import write_kind

KIB, GIB = 2**10, 2**30

SCOUT = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "model_type": "llama4",
    "torch_dtype": "bfloat16",
    "text_config": {"model_type": "llama4_text", "max_position_embeddings": 10485760, "no_rope_layers": []},
}


@pytest.fixture
def scout(tmp_path: Path) -> Path:
    """A folder with nothing but a configuration of Scout's shape."""
    folder = tmp_path / "scout"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SCOUT))
    return folder


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 GiB of memory, 100 GiB on disk, no GPU, quick bfloat16 products."""
    monkeypatch.setattr(processor, "has_fast_bfloat16", lambda: True)
    monkeypatch.setattr(sizing, "available_memory", lambda: 24 * GIB)
    monkeypatch.setattr(sizing, "available_disk", lambda folder: 100 * GIB)
    monkeypatch.setattr(device_module, "available_on_gpu", lambda index: None)
    monkeypatch.setattr(device_module, "_torch_may_use_gpus", lambda: True)


def gpus(monkeypatch: pytest.MonkeyPatch, *free: int) -> None:
    monkeypatch.setattr(device_module, "available_on_gpu", lambda index: dict(enumerate(free)).get(index))


def planned(model: Path, **options: Any) -> PlanReport:
    notes: list[str] = []
    report = make_plan(plan_request(model, **options), notes.append)
    assert report.notes == notes
    return report


@pytest.mark.parametrize("tokens", [10**6, 10**7])
def test_a_number_of_tokens_needs_neither_torch_nor_shards(scout: Path, tokens: int) -> None:
    code = (
        "import json, pathlib, sys; from l4ctx.run.estimate import make_plan; "
        "from l4ctx.run.request import ComputeOptions, PlanRequest; "
        f"request = PlanRequest(pathlib.Path({str(scout)!r}), tokens={tokens}, "
        "compute=ComputeOptions('cpu', 'bfloat16')); "
        "report = make_plan(request, str); "
        "heavy = {'torch', 'numpy', 'tokenizers', 'safetensors', 'rich', 'jinja2'} & set(sys.modules); "
        "print(json.dumps([sorted(heavy), report.as_dict()]))"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    heavy, report = json.loads(result.stdout)
    assert heavy == []
    plan = report["plan"]
    assert plan["nope_host"] == tokens * 48 * KIB and plan["rope_windows"] == 1.125 * GIB
    assert plan["weights"] == 2 * parameter_count(TextConfig.from_dict(SCOUT)) and plan["weights_are_mapped"]
    assert (report["prompt_tokens"], report["max_new_tokens"], plan["tokens"]) == (tokens, 0, tokens)
    assert report["documents"] == [] and report["seconds"] is None and report["exceeds_positions"] is False


def test_what_fits(scout: Path, tmp_path: Path) -> None:
    report = planned(scout, tokens=10**6)
    assert not report.fits and list(report.shortfalls) == ["memory"] and report.tokens_with_disk is None
    assert 480_000 < report.tokens_in_memory < 500_000 and report.as_dict()["remedies"][0].startswith("--kv-dir DIR")
    shorter = planned(scout, tokens=report.tokens_in_memory)
    assert shorter.fits and shorter.shortfalls == {} and shorter.as_dict()["remedies"] == []
    on_disk = planned(scout, tokens=10**6, kv_dir=tmp_path)
    assert on_disk.fits and on_disk.tokens_in_memory == report.tokens_in_memory
    assert on_disk.tokens_with_disk is not None
    more = on_disk.tokens_with_disk - on_disk.tokens_in_memory
    assert more == pytest.approx(100 * GIB / (48 * KIB), rel=0.02)
    assert on_disk.capacity.disk_folder == str(tmp_path)


def test_billions_of_steps_are_estimated_at_once(scout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"tokens": 2**20, "prefill_chunk_size": 256, "weights_memory": 4 * GIB, "rate": 1e12}
    apart = planned(scout, **options)
    monkeypatch.setattr(step_time, "MOST_PARTS", 100)
    together = planned(scout, **options)
    assert apart.seconds is not None and together.seconds == pytest.approx(apart.seconds, rel=0.01)
    assert together.weights_read == apart.weights_read > 0
    assert (planned(scout, **options | {"tokens": 2**31 - 1, "prefill_chunk_size": 1}).seconds or 0) > apart.seconds


def test_more_tokens_than_positions(scout: Path) -> None:
    report = planned(scout, tokens=10485760, max_new_tokens=1)
    assert report.exceeds_positions and not report.fits
    assert not planned(scout, tokens=10485760).exceeds_positions
    assert planned(scout, tokens=100, max_new_tokens=20).plan.workload.length == 120


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of them"),
        ({"tokens": 5, "paths": ["x"]}, "give one of them"),
        ({"tokens": 0}, "0 is not a positive number"),
        ({"tokens": 5, "device": "abacus"}, "no such device"),
        ({"tokens": 5, "device": "auto:1"}, "no such device"),
        ({"tokens": 5, "device": "cuda:x"}, "no such device"),
        ({"tokens": 5, "kv_device_memory": 7}, "--kv-device-memory: the model computes on the CPU"),
        ({"tokens": 5, "rate": 0.0}, "--rate: 0.0 is not"),
        ({"tokens": 5, "rate": math.inf}, "--rate: inf is not"),
        pytest.param({"tokens": 5, "device": "cuda:99"}, "torch finds no such GPU"),
    ],
)
def test_what_cannot_be_planned(scout: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        planned(scout, **options)
    with pytest.raises(ConfigError, match=r"no config\.json there"):
        planned(scout / "nowhere", tokens=5)


def test_the_dtype(scout: Path) -> None:
    def dtypes(**options: Any) -> tuple[str, str]:
        plan = planned(scout, tokens=9000, **options).plan.as_dict()
        return plan["dtype"], plan["kv_dtype"]

    assert dtypes() == ("bfloat16", "bfloat16") and dtypes(kv_dtype="int8") == ("bfloat16", "int8")
    assert dtypes(dtype="float32") == ("float32", "float32")
    config = TextConfig.from_folder(scout)
    stored = 2 * parameter_count(config)  # weights keep their stored form, but for norms and routers
    assert planned(scout, tokens=9, dtype="float32").plan.weights == stored + 2 * small_parameter_count(config)
    (scout / "config.json").write_text(json.dumps(SCOUT | {"torch_dtype": None}))
    report = planned(scout, tokens=9)
    assert report.plan.workload.dtype == "bfloat16" and "config.json says no dtype; bfloat16" in report.notes[0]
    (scout / "config.json").write_text(json.dumps(SCOUT | {"torch_dtype": "float64"}))
    assert "'float64'" in planned(scout, tokens=9).notes[0]


def test_without_quick_bfloat16_products_models_of_any_size_are_computed_in_float32(
    scout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large ones with keys and values in the checkpoint's dtype: they are as many bytes as on other processors."""
    quick = planned(scout, tokens=10**6)
    monkeypatch.setattr(processor, "has_fast_bfloat16", lambda: False)
    small = planned(TINY, tokens=9).plan.as_dict()
    assert (small["dtype"], small["kv_dtype"]) == ("float32", "float32")
    large = planned(scout, tokens=10**6)
    plan = large.plan.as_dict()
    assert (plan["dtype"], plan["kv_dtype"]) == ("float32", "bfloat16") and plan["weights_are_mapped"]
    assert plan["nope_host"] == pytest.approx(quick.plan.as_dict()["nope_host"], rel=0.001)  # but for open blocks
    assert planned(scout, tokens=9, kv_dtype="float32").plan.as_dict()["kv_dtype"] == "float32"
    assert planned(scout, tokens=9, dtype="float32").plan.as_dict()["kv_dtype"] == "float32"


@pytest.mark.parametrize(("device", "accelerator"), [("auto", 700), ("cuda", 300), ("cuda:1", 400), ("cpu", None)])
def test_with_gpus(monkeypatch: pytest.MonkeyPatch, scout: Path, device: str, accelerator: int | None) -> None:
    gpus(monkeypatch, 300 * GIB, 400 * GIB)
    report = planned(scout, tokens=10**6, device=device)
    assert report.capacity.accelerator == (None if accelerator is None else accelerator * GIB)
    assert report.plan.weights_are_mapped == (accelerator is None)
    if accelerator is not None:
        assert report.fits and report.plan.end.nope_device == 10**6 * 48 * KIB and report.plan.end.nope_host == 0
        assert not report.plan.shares and report.plan.device == 0  # the first one holds everything
        limited = planned(scout, tokens=10**6, device=device, kv_device_memory=40 * GIB)
        assert 39 * GIB < limited.plan.peak.nope_device <= 40 * GIB


def test_a_build_of_torch_without_gpus(monkeypatch: pytest.MonkeyPatch, scout: Path) -> None:
    gpus(monkeypatch, 300 * GIB)
    monkeypatch.setattr(device_module, "_torch_may_use_gpus", lambda: False)
    assert planned(scout, tokens=9).capacity.accelerator is None


@pytest.mark.parametrize(("found", "expected"), [("2.13.0", True), ("2.13.0+cu130", True), ("2.13.0+cpu", False)])
def test_builds_of_torch(monkeypatch: pytest.MonkeyPatch, found: str, expected: bool) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(device_module, "version", lambda name: found)
    assert device_module._torch_may_use_gpus() is expected


def test_the_time_has_a_quadratic_term(scout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l4ctx.run.sizing.available_memory", lambda: 2**50)
    config = TextConfig.from_folder(scout)
    assert planned(scout, tokens=8192, rate=200.0).seconds == pytest.approx(8192 / 200)
    seconds = planned(scout, tokens=10**6, rate=200.0).seconds
    ratio = reading_operations(config, 0, 10**6).total / reading_operations(config, 0, 8192).total
    assert seconds == pytest.approx(8192 / 200 * ratio) and seconds > 3 * 10**6 / 200
    assert planned(scout, tokens=100, rate=200.0).seconds == pytest.approx(0.5)


def test_the_time_includes_reading_weights_again(scout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the assumed 1 GB/s, in the time in which a step computes: the longer of both counts for each step."""
    config = TextConfig.from_folder(scout)
    monkeypatch.setattr("l4ctx.run.sizing.available_memory", lambda: 24 * GIB)
    slow, quick = planned(scout, tokens=32768, rate=2.0), planned(scout, tokens=32768, rate=10**6)
    assert slow.seconds == pytest.approx(
        16384 * reading_operations(config, 0, 32768).total / reading_operations(config, 0, 8192).total / 4, rel=0.001
    )
    residency = quick.plan.weight_residency
    first, later = residency.total - residency.layers[-1].total, residency.read_a_step
    assert quick.seconds == pytest.approx((first + 3 * later) / 1e9)
    assert quick.weights_read == 3 * later and 0.8 * first < later < first


def test_forms_are_compared_where_memory_does_not_hold_the_weights(
    scout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("l4ctx.run.sizing.available_memory", lambda: 96 * GIB)
    report = planned(scout, tokens=32768, rate=2.0)
    forms = {form.name: form for form in report.forms}
    assert next(iter(forms)) == "bfloat16" and forms["bfloat16"].plan.weights == report.plan.weights
    assert forms["bfloat16"].seconds == report.seconds
    assert all(form.fits for form in forms.values())
    streamed = {name for name, form in forms.items() if form.plan.weight_residency.read_a_step}
    assert "bfloat16" in streamed and "FP8" in streamed and not streamed & {"w4a16", "GGUF Q4_K_M", "GGUF Q6_K"}
    assert {name for name, form in forms.items() if form.is_held} == forms.keys() - streamed
    sizes = [form.plan.weights for form in report.forms]
    assert sizes == sorted(sizes, reverse=True)
    assert report.as_dict()["reading_less"] == [
        "a checkpoint in GGUF Q6_K: memory holds its 82.3 GiB",
        "--quantize int4: memory holds the 58.8 GiB that it makes",
    ]
    lines = shown(report)
    assert "what reads less a checkpoint in GGUF Q6_K: memory holds its 82.3 GiB" in lines
    assert any(line.startswith("GGUF Q6_K 82.3 GiB yes ") for line in lines)
    assert any(line.startswith("bfloat16 201 GiB in part ") for line in lines)
    monkeypatch.setattr("l4ctx.run.sizing.available_memory", lambda: 512 * GIB)
    assert not planned(scout, tokens=32768).forms


def test_what_reads_less_within_a_limit_and_where_memory_holds_no_form(
    scout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("l4ctx.run.sizing.available_memory", lambda: 32 * GIB)
    report = planned(scout, tokens=32768, weights_memory=8 * GIB)
    limit, smallest = report.as_dict()["reading_less"]
    assert re.fullmatch(r"a larger --weights-memory, or none: 17\d GiB instead of 19\d GiB a chunk", limit)
    assert re.fullmatch(r"a checkpoint in GGUF Q2_K: 2\d\.\d GiB instead of 19\d GiB a chunk", smallest)
    a_token = report.as_dict()["weights_read_a_token"]
    residency = report.plan.weight_residency
    assert a_token == pytest.approx(sum(layer.always + layer.experts / 16 for layer in residency.layers), rel=0.2)
    assert a_token < report.plan.weight_residency.read_a_step / 5
    assert read_a_token(planned(scout, tokens=9, weights_memory=2**50).plan) < a_token


def test_a_time_is_told_of_what_is_assumed(scout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "assumed_operations", lambda: 2e11)
    report = planned(scout, tokens=32768)
    assert report.seconds is None and report.assumed_seconds
    operations = reading_operations(TextConfig.from_folder(scout), 0, 32768)
    assert report.assumed_seconds == pytest.approx(operations.total / 2e11, rel=0.01)
    assert any(" at an assumed 200 GFLOP/s and 1.0 GB/s from the disk; --measure" in x for x in shown(report, 200))
    assert planned(scout, tokens=32768, rate=100.0).assumed_seconds is None
    gpus(monkeypatch, 80 * GIB)
    assert planned(scout, tokens=32768).assumed_seconds is None  # nothing is known of it


def test_forms_on_an_accelerator_fit_or_do_not(scout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 80 * GIB)
    fitting = {form.name for form in planned(scout, tokens=32768).forms if form.fits}
    assert {"GGUF Q4_K_M", "w4a16", "MLX 4 bit"} <= fitting and not fitting & {"bfloat16", "FP8", "GGUF Q6_K"}


def test_what_config_json_declares_is_planned(scout: Path) -> None:
    raw = json.loads((scout / "config.json").read_text())
    whole = planned(scout, tokens=9).plan.weights
    settings = {"group_size": 64, "bits": 4}
    (scout / "config.json").write_text(json.dumps(raw | {"quantization": settings}))
    assert planned(scout, tokens=9).plan.weights == pytest.approx(whole * 4.5 / 16, rel=0.001)
    (scout / "config.json").write_text(json.dumps(raw))
    older = {"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["*self_attn*", "*lm_head"]}}
    (scout / "hf_quant_config.json").write_text(json.dumps(older))  # what older versions of modelopt wrote
    nvfp4 = next(form for form in PUBLISHED if form.name == "NVFP4").weights(TextConfig.from_folder(scout))
    assert planned(scout, tokens=9).plan.weights == pytest.approx(nvfp4.num_bytes, rel=0.001)
    (scout / "hf_quant_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"hf_quant_config\.json"):
        planned(scout, tokens=9)
    (scout / "hf_quant_config.json").unlink()
    (scout / "config.json").write_text(json.dumps(raw | {"quantization_config": {"quant_method": "new\n"}}))
    report = planned(scout, tokens=9)
    assert report.plan.weights == whole and "quantized by 'new\\n', in a way that is not known" in report.notes[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [{}, {"moe_layers": []}, {"num_attention_heads": 2}])
def test_the_measured_speed(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], dtype: str) -> None:
    monkeypatch.setattr("l4ctx.planning.speed.MEASURED_SECONDS", 0.001)
    config = TextConfig.from_dict(
        {
            "model_type": "llama4_text",
            "hidden_size": 42,
            "intermediate_size": 22,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 10,
        }
        | changes
    )
    speed = measured_speed(config, dtype, "cpu", 100)
    assert all(1e3 < operations < 1e15 for operations in speed)
    operations = reading_operations(config, 0, 10**5)
    expected = operations.linear / speed.linear + (operations.total - operations.linear) / speed.attention
    assert speed.seconds(operations) == pytest.approx(expected)


def test_speed_is_measured_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, weights = [], []

    def measured(*arguments: Any) -> Speed:
        asked.append(arguments[1:4])
        weights.append(arguments[4])
        return Speed(1e9, 2e9)

    monkeypatch.setattr(estimate, "measured_speed", measured)
    report = planned(TINY, tokens=10**4, measure=True)
    operations = reading_operations(TextConfig.from_folder(TINY), 0, 10**4)
    assert report.seconds == Speed(1e9, 2e9).seconds(operations)
    assert report.as_dict()["operations_per_second"] == {"linear": 1e9, "attention": 2e9}
    gpus(monkeypatch, GIB)
    planned(TINY, tokens=10, measure=True, dtype="bfloat16")
    assert asked == [("bfloat16", "cpu", 8192), ("bfloat16", "cuda", 10)]
    assert all(weight.dtype == torch.bfloat16 and weight.shape == (512, 128) for weight in weights)  # an expert's


@pytest.mark.parametrize(
    ("settings", "options", "kind"),
    [
        ({}, {"dtype": "float32"}, PlainMatrix),
        ({}, {"dtype": "bfloat16"}, None),
        ({}, {"quantize": "int8"}, AffineMatrix),
        ({"quant_method": "fbgemm_fp8"}, {}, Float8Matrix),
        ({"group_size": 64, "bits": 4}, {}, None),
    ],
)
def test_products_are_measured_in_the_form_of_the_weights(
    scout: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], options: dict[str, Any], kind: type | None
) -> None:
    """Where the checkpoint has no weights yet: made of ones, by what the configuration declares."""
    monkeypatch.setattr("l4ctx.run.measuring.MEASURED_ELEMENTS", 2**18)
    raw = json.loads((scout / "config.json").read_text())
    (scout / "config.json").write_text(json.dumps(raw | {"quantization_config": settings}))
    weight = feed_forward_weight(scout, planned(scout, tokens=100, **options).plan)
    assert weight is None if kind is None else type(weight) is kind and weight.shape == (51, 5120)


@pytest.mark.parametrize("form", ["GGUF Q8_0", "FP8"])
def test_a_matrix_of_the_checkpoint_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Expansion included, by part of the first expert's matrix as it is mapped."""
    folder = tmp_path / "stored"
    if form == "FP8":
        write_fused(tmp_path, KINDS["dense and MoE"], form)
    else:
        folder = tmp_path / "toy.gguf"
        toy = write_kind(tmp_path / "toy", "toy", KINDS["dense and MoE"], 0.2, seed=2)
        write_gguf(folder, toy.folder, all_in("Q8_0"))
    config = TextConfig.from_folder(folder)
    weight = feed_forward_weight(folder, planned(folder, tokens=100, dtype="float32").plan)
    assert isinstance(weight, StoredMatrix) and weight.in_features == config.hidden_size
    expanded, expand, whole = [], type(weight).expand, weight.out_features

    def counting(self: StoredMatrix, rows: slice, out: torch.Tensor) -> None:
        expanded.append(rows.stop)
        expand(self, rows, out)

    monkeypatch.setattr(type(weight), "expand", counting)
    monkeypatch.setattr("l4ctx.planning.speed.MEASURED_ELEMENTS", 11 * config.hidden_size)
    monkeypatch.setattr("l4ctx.planning.speed.MEASURED_SECONDS", 0.001)
    assert measured_speed(config, "float32", "cpu", 10**4, weight).linear > 0
    assert set(expanded) == {11} and weight.out_features == whole


@pytest.fixture
def documents(tmp_path: Path) -> list[str]:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.txt").write_text("The access code for the amber falcon is 12345. " * 40)
    (folder / "b.md").write_text("Nothing to see here.\n" * 10)
    (folder / "c [red].md").write_text("One line of text.")
    (folder / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0")
    return [str(folder)]


def test_documents_are_tokenized_as_ask_does_it(documents: list[str]) -> None:
    report = planned(TINY, paths=documents)
    prompt = build_prompt(
        Tokenizer.from_folder(TINY), ChatTemplate.from_folder(TINY), read_documents(documents, stdin=None).take(), ""
    )
    assert report.documents == [(span.source, span.stop - span.start) for span in prompt.spans]
    assert [source for source, _ in report.documents] == ["docs/a.txt", "docs/b.md", "docs/c [red].md"]
    assert report.plan.workload.prompt_tokens == len(prompt.ids) > sum(tokens for _, tokens in report.documents)
    assert report.plan.workload.max_new_tokens == 1024 and report.plan.workload.largest == report.documents
    assert [entry.source for entry in report.skipped] == ["docs/image.png"]
    plain = json.loads(json.dumps(report.as_dict()))
    assert plain["documents"][1] == {"path": "docs/b.md", "tokens": report.documents[1][1]}
    assert plain["skipped"] == [{"path": "docs/image.png", "reason": report.skipped[0].reason}]
    piped = planned(TINY, paths=["-"], stdin=io.BytesIO(b"Some text."), max_new_tokens=3)
    assert piped.documents[0][0] == "stdin" and piped.plan.workload.max_new_tokens == 3
    with pytest.raises(DocumentError):
        planned(TINY, paths=[documents[0] + "/image.png"])


def test_weights_are_those_of_the_shards(documents: list[str]) -> None:
    """Which are held in memory, where there is plenty, whatever their dtype."""
    for dtype in ("float32", "bfloat16"):
        report = planned(TINY, paths=documents, dtype=dtype)
        model = load_checkpoint(TINY, dtype=dtype)
        assert report.plan.weights == model.weight_bytes
        assert not report.plan.weights_are_mapped and report.notes == []


def test_without_shards_the_configuration_says_how_many_weights(tmp_path: Path, documents: list[str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    report = planned(folder, paths=documents)
    assert report.plan.weights == planned(TINY, paths=documents).plan.weights
    assert "neither model.safetensors nor" in report.notes[0] and "config.json" in report.notes[0]


def test_bytes_read_from_disk_are_those_of_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each step reads what is not in memory again, in every NoPE layer but the last one of all."""
    chunk = 7
    raw = {
        "model_type": "llama4_text",
        "vocab_size": 97,
        "hidden_size": 42,
        "intermediate_size": 22,
        "intermediate_size_mlp": 26,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "num_local_experts": 3,
        "attention_chunk_size": chunk,
        "no_rope_layer_interval": 2,
        "dtype": "float32",
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    monkeypatch.setattr(store_layout, "MIN_BLOCK_BYTES", 1)
    monkeypatch.setattr(store_layout, "MIN_SEGMENT_BYTES", 1)
    monkeypatch.setattr(store_layout, "MIN_SEGMENT_TOKENS", 1)
    report = planned(tmp_path, tokens=101, prefill_chunk_size=chunk, kv_dir=tmp_path, kv_host_memory=15_000)
    read = []
    original = UnitFile.read

    def counted(self: UnitFile, name: str, into: memoryview) -> None:
        read.append(len(into))
        original(self, name, into)

    monkeypatch.setattr(UnitFile, "read", counted)
    from model.transformer import Transformer

    rows = Scratch(tmp_path)
    config = report.plan.workload.config
    cache = HybridKVCache(config, length=101, residency=report.plan.residency, rows=rows)
    with torch.inference_mode():
        for _ in prefill(Transformer(config), cache, [1] * 101, prefill_chunk_size=chunk):
            pass
    rows._file.close()
    assert cache.held() == report.plan.end and 0 < (report.plan.residency.host_rows or 0) < 10
    assert sum(read) == report.read_from_disk > 0
    assert planned(tmp_path, tokens=101).read_from_disk == 0


def shown(report: PlanReport, width: int = 100) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=width).print(plan_table(report))
    return [" ".join(line.split()) for line in text.getvalue().splitlines()]


def test_the_table(scout: Path, tmp_path: Path) -> None:
    report = planned(scout, tokens=10**6, kv_dir=tmp_path, rate=200.0)
    lines = shown(report, width=200)
    assert "tokens 1,000,000; the model has 10,485,760 positions" in lines and "fits here yes" in lines
    assert any(line.startswith("weights, mapped from the checkpoint 201 GiB") for line in lines)
    buffers = human_bytes(report.plan.end.buffers)
    assert "RoPE windows 1.1 GiB 1.1 GiB" in lines and f"read buffers {buffers} {buffers}" in lines
    assert any(line.startswith("disk, total") and line.endswith("100 GiB") for line in lines)
    assert any(line.startswith("prefill takes about ") for line in lines)
    assert any(
        line.startswith("KV cache ") and "tokens in host memory" in line and "tokens on disk" in line for line in lines
    )
    assert not any("what helps" in line or "accelerator" in line for line in lines)
    too_large = shown(planned(scout, tokens=10**6), width=200)
    assert "fits here no" in too_large and "memory: 48.2 GiB needed, 24.0 GiB available" in too_large
    assert any(line.startswith("what helps --kv-dir DIR makes it fit") for line in too_large)
    assert any("more tokens than the model has positions" in line for line in shown(planned(scout, tokens=11 * 10**6)))


def test_the_table_of_documents(documents: list[str]) -> None:
    """Names are shown as they are, the largest first, and the smallest ones together if there are many."""
    report = planned(TINY, paths=documents)
    lines = shown(report)
    total = report.plan.workload.prompt_tokens
    assert lines[0].startswith("fits; about ") and lines[2:4] == ["documents", "tokens share"]
    assert f"docs/c [red].md {report.documents[2][1]:,} {report.documents[2][1] / total:.0%}" in lines[4:9]
    many = [Path(documents[0], f"{n}.txt") for n in range(30)]
    for number, file in enumerate(many):
        file.write_text("word " * (100 - number))
    lines = shown(planned(TINY, paths=list(map(str, many))))
    names = [line.split()[0] for line in lines[4:24]]
    assert [name.rpartition("/")[2] for name in names] == [f"{n}.txt" for n in range(20)]
    assert lines[24].startswith("10 smaller ones ")


def test_long_times_are_told_in_days(scout: Path) -> None:
    assert any(line == "prefill takes about 58 days" for line in shown(planned(scout, tokens=8192, rate=8192 / 5e6)))


def test_the_plan_is_the_one_that_ask_makes(scout: Path) -> None:
    report = planned(scout, tokens=10**5, kv_host_memory=3 * GIB, kv_dtype="int8")
    assert report.plan == plan_memory(report.plan.workload, report.capacity)
    assert report.plan.needed + MARGIN_BYTES <= 24 * GIB
