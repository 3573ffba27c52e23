"""`l4ctx bench` with toy weights: its course with workers, the engines themselves, and the files that they read."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from l4ctx.bench import benchmark, ceilings
from l4ctx.bench import worker as bench_worker
from l4ctx.bench.jobs import WorkerJob
from l4ctx.bench.peers import files
from l4ctx.bench.peers.files import folder_for_transformers
from l4ctx.bench.peers.gguf import GGUFError, check_supported, entries, gguf_bytes, write_gguf
from l4ctx.bench.process import WorkerError
from l4ctx.bench.weights import flat_config, random_model, write_random_checkpoint
from l4ctx.machine import timing
from model.config import TextConfig
from model.weights.loading import load_checkpoint
from support.cli_runner import TINY, check_refused, run_here, run_process, text_file

TOY = {  # what llama.cpp has, too
    "model_type": "llama4_text",
    "vocab_size": 97,
    "hidden_size": 42,
    "intermediate_size": 22,
    "intermediate_size_mlp": 34,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_local_experts": 5,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "max_position_embeddings": 256,
    "attn_temperature_tuning": 4,
}
CONFIG = TextConfig.from_dict(TOY)
LLAMA = """case "$*" in
*"-d 40"*) echo '{"n_prompt": 0, "n_gen": 3, "n_depth": 40, "avg_ts": 8.0}';;
*) echo '{"n_prompt": 40, "n_gen": 0, "n_depth": 0, "avg_ts": 150.0, "build_commit": "abc"}';;
esac"""


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    return str(text_file(tmp_path / "config.json", json.dumps(TOY)))


def script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Workers are called here, where torch is imported already; `failing` says which jobs are to fail."""

    def install(failing: Callable[[WorkerJob], bool] = lambda job: False) -> None:
        def worker(job: WorkerJob) -> dict[str, Any]:
            job = WorkerJob.from_json(job.to_json())
            if failing(job):
                raise WorkerError("killed by SIGKILL")
            return json.loads(json.dumps(bench_worker.TASKS[job.task](job)))

        monkeypatch.setattr(benchmark, "run_worker", worker)
        monkeypatch.setattr(files, "run_worker", worker)
        monkeypatch.setattr(timing, "SECONDS", 0.001)
        monkeypatch.setattr(ceilings, "BYTES", 2**23)
        monkeypatch.setattr(ceilings, "QUERIES", 8)
        monkeypatch.setattr(ceilings, "KEYS", 16)

    return install


def bench(config_file: str, *more: str) -> list[str]:
    arguments = ["bench", "--config", config_file, "--tokens", "40", "--decode", "3", "--rounds", "1"]
    return [*arguments, "--dtype", "float32", "--no-ceilings", "--json", *more]


@pytest.mark.slow
def test_workers_are_processes(config_file: str, tmp_path: Path) -> None:
    """JSON alone on stdout, and no file is left."""
    program = script(tmp_path / "llama-bench", LLAMA)
    (tmp_path / "tmp").mkdir()
    result = run_process(*bench(config_file, "--compare", f"llama.cpp={program}"), TMPDIR=str(tmp_path / "tmp"))
    assert result.code == 0, result.stderr
    found = json.loads(result.stdout)
    assert not found["failures"] and not list((tmp_path / "tmp").glob("l4ctx*"))
    assert [run["engine"] for run in found["runs"]] == ["l4ctx", "llama.cpp"]
    assert found["runs"][0]["peak_anonymous"] > 2**20


