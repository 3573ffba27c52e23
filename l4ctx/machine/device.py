"""The device to compute on, chosen by --device, and its free memory. Imports torch only where it is needed."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from l4ctx.errors import RequestError
from l4ctx.formatting import counted
from l4ctx.machine.limits import check_room_for_torch, startable_threads
from l4ctx.machine.processor import usable_cores
from l4ctx.machine.ranks import Launch

if TYPE_CHECKING:
    import torch


def prepare_torch() -> None:
    """To be called before torch is imported: raises LimitError where its libraries do not fit into the address space.

    Where the system allows fewer threads than there are cores, OpenMP gets as many as it may start. Silences torch's
    warning, on first use, that NumPy is missing: nothing here needs it.
    """
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    check_room_for_torch(is_loaded="torch" in sys.modules)
    if "torch" in sys.modules:
        return
    cores = usable_cores()
    if (threads := startable_threads(cores)) < cores:
        os.environ.update(OMP_NUM_THREADS=str(threads), RAYON_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="false")


def usable_device(name: str) -> torch.device:
    """The device that --device names, checked to work. Raises RequestError."""
    import torch

    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise RequestError(f"--device {name}: no such device; use auto, cpu, cuda or cuda:N") from None
    try:
        torch.ones(1, device=device).item()  # fails on devices without data, such as "meta"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise RequestError(f"--device {name}: cannot be used here ({reason})") from None
    return device


def usable_devices(name: str) -> tuple[torch.device, ...]:
    """Those that one process may put a model's layers on: with "auto" all GPUs that are visible, else the one named.

    The first is where it computes if one suffices. Raises RequestError. Not run on several GPUs yet.
    """
    import torch

    first = usable_device(name)
    if name != "auto" or first.type != "cuda":
        return (first,)
    count = torch.cuda.device_count()
    return (first,) if count == 1 else tuple(usable_device(f"cuda:{number}") for number in range(count))


def compute_on(device: torch.device) -> None:
    """Makes a GPU torch's current one, which is where kernels of our own are launched."""
    import torch

    if device.type == "cuda":
        torch.cuda.set_device(device)


def device_of_rank(launch: Launch, name: str) -> torch.device:
    """The device of one of several processes: the CPU, or of the GPUs the one with its number on this machine.

    It is then torch's current one. Raises RequestError. Not run on a GPU yet.
    """
    import torch

    if name.startswith("cuda:"):
        raise RequestError(f"--device {name}: each rank has a GPU of its own; use --device cuda")
    device = usable_device(name)
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise RequestError(f"--device {name}: several ranks compute on CPUs or on CUDA GPUs; add --device cpu")
    count = torch.cuda.device_count()
    if launch.local_count > count:
        raise RequestError(
            f"{launch.local_count} ranks on this machine, which has {counted(count, 'GPU')}: start one for each, "
            "or add --device cpu"
        )
    device = torch.device("cuda", launch.local_number)
    torch.cuda.set_device(device)
    return device


def free_on_accelerator(device: torch.device) -> int | None:
    """Free memory in bytes; None for the CPU."""
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def most_allocated(devices: Sequence[torch.device]) -> int | None:
    """The most bytes that torch has had on these GPUs, each at its own time; None for the CPU."""
    import torch

    if any(device.type != "cuda" for device in devices):
        return None
    return sum(torch.cuda.max_memory_allocated(device) for device in devices)


class _NVMLMemory(ctypes.Structure):
    """nvmlMemory_t (https://docs.nvidia.com/deploy/nvml-api)."""

    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


def available_on_gpu(index: int = 0) -> int | None:
    """Free memory of an NVIDIA GPU in bytes, from NVML: without torch, and without initialising the GPU.

    `index` counts within CUDA_VISIBLE_DEVICES. None without such a GPU or library. Not run on a GPU yet.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = None if visible is None else [name.strip() for name in visible.split(",") if name.strip()]
    if names is not None and index >= len(names):
        return None
    name = str(index) if names is None else names[index]
    handle, memory = ctypes.c_void_p(), _NVMLMemory()
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() != 0:
            return None
        if name.isdecimal():
            found = nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(name)), ctypes.byref(handle)) == 0
        else:
            found = nvml.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle)) == 0
        known = found and nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0
        nvml.nvmlShutdown()
    except (OSError, AttributeError):
        return None
    return int(memory.free) if known else None


def available_on(device: str, *, quick: bool) -> int | None:
    """Free memory in bytes of the GPU that --device selects; None for the CPU.

    With `quick`, avoids importing torch where possible. Raises RequestError.
    """
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise RequestError(f"--device {device}: no such device; use auto, cpu, cuda or cuda:N")
    if kind == "cpu":
        return None
    if quick and (kind == "auto" or available_on_gpu(int(index or 0)) is not None):
        return available_on_gpu(int(index or 0)) if _torch_may_use_gpus() else None
    import torch

    if torch.cuda.is_available() and int(index or 0) < torch.cuda.device_count():
        return torch.cuda.mem_get_info(int(index or 0))[0]
    if kind == "cuda":
        raise RequestError(f"--device {device}: cannot be used here (torch finds no such GPU)")
    return None


def available_on_each(device: str, *, quick: bool) -> list[int]:
    """Free memory in bytes of each GPU that layers may be on: all visible ones for "auto"; none on a CPU.

    As `available_on`. Raises RequestError.
    """
    first = available_on(device, quick=quick)
    if first is None:
        return []
    found, number = [first], 1
    while device == "auto" and (free := _free_on_another(number, quick=quick)) is not None:
        found.append(free)
        number += 1
    return found


def _free_on_another(number: int, *, quick: bool) -> int | None:
    """None if there is no such GPU."""
    if quick:
        return available_on_gpu(number)
    import torch

    return torch.cuda.mem_get_info(number)[0] if number < torch.cuda.device_count() else None


def _torch_may_use_gpus() -> bool:
    """Whether torch may be built for GPUs; its version says so if it is not."""
    try:
        return not version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False
