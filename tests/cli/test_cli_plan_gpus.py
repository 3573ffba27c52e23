"""`l4ctx plan` for GPUs that need not be here: its tables, --json, refusals, and what its rates are written as."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from l4ctx.errors import INPUT, MEMORY, TOO_LONG
from l4ctx.formatting import human_rate, parse_operations, parse_rate
from support.cli_runner import check_refused, run_here, text_file

GIB = 2**30
ISSUE = ("--tokens", "10M", "--tp", "8", "--cp", "4", "--gpu-memory", "141GiB", "--link", "400GB/s")


@pytest.fixture
def scout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with nothing but a configuration of Scout's shape, which is that of the defaults."""
    monkeypatch.delenv("L4CTX_MODEL", raising=False)
    config = {"model_type": "llama4_text", "max_position_embeddings": 10485760, "torch_dtype": "bfloat16"}
    text_file(tmp_path / "scout" / "config.json", json.dumps(config))
    return tmp_path / "scout"


def planned(model: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    result = run_here("plan", "--model", str(model), *arguments, "--json", "--quiet")
    assert (result.code, result.stdout.count("\n")) == (code, 1), result
    return json.loads(result.stdout)


def test_the_tables_tell_bytes_by_tier_traffic_and_time(scout: Path) -> None:
    result = run_here("plan", "--model", str(scout), *ISSUE)
    assert result.code == 0 and result.stderr == ""
    rows = dict(re.findall(r"^ *(\S.*?)  +(\S.*)$", result.stdout, re.M))
    assert re.match(r"fits; about [\d.]+ \w+; [\d.]+ GiB on each of 32 GPUs\n\n", result.stdout)
    assert rows["weights"] == "25.1 GiB" and rows["NoPE keys and values"] == "14.3 GiB"
    assert rows["available"] == "141 GiB" and rows["fits there"] == "yes"
    assert rows["sums over tensor ranks"].split("  ")[0] == "18.3 GiB"
    assert rows["prefill chunk"].startswith("32,768 tokens, in bfloat16")
    for text in (
        "8 tensor ranks x 4 context ranks",
        "each context rank keeps keys and values of 2,",
        "queries travel between context ranks",
        "593 TFLOP/s",
        "none of it was measured on a GPU",
    ):
        assert text in result.stdout


def test_layers_over_the_gpus_of_one_process(scout: Path) -> None:
    """Scout's layers are 202 GiB in 16 bits, embeddings and output matrix 1.9 GiB each."""
    asked = ("--tokens", "200k", "--gpus", "4", "--gpu-memory", "80GiB", "--host-memory", "64GiB")
    report = planned(scout, *asked)
    shares = report["plan"]["devices"]
    assert report["fits"] and [share["device"] for share in shares] == [0, 1, 2]
    assert [share["layers"][0] for share in shares[1:]] == [share["layers"][1] + 1 for share in shares[:-1]]
    assert report["room"]["accelerators"] == [80 * GIB] * 4 and report["room"]["host"] == 64 * GIB
    assert all(share["needed"] <= 80 * GIB for share in shares)
    result = run_here("plan", "--model", str(scout), *asked)
    assert f"GPU 2, layers {shares[2]['layers'][0]}-47" in result.stdout
    assert f"layers are spread over 3 GPUs: 0-{shares[0]['layers'][1]} on GPU 0" in result.stderr
    assert not planned(scout, *asked[:2], "--gpus", "2", *asked[4:], code=MEMORY)["fits"]
    assert not planned(scout, *asked[:2], "--gpus", "1", "--gpu-memory", "400GiB")["plan"]["devices"]


def test_a_card_that_streams(scout: Path) -> None:
    config = json.loads((scout / "config.json").read_text())
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    text_file(scout / "config.json", json.dumps(config | {"quantization_config": settings}))
    arguments = ("--tokens", "1M", "--tp", "1", "--cp", "1", "--gpu-memory", "24GiB", "--host-memory", "64GiB")
    result = run_here("plan", "--model", str(scout), *arguments, "--kv-dtype", "int8")
    assert result.code == 0, result
    assert "are copied from host memory to the accelerator for each prefill chunk" in result.stderr
    for text in ("weight buffers", "from host memory to the GPU", "computing hides what comes from host memory"):
        assert text in result.stdout
    assert "exchange" not in result.stdout and "sums over" not in result.stdout


def test_json_has_the_same(scout: Path) -> None:
    report = planned(scout, *ISSUE)
    assert report["fits"] and not report["is_measured"] and report["missing"] == {} and report["notes"] == []
    assert (report["tensor_ranks"], report["context_ranks"], report["kv_head_copies"]) == (8, 4, 1)
    assert report["rank"]["plan"]["nope_device"] == 12 * 4096 // 8 * report["rank"]["tokens"]
    assert 0 <= report["rank"]["tokens"] - (10**7 // 4 - 8192) <= 2 * 8192
    assert report["room"] == {"device": 141 * GIB, "host": None}
    assert report["rates"] == {
        "compute": 593e12, "link": 400e9, "host_link": 50e9, "disk": 5e9, "memory": 3.35e12,
    }  # fmt: skip
    assert report["prefill_seconds"]["total"] > report["prefill_seconds"]["computing"] > 60
    rates = (
        "--compute-rate",
        "1PFLOP/s",
        "--host-link",
        "25GB/s",
        "--disk-rate",
        "1GB/s",
        "--gpu-bandwidth",
        "4.8TB/s",
    )
    assert planned(scout, *ISSUE, *rates)["rates"]["compute"] == 1e15


def test_more_ranks_than_kv_heads_replicate_them_and_it_is_said(tmp_path: Path) -> None:
    config = {"model_type": "llama4_text", "num_key_value_heads": 4, "torch_dtype": "bfloat16"}
    text_file(tmp_path / "few" / "config.json", json.dumps(config))
    arguments = ("--tokens", "100k", "--tp", "8", "--gpu-memory", "80GiB")
    result = run_here("plan", "--model", str(tmp_path / "few"), *arguments)
    assert result.code == 0 and "4 KV heads for 8 tensor ranks: each is held by 2" in result.stdout
    assert planned(tmp_path / "few", *arguments)["kv_head_copies"] == 2


def test_what_does_not_fit_says_so(scout: Path) -> None:
    report = planned(scout, "--tokens", "10M", "--gpu-memory", "24GiB", "--host-memory", "32GiB", code=MEMORY)
    assert not report["fits"] and list(report["missing"]) == ["host memory"]
    assert not planned(scout, "--tokens", "11M", "--tp", "8", "--gpu-memory", "141GiB", code=TOO_LONG)["fits"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--tokens", "1M", "--tp", "3", "--gpu-memory", "80GiB"), ("num_attention_heads 40 cannot be divided by 3",)),
        (("--tokens", "1M", "--tp", "8"), ("--gpu-memory SIZE",)),
        (("--tokens", "1M", "--gpus", "2"), ("--gpu-memory SIZE",)),
        (("--tokens", "1M", "--gpus", "2", "--gpu-memory", "80GiB", "--tp", "2"), ("--gpus", "leave out --tp")),
        (("--tokens", "1M", "--link", "400GB/s"), ("--gpu-memory SIZE",)),
        (("--tokens", "1M", "--gpu-memory", "80GiB", "--link", "400"), ("--link", "400GB/s")),
        (("--tokens", "1M", "--gpu-memory", "80GiB", "--compute-rate", "0T"), ("--compute-rate", "593TFLOP/s")),
        (("--tokens", "1M", "--gpu-memory", "80GiB", "--cp", "0"), ("--cp",)),
        (("--tokens", "1M", "--gpu-memory", "80GiB", "--measure"), ("--measure", "leave them out")),
        ((__file__, "--gpu-memory", "80GiB"), ("--tokens N",)),
    ],
)
def test_refusals_are_one_line(scout: Path, arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    check_refused(run_here("plan", "--model", str(scout), *arguments), INPUT, *parts)


def test_torch_is_not_imported(scout: Path) -> None:
    code = (
        "import contextlib, sys\nfrom l4ctx.cli.app import main\n"
        f"sys.argv = ['l4ctx', 'plan', '--model', {str(scout)!r}, *{ISSUE!r}]\n"
        "with contextlib.suppress(SystemExit):\n    main()\n"
        "heavy = {'torch', 'numpy', 'tokenizers', 'safetensors', 'jinja2'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=False, timeout=120)
    assert done.returncode == 0 and b"fits there" in done.stdout, done.stderr.decode()


@pytest.mark.parametrize(
    ("text", "rate"), [("400GB/s", 4e11), (" 50 GiB/s ", 50 * GIB), ("3.35TB/s", 3.35e12), ("900gb/s", 9e11)]
)
def test_rates(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    ("text", "rate"), [("593TFLOP/s", 593e12), ("1.2 PFLOPs/s", 1.2e15), ("990T", 9.9e14), ("80gflops", 8e10)]
)
def test_operations(text: str, rate: float) -> None:
    assert parse_operations(text) == rate


@pytest.mark.parametrize("text", ["", "400", "400GB", "0GB/s", "-1GB/s", "GB/s", "4e2GB/s", "1" * 5000 + "GB/s"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a rate such as 400GB/s"):
        parse_rate(text)
    with pytest.raises(ValueError, match="is not a rate such as 593TFLOP/s"):
        parse_operations(text)


def test_rates_are_told_as_they_are_sold() -> None:
    assert [human_rate(rate) for rate in (400e9, 3.35e12, 25.5e9, 5e9)] == [
        "400 GB/s",
        "3.35 TB/s",
        "25.5 GB/s",
        "5 GB/s",
    ]
