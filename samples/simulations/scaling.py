"""What Scout takes on machines that are not here: `l4ctx plan`'s closed forms beside the simulation of the same steps.

python -m samples.simulations.scaling

Prints the tables of DESIGN.md. Nothing here is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cache.layout import KV_DTYPES
from l4ctx.formatting import human_seconds
from l4ctx.planning.mesh import Mesh, RankPlan
from l4ctx.planning.mesh_time import LATENCY, MeshTime, Rates, Seconds
from l4ctx.planning.published import PUBLISHED
from l4ctx.planning.workload import Capacity, Workload
from model.config import TextConfig
from model.context_division import ContextRank
from samples.simulations.step import Machine, Played, play
from samples.simulations.work import Held, Step

GIB = 2**30
SCOUT = TextConfig.from_dict(
    {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 202048,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 8192,
        "max_position_embeddings": 10485760,
        "torch_dtype": "bfloat16",
    }
)

H200 = Rates(compute=593e12, link=400e9, host_link=50e9, disk=5e9, memory=4.8e12)
RTX_4090 = Rates(compute=99e12, host_link=25e9, disk=5e9, memory=1.008e12)
PEAK = Rates(compute=790e12, host_link=50e9)

SAMPLES = 5
"""Steps of a prefill that are played; between them, what a step takes is interpolated."""


@dataclass(frozen=True)
class Case:
    """Scout in a published form, on GPUs."""

    name: str
    form: str
    tokens: int
    mesh: Mesh
    capacity: Capacity
    rates: Rates
    kv_dtype: str = "auto"
    prefill_chunk_size: int | None = None
    rank: RankPlan = field(init=False)

    def __post_init__(self) -> None:
        stored = next(form for form in PUBLISHED if form.name == self.form).weights(SCOUT)
        workload = Workload(
            SCOUT,
            prompt_tokens=self.tokens,
            max_new_tokens=0,
            weights=stored.bytes_in("bfloat16"),
            weights_are_mapped=False,
            dtype="bfloat16",
            kv_dtype=self.kv_dtype,
            stored_dtype="bfloat16",
            prefill_chunk_size=self.prefill_chunk_size,
            stored=stored,
        )
        object.__setattr__(self, "rank", RankPlan.of(workload, self.mesh, self.capacity))

    @property
    def time(self) -> MeshTime:
        return MeshTime(self.rank, self.rates)

    def played(self, positions: range) -> Played:
        """One step, simulated."""
        rates, device = self.rates, self.rank.plan.device_weights
        machine = Machine(rates.compute, rates.link, rates.host_link, rates.disk, LATENCY)
        layers = range(SCOUT.num_hidden_layers)
        step = Step(
            self.rank.plan.workload.config,
            KV_DTYPES[self.rank.workload.dtype],
            positions,
            self.mesh.tensor,
            [self._held(rank, positions.start) for rank in range(self.mesh.context)],
            [device.residency.streamed(layer).total if device else 0 for layer in layers],
            weights_on_disk=device is not None and not device.is_pinned,
        )
        return play(machine, step)

    def simulated(self, samples: int = SAMPLES) -> tuple[float, float]:
        """Seconds of the whole prefill, and of these those that a rank computes."""
        whole = self.time.number_of_steps - 1
        end = self.played(self.time.positions(whole))  # shorter than the others
        chosen = sorted({round((whole - 1) * i / (samples - 1)) for i in range(samples)})
        found = [self.played(self.time.positions(number)) for number in chosen]
        return (
            end.seconds + _interpolated(chosen, [played.seconds for played in found]),
            end.computing + _interpolated(chosen, [played.computing for played in found]),
        )

    def _held(self, number: int, start: int) -> Held:
        plan, layout = self.rank.plan, self.rank.plan.layout
        tokens = ContextRank(number, self.mesh.context).tokens_before(start, SCOUT.attention_chunk_size)
        _, host, disk = plan.residency.split(layout.sealed_rows(tokens))
        host, disk = host * layout.block_tokens, disk * layout.block_tokens
        return Held(disk, host, tokens - host - disk, layout.segment_tokens, layout.sealed_segment_bytes)


def _interpolated(numbers: Sequence[int], values: Sequence[float]) -> float:
    """The sum over 0 .. numbers[-1] of what is known at some numbers, by straight lines between them."""
    total = values[0]
    for i in range(1, len(numbers)):
        gap = numbers[i] - numbers[i - 1]
        total += sum(values[i - 1] + (values[i] - values[i - 1]) * k / gap for k in range(1, gap + 1))
    return total


def _h200(name: str, form: str, tensor: int, context: int) -> Case:
    mesh = Mesh(tensor, context)
    return Case(f"{name}, {tensor} x {context}", form, 10**7, mesh, Capacity(accelerator=141 * 10**9), H200)


def scaling() -> list[Case]:
    """The cases of the first table."""
    card: dict[str, Any] = {"accelerator": 24 * GIB, "host": 64 * GIB, "disk_folder": "disk"}
    alone = Mesh()
    return [
        *(_h200("bf16", "bfloat16", tensor, context) for tensor, context in ((8, 1), (4, 2), (2, 4))),
        *(_h200("FP8", "FP8", tensor, context) for tensor, context in ((2, 4), (1, 8))),
        *(
            Case(f"w4a16, {name} keys and values", "w4a16", 10**6, alone, Capacity(**card), RTX_4090, kv_dtype)
            for name, kv_dtype in (("int8", "int8"), ("bf16", "auto"))
        ),
    ]


def hiding(chunk: int) -> Case:
    """All NoPE blocks in host memory, read with a prefill chunk of so many tokens."""
    capacity = Capacity(accelerator=141 * 10**9, kv_device=0)
    return Case("FP8", "FP8", 10**6, Mesh(), capacity, PEAK, prefill_chunk_size=chunk)


CHUNKS = (512, 1024, 2048, 4096, 8192)


def scaling_rows() -> Iterator[str]:
    """Memory of each rank by tier, and the time of the prefill by both ways."""
    yield "| Scout | tokens | GPU | host | disk | prefill, closed form | simulated | waits | a token |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for case in scaling():
        rank, closed = case.rank, case.time.prefill()
        seconds, computing = case.simulated()
        tiers = " | ".join(f"{num_bytes / GIB:.0f} GiB" for num_bytes in (rank.device, rank.host, rank.disk))
        yield (
            f"| {case.name} | {case.tokens // 10**6}M | {tiers} "
            f"| {human_seconds(closed.total)} | {human_seconds(seconds)} | {_waits(seconds, computing)} "
            f"| {case.time.token().total:.1g} s |"
        )


def hiding_rows() -> Iterator[str]:
    """The last whole step of 1M tokens: how much of it waits."""
    yield "| prefill chunk | waits, closed form | simulated |"
    yield "|---|---|---|"
    for chunk in CHUNKS:
        case = hiding(chunk)
        last = case.time.positions(-2)  # the very last one is shorter
        closed: Seconds = case.time.step(last.start, last.stop)
        played = case.played(last)
        yield f"| {chunk:,} | {closed.share_waiting:.0%} | {_waits(played.seconds, played.computing)} |"


def _waits(seconds: float, computing: float) -> str:
    return f"{max(0.0, 1 - computing / seconds):.0%}"


def main() -> None:
    for row in scaling_rows():
        print(row)
    print()
    for row in hiding_rows():
        print(row)


if __name__ == "__main__":
    main()
