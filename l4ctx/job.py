"""What a plan is made for: what is to be read and answered, and what there is room for. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from cache import sizes
from cache.sizes import StoreLayout
from model.config import TextConfig


@dataclass(frozen=True)
class Room:
    """Bytes that may be used. None: not known, or not limited by the user."""

    host: int | None = None  # free now
    accelerator: int | None = None  # free now, on the one that computes; None without one
    kv_device: int | None = None  # --kv-device-memory
    kv_host: int | None = None  # --kv-host-memory
    disk: int | None = None  # free where sealed blocks can be written
    disk_folder: str | None = None  # None: there is no such place

    @property
    def has_disk(self) -> bool:
        return self.disk_folder is not None

    @property
    def without_disk(self) -> Room:
        return replace(self, disk=None, disk_folder=None)


NO_LIMITS = Room()


@dataclass(frozen=True)
class Job:
    """What is to be read and answered, and with what. Sizes in tokens and bytes; dtypes by name."""

    config: TextConfig
    prompt_tokens: int
    max_new_tokens: int
    weights: int
    weights_are_mapped: bool  # or may be: pages of the checkpoint's own files, which the system can drop and read again
    dtype: str
    kv_dtype: str = "auto"
    stored_dtype: str | None = None  # the checkpoint's own, whose weights a CPU can map; None: not known
    prefill_chunk_size: int | None = None  # None: the largest of PREFILL_CHUNK_SIZES that fits
    is_saved: bool = False  # every sealed block is written to disk
    on_disk_already: int = 0  # bytes of them that a saved context has
    new_tokens: int | None = None  # those that are read in this run, where a saved context has the others
    largest: Sequence[tuple[str, int]] = ()  # documents with their tokens
    saved_layout: StoreLayout | None = None  # of a saved context, which then decides instead of the dtypes
    tower_bytes: int = 0  # activations of the vision tower, where images are read
    pixel_bytes: int = 0  # host memory to decode the largest image

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.max_new_tokens

    @property
    def read_tokens(self) -> int:
        return self.prompt_tokens if self.new_tokens is None else self.new_tokens

    @cached_property
    def layout(self) -> StoreLayout:
        if self.saved_layout is not None:
            return replace(self.saved_layout, length=self.length)
        return StoreLayout.of(self.config, length=self.length, dtype=self.dtype, kv_dtype=self.kv_dtype)

    def in_dtype(self, dtype: str, *, on_accelerator: bool) -> Job:
        """The same job computed in another dtype. Weights that need no conversion stay mapped, on a CPU."""
        itemsize, before = sizes.KV_DTYPES[dtype], sizes.KV_DTYPES[self.dtype]
        return replace(self, dtype=dtype, weights=self.weights * itemsize // before,
                       tower_bytes=self.tower_bytes * itemsize // before,
                       weights_are_mapped=dtype == self.stored_dtype and not on_accelerator)
