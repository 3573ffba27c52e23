"""What `l4ctx plan` says of GPUs that need not be here: bytes of each rank by tier, traffic, and the time.

All of it is arithmetic on config.json and the rates that are given or assumed: nothing is measured, and torch is not
imported.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from l4ctx.errors import RequestError
from l4ctx.planning.mesh import Mesh, RankPlan
from l4ctx.planning.mesh_time import MeshTime, Rates, Seconds, Traffic
from l4ctx.planning.workload import Capacity, Workload
from l4ctx.run.counted import Note, counted_weights
from l4ctx.run.request import GpuOptions, PlanRequest
from model.config import TextConfig


@dataclass(frozen=True)
class GpuReport:
    """The plan of one rank; all ranks' are alike."""

    rank: RankPlan
    capacity: Capacity  # of one rank
    time: MeshTime
    prefill: Seconds
    token: Seconds
    notes: list[str]

    @property
    def shortfalls(self) -> dict[str, tuple[int, int]]:
        return self.rank.shortfalls(self.capacity)

    @property
    def exceeds_positions(self) -> bool:
        return self.rank.workload.length > self.rank.workload.config.max_position_embeddings

    @property
    def fits(self) -> bool:
        return not self.shortfalls and not self.exceeds_positions

    @property
    def traffic(self) -> Traffic:
        """Of the last prefill step, which has the most."""
        last = self.time.positions(-1)
        return self.time.traffic(last.start, last.stop)

    @property
    def traffic_of_token(self) -> Traffic:
        return self.time.traffic_of_token()

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for --json. Bytes are those of one rank."""
        rank, workload = self.rank, self.rank.workload
        return {
            "fits": self.fits,
            "is_measured": False,
            "prompt_tokens": workload.prompt_tokens,
            "max_new_tokens": workload.max_new_tokens,
            "max_position_embeddings": workload.config.max_position_embeddings,
            "exceeds_positions": self.exceeds_positions,
            "tensor_ranks": rank.mesh.tensor,
            "context_ranks": rank.mesh.context,
            "kv_head_copies": rank.weights.kv_copies,
            "prefill_chunk_size": rank.prefill_chunk_size,
            "rank": {
                "device": rank.device,
                "host": rank.host,
                "disk": rank.disk,
                "weights_replicated": rank.weights.replicated,
                "tokens": rank.plan.workload.held,
                "plan": rank.plan.as_dict(),
            },
            "room": {"device": self.capacity.accelerator, "host": self.capacity.host},
            "missing": {tier: {"needed": needed, "there": there} for tier, (needed, there) in self.shortfalls.items()},
            "rates": asdict(self.time.rates),
            "traffic_of_last_chunk": asdict(self.traffic),
            "traffic_of_token": asdict(self.traffic_of_token),
            "hiding_chunk": self.time.hiding_chunk,
            "prefill_seconds": _seconds(self.prefill),
            "token_seconds": _seconds(self.token),
            "notes": self.notes,
        }


def plan_for_gpus(request: PlanRequest, note: Note) -> GpuReport:
    """The plan for `request.gpus`; `note` is told what a user should know.

    Raises RequestError, ConfigError, and DivisionError where the layers cannot be divided.
    """
    gpus, tokens = request.gpus, request.tokens
    assert gpus is not None
    if tokens is None or tokens < 1:
        raise RequestError("a plan for GPUs is made for a number of tokens: give --tokens N")
    config = TextConfig.from_folder(request.model)
    notes: list[str] = []

    def noted(text: str) -> None:
        notes.append(text)
        note(text)

    weights = counted_weights(request, config, noted)
    dtype = weights.dtype if request.compute.dtype == "auto" else request.compute.dtype
    request.kv.check_folder()
    rates = _rates(gpus)
    capacity = Capacity(
        host=gpus.host_memory,
        accelerator=gpus.memory,
        kv_device=request.kv.device_memory,
        kv_host=request.kv.host_memory,
        disk_folder=None if request.kv.folder is None else str(request.kv.folder),
        weights_device=request.compute.weights_device_memory,
        reading=rates.disk,
        copying=rates.host_link,
    )
    workload = Workload(
        config,
        prompt_tokens=tokens,
        max_new_tokens=request.max_new_tokens or 0,
        weights=weights.bytes_in(dtype),
        weights_are_mapped=False,
        dtype=dtype,
        kv_dtype=request.kv.dtype,
        stored_dtype=weights.dtype,
        prefill_chunk_size=request.compute.prefill_chunk_size,
        stored=weights.stored,
    )
    rank = RankPlan.of(workload, Mesh(gpus.tensor, gpus.context), capacity)
    for text in rank.plan.notes:
        noted(text)
    time = MeshTime(rank, rates)
    return GpuReport(rank, capacity, time, time.prefill(), time.token(), notes)


def _rates(gpus: GpuOptions) -> Rates:
    given = {"compute": gpus.compute, "link": gpus.link, "host_link": gpus.host_link, "disk": gpus.disk}
    given["memory"] = gpus.bandwidth
    return Rates(**{name: rate for name, rate in given.items() if rate is not None})


def _seconds(seconds: Seconds) -> dict[str, float]:
    parts = {field.name: getattr(seconds, field.name) for field in fields(seconds)}
    return {**parts, "total": seconds.total, "share_waiting": seconds.share_waiting}
