"""What the user asks for: everything that the command line says, before anything is read. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from l4ctx.errors import RequestError

DEFAULT_MAX_NEW_TOKENS = 1024


@dataclass(frozen=True)
class Request:
    """None, where it is allowed, means the default that only the checkpoint, or a saved context, can tell."""

    model: Path
    paths: list[str]
    question: str | None = None  # None: nothing is asked, documents are read and kept
    stdin: BinaryIO | None = None
    system: str | None = None
    context: Path | None = None  # to answer from
    save_context: Path | None = None  # to keep what is read in
    no_images: bool = False
    skip_unreadable: bool = False  # leave out what cannot be read in a folder
    pdf: str = "text"  # of l4ctx.documents.pdf.PDF_MODES
    replace: bool = False  # what a context holds of other documents may go
    added: bool = False  # the paths are read behind what the context to answer from holds
    encoding: str | None = None  # of texts that do not say theirs; None: detected
    keep_payload: bool = False
    verify: bool = False  # read all of a context that is gone on with
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    sample: bool = False
    loop_guard: bool = True  # ends an answer that repeats itself for good
    dtype: str = "auto"
    kv_dtype: str = "auto"
    kv_device_memory: int | None = None  # bytes
    kv_host_memory: int | None = None
    kv_dir: Path | None = None
    device: str = "auto"
    attention: str | None = None
    prefill_chunk_size: int | None = None

    @property
    def answers_from_all(self) -> bool:
        """Whether all that a context holds is part of the prompt, and only what follows it is read."""
        return self.context is not None and (self.added or not self.paths)


def check_kv_dir(folder: Path | None) -> None:
    """Raises RequestError for a --kv-dir that is not there."""
    if folder is not None and not folder.is_dir():
        raise RequestError(f"--kv-dir {folder}: no such folder; make it, or name another one")


def check_kv_device_memory(amount: int | None, *, on_accelerator: bool) -> None:
    """Raises RequestError for a --kv-device-memory where there is no such memory."""
    if amount is not None and not on_accelerator:
        raise RequestError(
            "--kv-device-memory: the model computes on the CPU, whose memory is the host's: "
            "--kv-host-memory limits that"
        )
