"""Of --device: the one to compute on, and what is free there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from l4ctx.errors import RequestError

if TYPE_CHECKING:
    import torch


def usable_device(name: str) -> torch.device:
    """Of a --device. Raises RequestError."""
    import torch

    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise RequestError(f"--device {name}: no such device; auto, cpu and cuda are") from None
    try:
        torch.ones(1, device=device).item()  # fails on what cannot hold numbers, "meta" among them
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise RequestError(f"--device {name}: cannot be used here ({reason})") from None
    return device


def free_on_accelerator(device: torch.device) -> int | None:
    """Bytes; None for the CPU."""
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