@pytest.mark.slow
def test_the_same_work_in_three_engines(
    config_file: str, tmp_path: Path, in_this_process: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same first token where weights and ids are the same."""
    in_this_process()
    program = script(tmp_path / "llama-bench", LLAMA)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    result = run_here(*bench(config_file, "--compare", "transformers", "--compare", f"llama.cpp={program}"))
    assert result.code == 0, result.stderr
    found = json.loads(result.stdout)
    assert not found["failures"] and not list((tmp_path / "tmp").glob("l4ctx*"))
    assert "round 1 of 1, 40 tokens: transformers" in result.stderr
    runs = {run["engine"]: run for run in found["runs"]}
    assert list(runs) == ["l4ctx", "transformers", "llama.cpp"] == list(found["chosen"])
    ours, theirs = runs["l4ctx"], runs["transformers"]
    assert ours["first_token"] == theirs["first_token"]
    held_by_unbounded = 2 * CONFIG.num_hidden_layers * CONFIG.num_key_value_heads * CONFIG.head_dim * 4 * (40 + 3)
    assert theirs["keys_values"] == held_by_unbounded
    for run in (ours, theirs):
        assert run["decode_tokens"] == 3 and run["decode_tokens_per_second"] > 0 and run["load_seconds"] > 0
        assert run["peak_anonymous"] > 2**20 and run["version"] and run["threads"] >= 1
    assert ours["steps"] and ours["steps"][0][0] == 39
    engines = {engine["engine"]: engine for engine in found["lengths"][0]["engines"]}
    rate = ours["prefill_tokens_per_second"]
    assert engines["llama.cpp"]["median_prefill_ratios"] == pytest.approx(rate / 150)
    assert found["machine"]["cpu"] and found["machine"]["torch"] == torch.__version__
    assert found["model"] == {
        "path": config_file,
        "random_weights": True,
        "parameters": sum(p.numel() for p in random_model(CONFIG, dtype=torch.float32).parameters()),
        "stored_dtype": "float32",
    }


def test_the_table_of_a_checkpoint(in_this_process: Callable[..., None]) -> None:
    """Both dtypes are tried; ceilings and shares are shown."""
    in_this_process()
    result = run_here("bench", "--model", str(TINY), "--tokens", "30,70", "--decode", "2", "--rounds", "2")
    assert result.code == 0, result.stderr
    notes = result.stderr.splitlines()
    assert [note for note in notes if "trial: l4ctx float32" in note] and len(notes) == 2 + 4
    for part in (
        "30 tokens, median of 2 rounds",
        "70 tokens, median of 2 rounds",
        "decode 2, tokens/s",
        "KV cache",
        "matrix product, GFLOP/s",
        "attention (sdpa), GFLOP/s",
        "times its roofline (the kernels alone)",
    ):
        assert part in result.stdout, result.stdout
    assert "speedup" not in result.stdout
    quiet = run_here(
        "bench",
        "--model",
        str(TINY),
        "--tokens",
        "30",
        "--decode",
        "0",
        "--rounds",
        "1",
        "--quiet",
        "--no-ceilings",
        "--dtype",
        "bfloat16",
        "--prefill-chunk-size",
        "16",
    )
    assert quiet.code == 0 and quiet.stderr == "" and "decode" not in quiet.stdout
    assert "ceilings" not in quiet.stdout and "bfloat16" in quiet.stdout


def test_a_peer_that_fails_is_named_and_stops_nothing(
    config_file: str, tmp_path: Path, in_this_process: Callable[..., None]
) -> None:
    in_this_process()
    program = script(tmp_path / "llama-bench", "echo 'error: no such flag: -fa' >&2; exit 1")
    result = run_here(
        "bench",
        "--config",
        config_file,
        "--tokens",
        "40",
        "--rounds",
        "2",
        "--compare",
        f"llama.cpp={program}",
        "--decode",
        "0",
        "--no-ceilings",
    )
    assert result.code == 0, result.stderr
    assert result.stdout.count("no such flag: -fa (exit code 1)") == 3  # a candidate each
    assert "llama.cpp is left out" in result.stderr and "40 tokens, median of 2 rounds" in result.stdout


def test_a_peer_that_fails_at_a_length_is_not_asked_for_it_again(
    config_file: str, tmp_path: Path, in_this_process: Callable[..., None]
) -> None:
    in_this_process()
    body = f"""echo "$*" >> {tmp_path}/asked; case "$*" in *",60 "*) kill -9 $$;; esac\n{LLAMA}"""
    (tmp_path / "a.gguf").touch()
    result = run_here(
        "bench",
        "--config",
        config_file,
        "--tokens",
        "40,60",
        "--rounds",
        "2",
        "--decode",
        "0",
        "--dtype",
        "float32",
        "--no-ceilings",
        "--quiet",
        "--json",
        "--gguf",
        str(tmp_path / "a.gguf"),
        "--compare",
        f"llama.cpp={script(tmp_path / 'llama-bench', body)}",
    )
    found = json.loads(result.stdout)
    assert found["failures"] == ["llama.cpp a.gguf, 512 at a time, 60 tokens: killed by SIGKILL (out of memory?)"]
    assert [length["tokens"] for length in found["lengths"] if len(length["engines"]) == 2] == [40]
    asked = (tmp_path / "asked").read_text()
    assert (asked.count(",60 "), asked.count(",40 ")) == (1, 2)


def test_a_configuration_that_llama_cpp_lacks_is_said_in_a_line(
    tmp_path: Path, in_this_process: Callable[..., None]
) -> None:
    in_this_process()
    config = text_file(tmp_path / "config.json", json.dumps(TOY | {"attention_chunk_size": 7}))
    result = run_here(
        "bench",
        "--config",
        str(config),
        "--tokens",
        "40",
        "--rounds",
        "1",
        "--decode",
        "0",
        "--dtype",
        "float32",
        "--no-ceilings",
        "--compare",
        "llama.cpp=/bin/sh",
    )
    assert result.code == 0
    assert "failed: llama.cpp: attention_chunk_size is 7, and llama.cpp supports only 8192" in result.stdout


def test_l4ctx_itself_must_succeed(config_file: str, in_this_process: Callable[..., None]) -> None:
    in_this_process(lambda job: job.task == "l4ctx")
    arguments = ["bench", "--config", config_file, "--tokens", "40", "--quiet"]
    check_refused(run_here(*arguments, "--dtype", "float32"), 6, "l4ctx float32", "40 tokens", "killed by SIGKILL")
    check_refused(run_here(*arguments), 6, "l4ctx bfloat16", "killed by SIGKILL")
    in_this_process(lambda job: job.task == "l4ctx" and job.dtype == "float32")
    result = run_here(*arguments, "--rounds", "1", "--decode", "0", "--no-ceilings")
    assert result.code == 0 and "bfloat16" in result.stdout


# Weights and files


def test_random_weights_are_the_same_in_memory_and_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l4ctx.bench.weights.SHARD_BYTES", 20_000)
    monkeypatch.setattr("l4ctx.bench.weights.PIECE_ELEMENTS", 1000)
    write_random_checkpoint(TOY, CONFIG, tmp_path, torch.float32)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    stored = dict(load_checkpoint(tmp_path).named_parameters())
    for dtype in (torch.float32, torch.bfloat16):
        made = dict(random_model(CONFIG, dtype=dtype).named_parameters())
        assert made.keys() == stored.keys()
        assert all(torch.equal(made[name], stored[name].to(dtype)) for name in made)
    assert torch.equal(stored["model.norm.weight"], torch.ones(42))
    assert stored["lm_head.weight"].std().item() == pytest.approx(0.02, rel=0.1)


def test_tied_weights_are_one(tmp_path: Path) -> None:
    raw = {"model_type": "llama4", "text_config": TOY | {"tie_word_embeddings": True}}
    config = TextConfig.from_dict(raw)
    model = random_model(config, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    write_random_checkpoint(raw, config, tmp_path, torch.float16)
    loaded = load_checkpoint(tmp_path)
    assert loaded.config.tie_word_embeddings and loaded.dtype == torch.float16
    assert flat_config(raw, torch.float16)["hidden_size"] == 42


@pytest.mark.parametrize("nested", [False, True])
def test_transformers_gets_a_config_that_it_accepts(tmp_path: Path, nested: bool) -> None:
    folder, scratch = tmp_path / "published", tmp_path / "scratch"
    scratch.mkdir()
    raw = {"model_type": "llama4", "text_config": TOY} if nested else TOY
    text_file(folder / "config.json", json.dumps(raw))
    text_file(folder / "model.safetensors", "weights")
    linked = folder_for_transformers(folder, scratch)
    changed = json.loads((linked / "config.json").read_text())
    assert (changed["text_config"] if nested else changed)["attn_temperature_tuning"] is True
    assert (linked / "model.safetensors").is_symlink() and (linked / "model.safetensors").read_text() == "weights"
    assert folder_for_transformers(linked, scratch) == linked


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_the_gguf_file_holds_the_weights(tmp_path: Path, kind: str) -> None:
    """Read back with the format's own library: names and shapes, values, and what the model is built by."""
    import numpy
    from gguf import GGMLQuantizationType, GGUFReader, dequantize

    write_random_checkpoint(TOY, CONFIG, tmp_path, torch.float32)
    file = tmp_path / "model.gguf"
    write_gguf(tmp_path, CONFIG, file, kind)
    weights = {name: tensor.detach() for name, tensor in load_checkpoint(tmp_path).named_parameters()}
    reader = GGUFReader(file)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert {
        "token_embd.weight",
        "output.weight",
        "output_norm.weight",
        "blk.0.ffn_up.weight",
        "blk.1.ffn_up_exps.weight",
        "blk.1.ffn_gate_inp.weight",
        "blk.1.ffn_down_shexp.weight",
        "blk.4.attn_output.weight",
    } <= tensors.keys()
    assert sum(int(tensor.n_bytes) for tensor in tensors.values()) == gguf_bytes(CONFIG, kind)

    def check(name: str, expected: torch.Tensor, dtype: torch.dtype) -> None:
        tensor = tensors[name]
        assert tensor.shape.tolist() == list(expected.shape)[::-1], name
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32).copy())
        assert torch.equal(values, expected.to(dtype).float()), name

    stored = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
    first, second = "model.layers.0.", "model.layers.1."
    check("token_embd.weight", weights["model.embed_tokens.weight"], stored)
    check("blk.0.attn_k.weight", weights[f"{first}self_attn.k_proj.weight"], stored)
    check("blk.0.ffn_down.weight", weights[f"{first}feed_forward.down_proj.weight"], stored)
    check("blk.1.ffn_gate_inp.weight", weights[f"{second}feed_forward.router.weight"], torch.float32)
    check("blk.1.attn_norm.weight", weights[f"{second}input_layernorm.weight"], torch.float32)
    gate_up = weights[f"{second}feed_forward.experts.gate_up_proj"]
    check("blk.1.ffn_gate_exps.weight", gate_up[..., :22].transpose(1, 2), stored)
    check("blk.1.ffn_up_exps.weight", gate_up[..., 22:].transpose(1, 2), stored)
    check("blk.1.ffn_down_exps.weight", weights[f"{second}feed_forward.experts.down_proj"].transpose(1, 2), stored)
    assert tensors["blk.0.ffn_norm.weight"].tensor_type == GGMLQuantizationType.F32
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama4" and fields["tokenizer.ggml.model"] == "none"
    assert (fields["llama4.vocab_size"], fields["llama4.interleave_moe_layer_step"]) == (97, 2)
    assert (fields["llama4.feed_forward_length"], fields["llama4.expert_feed_forward_length"]) == (34, 22)
    assert (fields["llama4.attention.head_count_kv"], fields["llama4.attention.key_length"]) == (2, 10)


