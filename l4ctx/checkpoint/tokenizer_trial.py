"""Whether a tokenizer.json may be loaded: it is tried in a confined process first."""

from __future__ import annotations

from l4ctx.confinement.process import SLOW, ChildFailedError, Confined, Limits, NoChildError, RefusedError
from l4ctx.formatting import human_bytes

CHILD = Confined("l4ctx.checkpoint.tokenizer_work")

_SECONDS, _SECONDS_A_MEBIBYTE = 3.0, 0.25  # Llama 4's, of 27 MiB, takes 2 in all
_MEMORY, _MEMORY_A_BYTE = 512 << 20, 32  # of address space; Llama 4's takes 0.4 GB


def trial_limits(count: int) -> Limits:
    """What a tokenizer.json of so many bytes may take."""
    processor_seconds = _SECONDS + _SECONDS_A_MEBIBYTE * (count >> 20)
    return Limits(
        memory=_MEMORY + _MEMORY_A_BYTE * count,
        seconds=6 * processor_seconds,
        processor_seconds=processor_seconds,
        reply=0,
    )


def why_unfit(content: bytes) -> str | None:
    """Why a tokenizer.json must not be loaded, to follow its name; None where it may be."""
    limits = trial_limits(len(content))
    try:
        with CHILD.request({}, limits, content) as receive:
            receive()
    except RefusedError as error:
        return str(error)
    except ChildFailedError as error:
        if error.why == SLOW:
            return f"takes more than {limits.processor_seconds:g} s to be loaded and tried"
        return f"needs more than {human_bytes(limits.memory)} of memory to be loaded and tried"
    except NoChildError as error:
        return f"the process that tries it {error}"
    return None
