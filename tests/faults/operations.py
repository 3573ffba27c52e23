"""What the faults are tried on: a small checkpoint, documents, saved contexts in several states, and commands on them.

All lies below one folder: `model` and `docs`, which no command changes, and `state`, which is put back before each run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

from faults import snapshots
from support.fork_server import Ended, ForkServer, Run
from support.places import TINY

CHUNK = 128
WORDS = "The access code of room {} is {}. Ask at the desk, not in the hall; the desk closes at noon.\n"
MODEL = ["--model", "model"]
READ = [*MODEL, "--prefill-chunk-size", "256"]
ASK = [*READ, "--max-new-tokens", "2"]
QUESTION = "What is the code?"


@dataclass(frozen=True)
class Operation:
    """A command, and the state that it starts from: the name of a folder that `Place` makes.

    `keeps`: it writes a context. `needs_all`: exit code 0 means that the output is the answer from all documents; else
    it may leave something out and say so.
    """

    name: str
    arguments: list[str]
    start: str = "empty"
    keeps: bool = False
    needs_all: bool = True


OPERATIONS = [
    Operation("prefill", ["prefill", "docs", "-o", "state/ctx", *READ], keeps=True),
    Operation("resume", ["prefill", "docs", "-o", "state/ctx", *READ], "interrupted", keeps=True),
    Operation("grow", ["prefill", "docs", "more.md", "-o", "state/ctx", *READ], "complete", keeps=True),
    Operation("replace", ["prefill", "other", "-o", "state/ctx", "--replace", *READ], "complete", keeps=True),
    Operation("verify", ["prefill", "docs", "-o", "state/ctx", "--verify", *READ], "damaged", keeps=True),
    Operation("ask", ["ask", QUESTION, "docs", *ASK]),
    Operation("ask-context", ["ask", QUESTION, "--context", "state/ctx", *ASK], "complete"),
    Operation("ask-more", ["ask", QUESTION, "docs", "more.md", "--context", "state/ctx", *ASK], "complete"),
    Operation("ask-save", ["ask", QUESTION, "docs", "--save-context", "state/ctx", *ASK], keeps=True),
    Operation("ask-disk", ["ask", QUESTION, "docs", "--kv-dir", "state", "--kv-host-memory", "0", *ASK]),
    Operation(
        "questions",
        ["ask", "--questions", "questions.txt", "--context", "state/ctx", "--resume-answers", "state/answers", *ASK],
        "answered",
    ),
    Operation("inspect", ["inspect", "state/ctx"], "complete", needs_all=False),
    Operation("inspect-model", ["inspect", "model"], needs_all=False),
    Operation("plan", ["plan", "docs", *MODEL], needs_all=False),
    Operation("quantize", ["quantize", "model", "-o", "state/out", "--to", "w8a16"]),
]

BY_NAME = {operation.name: operation for operation in OPERATIONS}


def write_checkpoint(folder: Path) -> None:
    """Two layers of the sample model's text part, in two files."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    config = json.loads((TINY / "config.json").read_text())["text_config"]
    config |= {"num_hidden_layers": 2, "no_rope_layers": [1, 0], "attention_chunk_size": CHUNK}
    (folder / "config.json").write_text(json.dumps({"architectures": ["Llama4ForCausalLM"], **config}))
    kept = {}
    for file in sorted(TINY.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            name = name.removeprefix("language_model.")
            if "vision" in name or "multi_modal" in name or ".layers.1." in name or ".layers.2." in name:
                continue
            kept[name.replace(".layers.3.", ".layers.1.")] = tensor
    places = {name: f"model-0000{1 + ('.layers.1.' in name)}-of-00002.safetensors" for name in kept}
    for shard in set(places.values()):
        save_file({n: t for n, t in kept.items() if places[n] == shard}, folder / shard, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in kept.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_documents(top: Path) -> None:
    text = {
        "docs/a.md": "".join(WORDS.format(n, 7 * n) for n in range(8)),
        "docs/sub/b.txt": "".join(WORDS.format(n, 5 * n) for n in range(20, 26)),
        "docs/sub/c.log": "not to be read\n",
        "docs/.gitignore": "*.log\n",
        "docs/n.ipynb": json.dumps(
            {
                "nbformat": 4,
                "nbformat_minor": 5,
                "metadata": {},
                "cells": [{"cell_type": "markdown", "metadata": {}, "source": ["# Notes"]}],
            }
        ),
        "more.md": "".join(WORDS.format(n, 3 * n) for n in range(40, 45)),
        "other/d.md": "".join(WORDS.format(n, 11 * n) for n in range(60, 73)),
        "questions.txt": f"{QUESTION}\nWhere?\n",
    }
    for name, content in text.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(content)


WARM_UP = ("prefill", "ask-context", "questions", "inspect", "inspect-model", "plan", "quantize")


class Place:
    """The folder, with a fork server; `starts` below it holds the states that operations start from."""

    def __init__(self, top: Path, library: Path, warm_up: Collection[str] = WARM_UP) -> None:
        """`warm_up` are operations whose modules are imported before the first fork, for speed."""
        self.top, self.state = top, top / "state"
        write_checkpoint(top / "model")
        write_documents(top)
        self._tree: str | None = None  # of `state`, where it is known
        self.user: int | None = None  # who runs the commands: another one than we
        self.state.mkdir()
        (top / "scratch").mkdir()
        (top / "starts" / "empty").mkdir(parents=True)
        runs = [Run(BY_NAME[name].arguments, str(top), seconds=300) for name in warm_up]
        self.server = ForkServer(top / "scratch", runs, without=["llvmlite"], LD_PRELOAD=str(library))

    def start(self, name: str) -> Path:
        """The folder of a state that operations start from."""
        folder = self.top / "starts" / name
        if not folder.exists():
            self._make(name)
            shutil.copytree(self.state, folder)
        return folder

    def snapshot(self) -> dict[str, str]:
        """What `state` holds, as `shim.report` tells it, but taken in this process."""
        context = self.state / "ctx"
        self._tree = snapshots.tree(self.state)
        files = snapshots.tree(self.state, without="ctx")
        return {"tree": self._tree, "context": snapshots.context(context), "files": files}

    def forget(self) -> None:
        """To be called when `state` was changed by others than `run`."""
        self._tree = None

    def put_back(self, start: str, tree: str | None = None) -> None:
        """Makes `state` as it is at the start; nothing is done where it still is, by its digest `tree`."""
        if tree is not None and tree == self._tree:
            return
        source = self.start(start)
        shutil.rmtree(self.state, ignore_errors=True)
        shutil.copytree(source, self.state)

    def run(
        self,
        arguments: list[str],
        seconds: float = 30.0,
        hooks: dict[str, str | None] | None = None,
        pipes: bool = False,
        **more: object,
    ) -> Ended:
        roots = {name: str(self.top / name) for name in ("model", "docs", "other", "state")}
        roots |= {name: str(self.top / name) for name in ("more.md", "questions.txt")}
        argument = {"roots": roots, "state": str(self.state), **more}
        hooks = {"before": "faults.shim:begin", "after": "faults.shim:report", "argument": argument, **(hooks or {})}
        run = Run(arguments, str(self.top), seconds=seconds, user=self.user, pipes=pipes, **hooks)  # type: ignore[arg-type]
        ended = self.server.run(run)
        self._tree = None if ended.told is None else ended.told["tree"]
        return ended

    def close(self) -> None:
        self.server.close()

    def _make(self, name: str) -> None:
        """Makes `state` a state to start from, with names that no run gives."""
        earlier, operation, fault, code = STARTS[name]
        self.put_back(earlier)
        more = {} if fault is None else {"fault": fault}
        if operation is not None:
            ended = self.run(BY_NAME[operation].arguments, seed=1000 + list(STARTS).index(name), **more)
            assert ended.code == code, ended
        if name == "answered":
            answers = self.state / "answers"
            answers.write_bytes(answers.read_bytes().splitlines(keepends=True)[0])
        elif name == "damaged":
            block = min((self.state / "ctx" / "blocks").glob("000001-*"))
            content = bytearray(block.read_bytes())
            content[-5] ^= 1
            block.write_bytes(content)
        self._tree = None


# From which one each state to start from is made, by which operation, with which fault, and how that ends.
STARTS: dict[str, tuple[str, str | None, list[object] | None, int]] = {
    "complete": ("empty", "prefill", None, 0),
    "interrupted": ("empty", "prefill", ["write state/ctx/journal", 3, "ENOSPC"], 5),
    "answered": ("complete", "questions", None, 0),
    "damaged": ("complete", None, None, 0),
}
