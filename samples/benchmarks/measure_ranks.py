"""Measures how much memory each of several ranks takes, and compares it with the plan.

    python -m samples.benchmarks.measure_ranks --meshes 1x1 2x1 1x2 2x2

Writes a checkpoint with random weights, large enough that a rank's share is more than what libraries take, and a text;
asks a question about it with `torchrun ... l4ctx ask --json`. Prints for each mesh of tensor x context ranks the bytes
that the plan says, by how many the anonymous memory of each process grew at most since before its weights were loaded,
and what each rank read of the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from model.config import TextConfig
from model.transformer import Transformer

TINY = Path(__file__).parents[1] / "tiny"
SIZES = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "no_rope_layers": [1, 1, 1, 0] * 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1024,
    "intermediate_size_mlp": 1024,
}
LINE = "The old wall by the harbor was painted again in the third week of spring, and nobody knew why.\n"
MIB = 2**20


def write_checkpoint(folder: Path) -> None:
    """The sample model's tokenizer and configuration with other sizes, and random weights in bfloat16."""
    folder.mkdir()
    for file in TINY.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy(file, folder)
    config = json.loads((TINY / "config.json").read_text())
    config["text_config"] |= SIZES
    config.pop("vision_config", None)
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = Transformer(TextConfig.from_folder(folder), "sdpa")
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"language_model.{name}": (torch.randn(x.shape, generator=generator) * 0.02 + ("norm" in name)).bfloat16()
        for name, x in model.named_parameters()
    }
    save_file(weights, folder / "model.safetensors")


def asked(mesh: str, folder: Path, options: Sequence[str]) -> dict[str, Any]:
    """The report of one run."""
    tensor, context = map(int, mesh.split("x"))
    ask = ["l4ctx", "ask", "Why?", str(folder / "text.txt"), "--model", str(folder / "model"), "--json", "--quiet"]
    ask += ["--max-new-tokens", "4", "--no-images", *options]
    if context > 1:
        ask += ["--context-ranks", str(context)]
    count = tensor * context
    start = ["torchrun", "--standalone", "--nproc-per-node", str(count), "--no-python"] if count > 1 else []
    done = subprocess.run([*start, *ask], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meshes", nargs="+", default=["1x1", "2x1", "1x2", "2x2"], metavar="TxC")
    parser.add_argument("--lines", type=int, default=1400, help="of the text, some 22 tokens each")
    parser.add_argument("options", nargs="*", help="of l4ctx ask, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_checkpoint(folder / "model")
        (folder / "text.txt").write_text(LINE * args.lines)
        for mesh in args.meshes:
            report = asked(mesh, folder, ["--dtype", "float32", *args.options])
            memory = report["memory"]
            planned = memory["predicted"]["needed"]
            ranks = memory["ranks"] or [memory]
            grown = [each["process_peak"]["anonymous"] - each["process_before"]["anonymous"] for each in ranks]
            read = [each["checkpoint_read"] for each in memory["ranks"]]
            print(
                f"{mesh}: {report['prompt_tokens']:,} tokens, plan {planned / MIB:.1f} MiB, measured "
                f"{', '.join(f'{size / MIB:.1f}' for size in grown)} MiB: {max(grown) / planned:.3f}"
                + "".join(f"; read {x['share'] / MIB:.1f} + {x['replicated'] / MIB:.1f} MiB" for x in read),
                flush=True,
            )


if __name__ == "__main__":
    main()
