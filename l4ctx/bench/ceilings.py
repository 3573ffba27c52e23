"""Peak rates of this machine: matrix products, attention kernels, memory and disk.

Each is measured alone, on sizes that exceed the processor's caches or fill the kernels; no model is run. Rates are the
best within a short time, in operations or bytes a second. Work starts small and grows only while it stays quick: no
dtype takes more than seconds, however slow it is on this processor.
"""

from __future__ import annotations

import os
import tempfile
import time
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from l4ctx.machine.timing import Work, best_seconds, growing, growing_rate
from model.config import BACKEND_NAMES, TextConfig
from model.kernels.attend import KVSegment, attend
from model.kernels.masks import AttentionMask
from model.kernels.registry import backend as backend_of
from model.layers import linear

DTYPES = ("float32", "bfloat16", "float16")
SLOW_BACKENDS = ("eager", "flex")  # references, not kernels


HOPELESS = 10
"""A dtype whose matrix products are this many times slower than the fastest is measured no further."""

PRODUCT_SIZES = (64, 128, 256, 512, 1024, 2048)
BYTES = 2**28  # of the weight, the copy and the file
QUERIES, KEYS = 1024, 4096  # of one attention call


def measure(config: TextConfig, device: str) -> dict[str, Any]:
    """All rates, as plain numbers a second: "product" and "attention" by dtype in operations, the rest in bytes.

    "slow_product" has the rates of the dtypes that are measured no further.
    """
    with torch.inference_mode():
        rates = {dtype: rate for dtype in DTYPES if (rate := product_rate(dtype, device)) is not None}
        products = {dtype: rate for dtype, rate in rates.items() if HOPELESS * rate > max(rates.values())}
        attention = {
            name: {dtype: attention_rate(config, name, dtype, device) for dtype in products}
            for name in BACKEND_NAMES
            if name not in SLOW_BACKENDS and (device != "cpu" or name != "cudnn")
        }
        reads = {dtype: read_rate(config.hidden_size, dtype, device) for dtype in products}
        copy = copy_rate(device)
    slow = {dtype: rate for dtype, rate in rates.items() if dtype not in products}
    return {
        "product": products,
        "slow_product": slow,
        "attention": attention,
        "read": reads,
        "copy": copy,
        **disk_rate(),
    }


def product_rate(dtype: str, device: str) -> float | None:
    """Operations a second of the largest matrix product that is quick enough; None if the device cannot compute it."""
    made: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device}

    def product(size: int) -> Work:
        x, weight = torch.ones(size, size, **made), torch.ones(size, size, **made)
        return Work(partial(F.linear, x, weight), 2 * size**3)

    try:
        return growing_rate(product, PRODUCT_SIZES if device == "cpu" else (*PRODUCT_SIZES, 8192), device)
    except RuntimeError:  # the device has no matrix product in this dtype
        return None


def attention_rate(config: TextConfig, backend: str, dtype: str, device: str) -> float | None:
    """Operations a second of attention without a mask, with the model's heads; None if the backend cannot do it."""
    h, h_kv, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    made: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device}
    queries = torch.randn(1, QUERIES, h, d, **made).transpose(1, 2)  # as a projection leaves them
    segment = KVSegment(torch.randn(1, h_kv, KEYS, d, **made), torch.randn(1, h_kv, KEYS, d, **made), 0)

    def to_all_keys(rows: int) -> Work:
        positions = range(KEYS, KEYS + rows)
        return Work(
            partial(attend, queries[:, :, :rows], positions, [segment], AttentionMask(None), backend_of(backend)),
            4 * h * d * rows * KEYS,
        )

    try:
        return growing_rate(to_all_keys, growing(QUERIES), device)
    except (RuntimeError, NotImplementedError):
        return None


def read_rate(width: int, dtype: str, device: str) -> float:
    """Bytes a second of a weight that is multiplied with one row, as in decoding."""
    made: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device}
    weight = torch.ones(BYTES // (width * made["dtype"].itemsize), width, **made)
    x = torch.ones(1, width, **made)

    def of_rows(rows: int) -> Work:
        return Work(partial(linear, x, weight[:rows]), weight[:rows].nbytes)

    return growing_rate(of_rows, growing(len(weight)), device)


def copy_rate(device: str) -> float:
    """Bytes copied a second; each is read once and written once."""
    source, target = (torch.ones(BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    return BYTES / best_seconds(partial(target.copy_, source), device)


def disk_rate() -> dict[str, Any]:
    """Bytes a second of a file in the temporary folder, read once; and whether the page cache served it after all."""
    piece = os.urandom(2**20) * 8
    with tempfile.TemporaryFile(buffering=0) as file:
        for _ in range(BYTES // len(piece)):
            file.write(piece)
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        buffer, before, began = bytearray(len(piece)), _bytes_from_disk(), time.perf_counter()
        while file.readinto(buffer):
            pass
        seconds = time.perf_counter() - began
    after = _bytes_from_disk()
    is_cached = before is None or after is None or after - before < 0.9 * BYTES
    return {"disk": BYTES / seconds, "disk_is_cached": is_cached}


def _bytes_from_disk() -> int | None:
    """Bytes fetched from disk for this process so far, by /proc/self/io; None where there is no such file."""
    try:
        with open("/proc/self/io", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("read_bytes:"))
    except (OSError, ValueError, StopIteration):
        return None
