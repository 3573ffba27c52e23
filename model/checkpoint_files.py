"""A checkpoint's small files by name: those in its folder, or what a GGUF file has in their stead. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from model.folder import CONFIG, MAX_FILE_BYTES, is_listed, read_json, read_object, read_regular
from model.gguf.config import config_of
from model.gguf.files import GgufModel, find_gguf, read_gguf
from model.gguf.tokenizer import generation_config_of, tokenizer_config_of, tokenizer_of
from model.gguf.vision import with_vision

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
GENERATION_CONFIG, CHAT_TEMPLATE = "generation_config.json", "chat_template.jinja"


class CheckpointFiles:
    """The files of a checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def place(self, name: str) -> Path:
        """Where its content comes from, for messages."""
        return self.folder / name

    def has(self, name: str) -> bool:
        return self.place(name).is_file()

    def json(self, name: str) -> Any:
        """The content of a JSON file. Raises FileNotFoundError, and other errors in model.folder.UNREADABLE."""
        return read_json(self.place(name))

    def content(self, name: str) -> bytes:
        """Raises OSError."""
        return read_regular(self.place(name), MAX_FILE_BYTES)

    def object(self, name: str, error: Callable[[str], Exception]) -> dict[str, Any]:
        """The object in a JSON file; empty if there is no such file. Raises `error` with a one-line message."""
        return read_object(self.place(name), error)


class GgufFiles(CheckpointFiles):
    """What a GGUF file holds of a checkpoint's files. Those beside it come first, but for config.json.

    Of tokenizer_config.json and generation_config.json beside it, it supplies the fields that they lack.
    """

    def __init__(self, model: GgufModel) -> None:
        super().__init__(model.path.parent)
        self.model = model

    def place(self, name: str) -> Path:
        is_held = name in _FIELDS or name == TOKENIZER
        return self.model.path if is_held and not self._is_beside(name) else super().place(name)

    def json(self, name: str) -> Any:
        """Raises CheckpointError and ConfigError, too."""
        if name not in _FIELDS:
            return super().json(name)
        beside = super().json(name) if self._is_beside(name) else {}
        return {**_FIELDS[name](self.model), **beside} if isinstance(beside, dict) else beside

    def object(self, name: str, error: Callable[[str], Exception]) -> dict[str, Any]:
        """Raises CheckpointError and ConfigError, too."""
        if name not in _FIELDS:
            return super().object(name, error)
        beside = super().object(name, error) if self._is_beside(name) else {}
        return {**_FIELDS[name](self.model), **beside}

    def content(self, name: str) -> bytes:
        """Raises CheckpointError, too."""
        if name != TOKENIZER or self._is_beside(name):
            return super().content(name)
        return tokenizer_of(self.model).encode()

    def _is_beside(self, name: str) -> bool:
        return name != CONFIG and is_listed(self.folder / name)


_FIELDS: Mapping[str, Callable[[GgufModel], Mapping[str, Any]]] = {
    CONFIG: lambda model: with_vision(dict(config_of(model).fields), model),
    TOKENIZER_CONFIG: tokenizer_config_of,
    GENERATION_CONFIG: generation_config_of,
}


def checkpoint_files(path: Path) -> CheckpointFiles:
    """Of a checkpoint folder, a GGUF file, or a folder that holds one GGUF model. Raises CheckpointError."""
    file = find_gguf(path)
    return CheckpointFiles(path) if file is None else GgufFiles(read_gguf(file))
