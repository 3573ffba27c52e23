"""The options that several commands share, as a person reads them in `--help`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from l4ctx.run import choices

MOST_TOKENS = 2**31 - 1  # positions are 32-bit numbers, see `model.bounds`


def token_count(minimum: int) -> Callable[[str], int]:
    """Reads an option that counts tokens; the parser of arguments says which one is wrong."""

    def parse(text: str) -> int:
        from l4ctx.formatting import parse_tokens

        count = _parsed(parse_tokens, str(text))  # a default is a number
        if count < minimum:
            raise typer.BadParameter(f"{text} is less than {minimum}")
        if count > MOST_TOKENS:
            raise typer.BadParameter(f"it is more than {MOST_TOKENS:,}, the last position that a model can have")
        return count

    return parse


def size(text: str) -> int:
    """Bytes."""
    from l4ctx.formatting import parse_size

    return _parsed(parse_size, text)


def _rate(text: str) -> float:
    """Bytes a second."""
    from l4ctx.formatting import parse_rate

    return _parsed(parse_rate, text)


def _operations(text: str) -> float:
    """Floating-point operations a second."""
    from l4ctx.formatting import parse_operations

    return _parsed(parse_operations, text)


def _quantization(text: str) -> str:
    from model.quantization.choice import NONE, Quantization

    return text if text == NONE else str(_parsed(Quantization.parse, text))


def _encoding(name: str) -> str:
    """Python's own name of an encoding of text."""
    from l4ctx.documents.text import check_encoding

    return _parsed(check_encoding, name)


def context_folder(name: str) -> Path:
    """The folder of that name; an empty one, as an unset shell variable gives it, would be the current folder."""
    if not name:
        raise typer.BadParameter("the name of the folder is empty (is a shell variable unset?)")
    return Path(name)