def test_every_weight_goes_into_the_gguf_file_once() -> None:
    elements = sum(torch.Size(entry.shape).numel() for entry in entries(CONFIG))
    assert elements == sum(p.numel() for p in random_model(CONFIG, dtype=torch.float32).parameters())
    tied = TextConfig.from_dict(TOY | {"tie_word_embeddings": True})
    assert "output.weight" not in {entry.name for entry in entries(tied)}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"attention_chunk_size": 4096}, "attention_chunk_size"),
        ({"attention_bias": True}, "attention_bias"),
        ({"no_rope_layers": [1, 1, 0, 1, 1]}, "no_rope_layers"),
        ({"use_qk_norm": False}, "use_qk_norm"),
        ({"moe_layers": [1, 2]}, "moe_layers"),
        ({"moe_layers": []}, "no layer has experts"),
    ],
)
def test_what_llama_cpp_computes_differently_is_refused_by_name(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(GGUFError, match=name):
        check_supported(TextConfig.from_dict(TOY | changes))
    check_supported(TextConfig.from_dict(TOY | {"num_local_experts": 128, "use_qk_norm": False}))


# Ceilings


def test_a_file_that_comes_from_memory_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "BYTES", 2**23)
    monkeypatch.setattr(ceilings, "_bytes_from_disk", lambda: 5)
    assert ceilings.disk_rate()["disk_is_cached"] is True
    monkeypatch.setattr(ceilings, "_bytes_from_disk", iter([0, 2**23]).__next__)
    found = ceilings.disk_rate()
    assert found["disk_is_cached"] is False and found["disk"] > 0


def test_dtypes_without_any_product_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.001)
    monkeypatch.setattr(ceilings, "BYTES", 2**23)
    monkeypatch.setattr(ceilings, "product_rate", lambda dtype, device: None)
    found = ceilings.measure(CONFIG, "cpu")
    assert found["product"] == {} == found["read"] and found["copy"] > 0
