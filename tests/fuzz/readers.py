"""All readers, by name."""

from __future__ import annotations

from fuzz import checkpoint_readers, context_readers, document_readers, edge_readers, gguf_readers
from fuzz.inputs import Reader

MODULES = (checkpoint_readers, gguf_readers, context_readers, document_readers, edge_readers)
READERS: dict[str, Reader] = {reader.name: reader for module in MODULES for reader in module.READERS}
