"""Errors that a user can cause, and the exit code of each. Imports no torch."""

from __future__ import annotations

OUTPUT, INPUT, CHECKPOINT, TOO_LONG, MEMORY, MODEL, CONTEXT, INTERRUPTED, CLOSED = 1, 2, 3, 4, 5, 6, 7, 130, 141
CODE_OF_ERROR = {  # those that a user can cause; by name, so that no module is imported for it
    "l4ctx.errors.OutputError": OUTPUT,
    "l4ctx.errors.UsageError": INPUT,
    "l4ctx.documents.images.ImageError": INPUT,
    "l4ctx.documents.images.ImageMemoryError": MEMORY,
    "l4ctx.documents.reader.DocumentMemoryError": MEMORY,
    "l4ctx.documents.reader.DocumentError": INPUT,
    "l4ctx.errors.RequestError": INPUT,
    "model.config.ConfigError": CHECKPOINT,
    "model.weights.shards.CheckpointError": CHECKPOINT,
    "l4ctx.checkpoint.image_processor.ImageProcessingError": CHECKPOINT,
    "l4ctx.checkpoint.tokenizer.TokenizerError": CHECKPOINT,
    "l4ctx.checkpoint.chat_template.PromptError": CHECKPOINT,
    "l4ctx.prompt.builder.PromptLengthError": TOO_LONG,
    "model.rope.LengthError": TOO_LONG,
    "l4ctx.errors.ContextError": CONTEXT,
    "cache.disk.DiskError": CONTEXT,
    "cache.disk.UnreadableError": CONTEXT,
    "cache.disk.DiskFullError": MEMORY,
    "l4ctx.planning.memory_plan.MemoryPlanError": MEMORY,
    "builtins.MemoryError": MEMORY,
    "torch.OutOfMemoryError": MEMORY,
    "l4ctx.checkpoint.generation_config.GenerationConfigError": CHECKPOINT,
    "l4ctx.engine.generate.GenerationError": MODEL,
    "l4ctx.bench.process.WorkerError": MODEL,
}


class UsageError(Exception):
    """Arguments that do not go together."""


class OutputError(Exception):
    """An answer that cannot be written, as on a full disk."""


def name_of_known(error: Exception) -> str | None:
    """The key of CODE_OF_ERROR that an error has; None for what is not a user's doing."""
    name = f"{type(error).__module__}.{type(error).__qualname__}"
    return name if name in CODE_OF_ERROR else None


def one_line(error: Exception) -> str:
    """What an error says."""
    return " ".join(str(error).splitlines()) or "out of memory"


class ContextError(Exception):
    """A saved context that cannot be used, or must not be touched; the message names it, the reason and the mend."""


class RequestError(Exception):
    """A request that cannot be carried out: a device that this machine lacks, standard input without text."""
