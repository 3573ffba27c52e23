"""Builds requests from options by their names on the command line."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from l4ctx.run.request import ComputeOptions, ContextOptions, KVOptions, PlanRequest, Request, SourceOptions

KV = {"kv_dtype": "dtype", "kv_device_memory": "device_memory", "kv_host_memory": "host_memory", "kv_dir": "folder"}


def plan_request(model: Path, **options: Any) -> PlanRequest:
    """For example plan_request(folder, tokens=5, kv_dir=disk)."""
    return PlanRequest(model, **_grouped(options))


def prefill_request(model: Path, paths: list[str], folder: Path, **options: Any) -> Request:
    return Request(model, context=ContextOptions(save_to=folder), **_grouped({"paths": paths, **options}))


def _grouped(options: dict[str, Any]) -> dict[str, Any]:
    kv = KVOptions(**{KV[name]: options.pop(name) for name in list(options) if name in KV})
    groups: dict[str, Any] = {"kv": kv}
    for name, kind in (("sources", SourceOptions), ("compute", ComputeOptions)):
        known = {field.name for field in fields(kind)}
        groups[name] = kind(**{key: options.pop(key) for key in list(options) if key in known})
    return {**groups, **options}
