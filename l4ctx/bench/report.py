"""What the benchmark found: medians, ratios taken round by round, and times as multiples of the roofline."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cache.layout import KV_DTYPES
from l4ctx.bench.jobs import Candidate, Measurement
from l4ctx.bench.roofline import decode_share, prefill_share
from model.config import TextConfig

OWN = "l4ctx"


@dataclass(frozen=True)
class BenchRun:
    """The figures of one process. `round` counts from 1; 0 is the trial by which candidates are chosen."""

    round: int
    candidate: Candidate
    measurement: Measurement

    def as_dict(self) -> dict[str, Any]:
        return {"round": self.round} | asdict(self.candidate) | self.measurement.as_dict()


@dataclass(frozen=True)
class Figures:
    """The figures of one engine at one length, over all rounds."""

    candidate: Candidate
    prefill_rates: list[float]  # tokens a second, one a round
    decode_rates: list[float]  # empty if nothing was decoded
    first_token_seconds: float  # median
    peak: int | None  # highest of all rounds
    peak_above_weights: int | None
    keys_values: int | None
    version: str | None
    prefill_ratios: list[float]  # l4ctx's rate divided by this engine's, one a round
    decode_ratios: list[float]

    def as_dict(self) -> dict[str, Any]:
        medians = {
            f"median_{name}": statistics.median(values) if (values := getattr(self, name)) else None
            for name in ("prefill_rates", "decode_rates", "prefill_ratios", "decode_ratios")
        }
        return asdict(self) | medians | {"engine": self.candidate.engine}


@dataclass
class BenchReport:
    """All raw figures, and what follows from them. `lengths` and `decode_tokens` are in tokens."""

    config: TextConfig
    model: dict[str, Any]
    machine: dict[str, Any]
    lengths: Sequence[int]
    decode_tokens: int
    rounds: int
    trials: list[BenchRun] = field(default_factory=list)
    runs: list[BenchRun] = field(default_factory=list)
    chosen: dict[str, Candidate] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # dtypes too slow to be tried, one line each
    ceilings: list[dict[str, Any]] = field(default_factory=list)  # one a round

    def figures(self, tokens: int) -> list[Figures]:
        """One entry for each engine that was measured at this length, l4ctx first."""
        return [
            figures_of(self.runs, candidate, tokens)
            for candidate in self.chosen.values()
            if any(run.candidate == candidate and run.measurement.tokens == tokens for run in self.runs)
        ]

    @property
    def median_ceilings(self) -> dict[str, Any] | None:
        return median_of(self.ceilings) if self.ceilings else None

    def shares(self, tokens: int) -> dict[str, Any]:
        """l4ctx against its roofline in "prefill" and "decode", where the ceilings are known; medians."""
        ceilings, candidate = self.median_ceilings, self.chosen[OWN]
        runs = [run.measurement for run in self.runs if run.candidate == candidate and run.measurement.tokens == tokens]
        if ceilings is None or not runs:
            return {}
        seconds = statistics.median(run.first_token_seconds for run in runs)
        found = {"prefill": prefill_share(self.config, tokens, seconds, ceilings, candidate.dtype, candidate.attention)}
        decoding = [run.decode_seconds for run in runs if run.decode_seconds]
        if decoding and ceilings["read"]:
            found["decode"] = decode_share(
                self.config,
                tokens,
                self.decode_tokens,
                statistics.median(decoding),
                ceilings,
                KV_DTYPES[candidate.dtype],
                runs[0].token_weight_bytes,
            )
        return {name: share for name, share in found.items() if share is not None}

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for --json: bytes, seconds, tokens, operations, and rates a second."""
        return {
            "model": self.model,
            "machine": self.machine,
            "decode_tokens": self.decode_tokens,
            "rounds": self.rounds,
            "chosen": {engine: asdict(candidate) for engine, candidate in self.chosen.items()},
            "lengths": [
                {
                    "tokens": tokens,
                    "engines": [figures.as_dict() for figures in self.figures(tokens)],
                    "shares": self.shares(tokens),
                }
                for tokens in self.lengths
            ],
            "ceilings": {"median": self.median_ceilings, "rounds": self.ceilings},
            "failures": self.failures,
            "left_out": self.left_out,
            "trials": [run.as_dict() for run in self.trials],
            "runs": [run.as_dict() for run in self.runs],
        }


def best_candidate(trials: Sequence[BenchRun], engine: str) -> Candidate | None:
    """The engine's candidate with the fastest prefill; None if none of them succeeded."""
    own = [run for run in trials if run.candidate.engine == engine]
    return max(own, key=lambda run: run.measurement.prefill_rate).candidate if own else None


def figures_of(runs: Sequence[BenchRun], candidate: Candidate, tokens: int) -> Figures:
    """Over the rounds in which the candidate was measured; ratios over those in which l4ctx was measured, too."""
    mine = {
        run.round: run.measurement for run in runs if run.candidate == candidate and run.measurement.tokens == tokens
    }
    ours = {
        run.round: run.measurement for run in runs if run.candidate.engine == OWN and run.measurement.tokens == tokens
    }
    pairs = [(ours[number], mine[number]) for number in sorted(mine) if number in ours]
    rows = list(mine.values())
    return Figures(
        candidate,
        [row.prefill_rate for row in rows],
        [row.decode_rate for row in rows if row.decode_rate],
        statistics.median(row.first_token_seconds for row in rows),
        max((row.peak for row in rows if row.peak is not None), default=None),
        max((row.peak_above_weights for row in rows if row.peak_above_weights is not None), default=None),
        rows[-1].keys_values,
        rows[-1].version,
        [own.prefill_rate / their.prefill_rate for own, their in pairs],
        [own.decode_rate / their.decode_rate for own, their in pairs if own.decode_rate and their.decode_rate],
    )


def median_of(values: Sequence[Any]) -> Any:
    """Of numbers, or of every number in nested objects of one form; a flag is true if any is; None where all are."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    if isinstance(known[0], dict):
        names = dict.fromkeys(name for value in known for name in value)
        return {name: median_of([value.get(name) for value in known]) for name in names}
    return any(known) if isinstance(known[0], bool) else statistics.median(known)