def _parsed(parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def meant_model(text: str) -> Path:
    """A checkpoint that is there, or that a name in the settings or the hub's cache stands for."""
    path = Path(text)
    if not text or os.path.lexists(path):
        return path
    from l4ctx.cli.settings import read_settings
    from l4ctx.inspection import model_names

    return model_names.meant_model(text, read_settings().models)


Model = Annotated[
    Path | None,
    typer.Option(
        "--model",
        "-m",
        envvar="L4CTX_MODEL",
        parser=meant_model,
        metavar="DIR",
        help="Checkpoint folder or GGUF file; or the name of one in the settings ([models]) or in the hub's cache.",
        show_default=False,
    ),
]
Paths = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PATH",
        help="Files and folders to read, in this order; FILE:10-40 stands for lines of a file, - for standard "
        "input. Without a path, what is piped in is the document.",
        show_default=False,
    ),
]
NoImages = Annotated[bool, typer.Option("--no-images", help="Leave image files out.")]
SkipUnreadable = Annotated[
    bool,
    typer.Option("--skip-unreadable", help="Skip what cannot be read in a folder instead of ending with exit code 2."),
]
Pdf = Annotated[
    choices.PdfMode,
    typer.Option(
        metavar="text|pages|both", help="Read the text of PDF files, their pages as images, or both (needs l4ctx[pdf])."
    ),
]
Replace = Annotated[bool, typer.Option("--replace", help="Allow dropping other documents that the context holds.")]
Encoding = Annotated[
    str | None,
    typer.Option(
        parser=_encoding,
        metavar="NAME",
        help="Encoding of texts that are not UTF-8 and have no byte order mark, such as gbk or "
        "windows-1252 (default: detected).",
        show_default=False,
    ),
]
KeepPayload = Annotated[
    bool,
    typer.Option(
        "--keep-payload",
        help="Keep notebook outputs, the content of data: URIs and emails as they are, attachments included, which are "
        "left out by default.",
    ),
]
Html = Annotated[
    choices.HtmlMode,
    typer.Option(
        metavar="source|text",
        help="Read web pages as the source that they are, or their text alone (needs l4ctx[office]).",
    ),
]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")]
Dtype = Annotated[
    choices.Dtype,
    typer.Option(
        metavar="auto|float32|bfloat16|float16",
        help="Type to compute in; weights keep their stored form. auto: what the processor multiplies quickly, "
        "which is bfloat16 or float32.",
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        parser=_quantization,
        metavar="int8|int4|int4-g32|fp8",
        help="Quantize 16-bit weights of experts and dense layers while they are loaded; with +attention, as in "
        "int8+attention, those of attention, too. int4 has groups of 128, int4-g32 of 32.",
        show_default=False,
    ),
]
KVDtype = Annotated[
    choices.KVDtype,
    typer.Option(
        "--kv-dtype",
        metavar="auto|float32|bfloat16|float16|fp8|int8",
        help="Type to store the keys and values of older "
        "text in. auto: the type computed in; int8 takes about half of bfloat16.",
    ),
]
KVDeviceMemory = Annotated[
    int | None,
    typer.Option(
        "--kv-device-memory",
        parser=size,
        metavar="SIZE",
        help="GPU memory for keys and values of the NoPE layers, such as 8GiB (default: what is free).",
    ),
]
KVHostMemory = Annotated[
    int | None,
    typer.Option(
        "--kv-host-memory",
        parser=size,
        metavar="SIZE",
        help="Host memory for them, such as 8GiB (default: what is free).",
    ),
]
WeightsMemory = Annotated[
    int | None,
    typer.Option(
        "--weights-memory",
        parser=size,
        metavar="SIZE",
        help="Memory for weights that are read from the checkpoint's files, such as 16GiB (default: what is free).",
    ),
]
WeightsDeviceMemory = Annotated[
    int | None,
    typer.Option(
        "--weights-device-memory",
        parser=size,
        metavar="SIZE",
        help="GPU memory for weights, such as 20GiB; the others are copied there layer by layer (default: all of them "
        "are there).",
    ),
]
KVDir = Annotated[
    Path | None,
    typer.Option(
        "--kv-dir", metavar="DIR", help="Folder on a fast disk for what memory does not hold; nothing is left there."
    ),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, ...; auto takes GPUs if there are any.")]
Attention = Annotated[
    choices.AttentionBackend | None,
    typer.Option(
        metavar="sdpa|cudnn|matmul|flex|eager",
        help="Attention kernels: PyTorch's fused ones (sdpa), cuDNN's, matrix products, "
        "flex_attention, or the slow reference (default: the fastest here).",
        show_default=False,
    ),
]
ContextRanks = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        help="Of the processes that torchrun started: divide what is read over N of them, and the model over the rest "
        "(default: 1, the model over all of them).",
        show_default=False,
    ),
]
PrefillChunkSize = Annotated[
    int | None,
    typer.Option(
        parser=token_count(1),
        metavar="N",
        help="Tokens per prefill step; fewer need less memory for activations (default: 8192; fewer if those do "
        "not fit, more while reading weights from disk takes longer than computing).",
        show_default=False,
    ),
]
GpuMemory = Annotated[
    int | None,
    typer.Option(
        "--gpu-memory",
        parser=size,
        metavar="SIZE",
        help="Plan for GPUs with so much memory each, such as 141GiB, which need not be here: an estimate by "
        "arithmetic, never measured on GPUs. The options below are for it.",
    ),
]
GpusOfOneProcess = Annotated[
    int | None,
    typer.Option(
        "--gpus",
        min=1,
        metavar="N",
        help="So many of them in one process, which whole layers are spread over, instead of ranks.",
        show_default=False,
    ),
]
GpuTensorRanks = Annotated[
    int | None,
    typer.Option(
        "--tp",
        min=1,
        metavar="N",
        help="Tensor ranks, which divide every layer (default: 1).",
        show_default=False,
    ),
]
GpuContextRanks = Annotated[
    int | None,
    typer.Option(
        "--cp",
        min=1,
        metavar="N",
        help="Context ranks times those, which divide the text (default: 1).",
        show_default=False,
    ),
]
HostMemory = Annotated[
    int | None,
    typer.Option(
        "--host-memory",
        parser=size,
        metavar="SIZE",
        help="Host memory for each GPU, such as 64GiB (default: as much as is needed).",
    ),
]
Link = Annotated[
    float | None,
    typer.Option(
        "--link",
        parser=_rate,
        metavar="RATE",
        help="What a GPU sends to others, such as 400GB/s (default: 400GB/s, NVLink of an H100).",
    ),
]
HostLink = Annotated[
    float | None,
    typer.Option(
        "--host-link",
        parser=_rate,
        metavar="RATE",
        help="What comes to a GPU from host memory (default: 50GB/s, PCIe 5.0 with 16 lanes).",
    ),
]
DiskRate = Annotated[
    float | None,
    typer.Option(
        "--disk-rate",
        parser=_rate,
        metavar="RATE",
        help="What is read from disk for each GPU (default: 5GB/s).",
    ),
]
ComputeRate = Annotated[
    float | None,
    typer.Option(
        "--compute-rate",
        parser=_operations,
        metavar="RATE",
        help="Operations a second of a GPU (default: 593TFLOP/s, 60 % of an H100's peak in bfloat16).",
    ),
]
GpuBandwidth = Annotated[
    float | None,
    typer.Option(
        "--gpu-bandwidth",
        parser=_rate,
        metavar="RATE",
        help="What a GPU reads of its own memory (default: 3.35TB/s, an H100's).",
    ),
]
Pictures = Annotated[
    list[Path] | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Also draw it, as PNG or SVG by the name of FILE. Can be repeated.",
        show_default=False,
    ),
]
Plain = Annotated[bool, typer.Option("--plain", help="Show the answer's Markdown on a terminal as it is.")]
Stats = Annotated[bool, typer.Option("--stats", help="Show tokens, time and rate in one line on stderr.")]
Log = Annotated[
    bool,
    typer.Option(
        "--log/--no-log",
        help="Keep answers for l4ctx log, conversations for chat --last, and which contexts and models were used.",
    ),
]
MemoryReport = Annotated[bool, typer.Option("--memory-report", help="Show where every byte went.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr.")]
