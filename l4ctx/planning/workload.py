"""What a plan is made for: the tokens to read and to generate, and the capacity of the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from cache.layout import KV_DTYPES, StoreLayout
from cache.residency import fork_bytes
from l4ctx.drafts.index import ORDER_BYTES, SEGMENT_TOKENS, SORTING_BYTES
from l4ctx.planning.weights import StoredWeights
from model.config import TextConfig
from model.context_division import PARTIAL_ITEMSIZE, ContextRank, meeting_bytes, most_queries, most_tokens
from model.costs import merging_bytes, query_size
from model.vision.config import TILES_AT_A_TIME, VisionConfig, vision_activation_bytes
from model.weights.owners import Owner
from model.weights.residency import WeightResidency

PAGE_BYTES = 4096
TOKEN_ID_BYTES = 4


@dataclass(frozen=True)
class Capacity:
    """Bytes that may be used, and the machine's speed. None: unknown, or not limited by the user."""

    host: int | None = None  # free now
    accelerator: int | None = None  # free now, on all of several; None without an accelerator
    accelerators: tuple[int, ...] = ()  # free on each of several that layers may be spread over
    kv_device: int | None = None  # --kv-device-memory
    kv_host: int | None = None  # --kv-host-memory
    disk: int | None = None  # free where sealed blocks can be written
    disk_folder: str | None = None  # None: no disk is used
    addresses: int | None = None  # left of the limit of address space, in which mapped files count
    file_size: int | None = None  # the limit of one file's size
    weights: int | None = None  # --weights-memory: for mapped weights
    weights_device: int | None = None  # --weights-device-memory; None: all weights have to be there
    operations: float = 1e11  # a second, in matrix products
    reading: float = 1e9  # bytes a second from the checkpoint's files
    copying: float = 2e10  # bytes a second from host memory to an accelerator: PCIe 4.0 with 16 lanes, assumed

    @property
    def has_disk(self) -> bool:
        return self.disk_folder is not None

    def shared_by(self, processes: int) -> Capacity:
        """What each of so many processes on the machine may use."""
        host, disk = (None if size is None else size // processes for size in (self.host, self.disk))
        return replace(
            self,
            host=host,
            disk=disk,
            operations=self.operations / processes,
            reading=self.reading / processes,
        )

    def with_one(self, device: int | None = None) -> Capacity:
        """With one of several accelerators alone: that of this number, or the one with the most free memory."""
        if not self.accelerators:
            return self
        free = max(self.accelerators) if device is None else self.accelerators[device]
        return replace(self, accelerator=free, accelerators=())

    @property
    def without_disk(self) -> Capacity:
        return replace(self, disk=None, disk_folder=None, file_size=None)


NO_LIMITS = Capacity()


@dataclass(frozen=True)
class ImageWorkload:
    """What images among the documents add to a workload. `largest` takes the most memory to decode."""

    vision: VisionConfig
    parameters: int  # of the vision tower
    stored_dtype: str | None  # of its weights; None: unknown, or mixed
    tokens: int  # of the images in the prompt
    pixel_bytes: int  # host memory to decode the largest image and cut it into tiles
    largest: str


@dataclass(frozen=True)
class Rows:
    """Answers at a time: forks of the cache that holds the documents. Lengths in tokens."""

    count: int
    question: int  # the longest one
    room: int  # the longest question with its answer


@dataclass(frozen=True)
class Workload:
    """What is read and generated, and with which model and dtypes. Sizes in tokens and bytes; dtypes by name."""

    config: TextConfig
    prompt_tokens: int
    max_new_tokens: int
    weights: int  # of the text model, in its stored form
    weights_are_mapped: bool  # or could be: pages of the checkpoint's files, which the system can drop and read again
    dtype: str
    kv_dtype: str = "auto"
    stored_dtype: str | None = None  # the checkpoint's, in which a CPU can map weights; None: unknown
    prefill_chunk_size: int | None = None  # None: the largest of PREFILL_CHUNK_SIZES that fits
    is_saved: bool = False  # every sealed block is written to disk
    on_disk_already: int = 0  # bytes of those blocks that a saved context already has
    new_tokens: int | None = None  # read in this run; a saved context has the others. None: all
    largest: Sequence[tuple[str, int]] = ()  # documents with their tokens
    saved_layout: StoreLayout | None = None  # of a saved context; overrides the dtypes
    images: ImageWorkload | None = None  # None: the documents have no images
    has_drafts: bool = False  # the prompt is indexed, for drafts of the answer
    stored: StoredWeights | None = None  # the weights by owner and layer; None: not known, and never streamed
    rows: Rows | None = None  # of many questions about the prompt; None: one that is part of it, or none
    whole: TextConfig | None = None  # the whole model's, where `config` is one rank's part
    ranks: int = 1  # that the model is divided over
    gathers_rows: bool = False  # a row of all ranks' blocks is in memory while it is written
    context_ranks: int = 1  # that the tokens are divided over; what is planned is the most that one needs
    converses: bool = False  # the run may grow to all positions, and its state before the last turn is kept

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.max_new_tokens

    @property
    def held(self) -> int:
        """Tokens of the run in the cache of the rank that holds most."""
        return max(1, most_tokens(self.context_ranks, self.length, self.config.attention_chunk_size))

    def own_step(self, step: int) -> int:
        """The most tokens that one rank computes of `step`."""
        return ContextRank(0, self.context_ranks).most_in_a_step(step, self.config.attention_chunk_size)

    def meeting(self, together: int, step: int) -> int | None:
        """Bytes that attention takes where context ranks meet, in a step of `together` tokens, `step` of which are this
        rank's; None where none meet. Queries travel, or a segment's keys and values; then there is one result more."""
        if self.context_ranks == 1:
            return None
        config, itemsize = self.config, KV_DTYPES[self.dtype]
        # queries of many questions always travel
        asked = min(together, self.rows.count * self.rows.question) if self.rows else 0
        queries = max(asked, most_queries(config, self.length, together, itemsize))
        result = step * query_size(config) * PARTIAL_ITEMSIZE
        by_keys = merging_bytes(config, step) + result + 2 * self.layout.segment_bytes  # one arrives after another
        return max(meeting_bytes(config, queries, itemsize), by_keys)

    @property
    def read_tokens(self) -> int:
        return self.prompt_tokens if self.new_tokens is None else self.new_tokens

    @property
    def step_tokens(self) -> int:
        """The most tokens that one forward could have, if no prefill chunk limited it."""
        return max(self.read_tokens, self.rows.count * self.rows.question if self.rows else 0)

    @property
    def row_bytes(self) -> int:
        """What answers at a time need beside what they share: keys and values, and the logits of a step."""
        if self.rows is None:
            return 0
        logits = 4 * self.config.vocab_size
        return self.rows.count * (fork_bytes(self.layout, self.rows.room) + logits)

    @property
    def kept_state(self) -> int:
        """Bytes at most of the state before a conversation's last turn: what a fork of the cache copies."""
        if not self.converses:
            return 0
        return self.layout.window_bytes + self.layout.open_bytes(self.layout.block_tokens)

    @property
    def gathered_row(self) -> int:
        """Bytes of host memory for a row of blocks of all KV heads while the first rank writes it; with context ranks
        also for a segment's keys, as they come from each of them and joined."""
        if self.whole is None or not self.gathers_rows:
            return 0
        layout = self.layout.of_rank(self.whole)
        return layout.row_bytes + (2 * layout.segment_bytes if self.context_ranks > 1 else 0)

    @property
    def draft_index(self) -> int:
        """Bytes of host memory for what drafts are copied from, beside the ids of tokens that are read."""
        if not self.has_drafts:
            return 0
        saved = TOKEN_ID_BYTES * (self.prompt_tokens - self.read_tokens)  # ids from a context
        return ORDER_BYTES * self.prompt_tokens + saved

    @property
    def sorting(self) -> int:
        """Bytes of host memory while that is made, before or after all forwards."""
        tokens = min(self.prompt_tokens, SEGMENT_TOKENS) if self.has_drafts else 0
        return SORTING_BYTES * tokens // SEGMENT_TOKENS

    @property
    def tower_weights(self) -> int:
        return self.images.parameters * KV_DTYPES[self.dtype] if self.images else 0

    @property
    def held_weights(self) -> int:
        """Bytes of weights that the process allocates: those that are not pages of mapped files."""
        if not self.weights_are_mapped:
            return self.weights + self.tower_weights
        tower = self.tower_weights if self.images and self.images.stored_dtype != self.dtype else 0
        return tower + (self.stored.converted(self.dtype) if self.stored else 0)

    @property
    def looked_up(self) -> int:
        """Bytes of mapped embeddings that the tokens bring into memory, in whole pages."""
        if self.stored is None or not self.weights_are_mapped:
            return 0
        embeddings = self.stored.owned_by(Owner.EMBEDDINGS)
        return min(embeddings, self.length * (embeddings // self.config.vocab_size + PAGE_BYTES))

    def weight_residency(self, budget: int | None) -> WeightResidency:
        """How the mapped layers share `budget` bytes of memory with what else is mapped; None: no limit."""
        if self.stored is None or not self.weights_are_mapped:
            return WeightResidency(())  # nothing is streamed
        if budget is None:
            return WeightResidency(self.stored.layers)
        left, head = max(0, budget - self.looked_up), self.stored.owned_by(Owner.HEAD)
        if sum(layer.total for layer in self.stored.layers) <= left:
            left = max(0, left - head)  # generating needs it; where layers are streamed, their room serves for it
        return WeightResidency(self.stored.layers, left)

    @property
    def tower_activations(self) -> int:
        """Bytes that a forward pass of the vision tower needs beside its weights."""
        if self.images is None:
            return 0
        return vision_activation_bytes(self.images.vision, TILES_AT_A_TIME, KV_DTYPES[self.dtype])

    @property
    def pixel_bytes(self) -> int:
        return self.images.pixel_bytes if self.images else 0

    @cached_property
    def layout(self) -> StoreLayout:
        length = self.config.max_position_embeddings if self.converses else self.held
        if self.saved_layout is not None:
            return replace(self.saved_layout, length=length)
        whole = self.whole or self.config
        layout = StoreLayout.of(whole, length=length, dtype=self.dtype, kv_dtype=self.kv_dtype)
        return layout.of_rank(self.config)

    def without_images(self) -> Workload:
        tokens = self.images.tokens if self.images else 0
        new_tokens = None if self.new_tokens is None else max(0, self.new_tokens - tokens)
        return replace(self, images=None, prompt_tokens=self.prompt_tokens - tokens, new_tokens=new_tokens)

    def with_weights(self, stored: StoredWeights, *, on_accelerator: bool) -> Workload:
        """The same workload with weights in another stored form."""
        return replace(
            self,
            weights=stored.bytes_in(self.dtype),
            weights_are_mapped=not on_accelerator and not stored.is_made,
            stored=stored,
            stored_dtype="bfloat16",
        )

    def in_dtype(self, dtype: str, *, on_accelerator: bool) -> Workload:
        """The same workload in another dtype.

        Weights keep their stored form, and stay mapped on a CPU, but for 32-bit ones that are computed in 16 bits.
        """
        itemsize, before = KV_DTYPES[dtype], KV_DTYPES[self.dtype]
        is_narrow = self.stored_dtype in ("bfloat16", "float16")
        is_made = self.stored is not None and self.stored.is_made
        return replace(
            self,
            dtype=dtype,
            weights=self.weights if is_narrow else self.weights * itemsize // before,
            weights_are_mapped=(is_narrow or dtype == self.stored_dtype) and not on_accelerator and not is_made,
        )
