"""A checkpoint's image preprocessing parameters, read from its own files. Imports neither torch nor Pillow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from l4ctx.errors import UnusableCheckpointError
from model.bounds import shown
from model.checkpoint_files import checkpoint_files
from model.config import FieldReader
from model.errors import ConfigError

_RESAMPLE_NAMES = {0: "NEAREST", 1: "LANCZOS", 2: "BILINEAR", 3: "BICUBIC"}  # Pillow's numbers
_LEAST, _MOST = 1e-6, 1e6  # factors and divisors outside would overflow or underflow somewhere in the model


class ImageProcessingError(UnusableCheckpointError):
    """Unsupported image preprocessing; the message names the file, the field, and what is accepted."""


@dataclass(frozen=True)
class ImageProcessing:
    """Image preprocessing parameters; the fields are named as in `preprocessor_config.json`.

    `size`: side of a tile in pixels. `max_patches`: most tiles in a canvas. `resample`: Pillow's filter number.
    `image_mean` and `image_std`: for red, green and blue, after rescaling.
    """

    size: int = 336
    max_patches: int = 16
    resize_to_max_canvas: bool = False
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    do_rescale: bool = True
    do_normalize: bool = True
    resample: int = 2

    @classmethod
    def from_folder(cls, path: Path, image_size: int) -> ImageProcessing:
        """Reads a checkpoint's parameters; Llama 4's values are the defaults.

        They come from "image_processor" in `processor_config.json`, as transformers 5 writes it, else from
        `preprocessor_config.json`. `image_size` is the vision tower's input size in pixels. Raises
        ImageProcessingError.
        """
        try:
            files = checkpoint_files(path)
            file = files.place("processor_config.json")
            content = files.object(file.name, ConfigError).get("image_processor")
            if content is None:
                file = files.place("preprocessor_config.json")
                content = files.object(file.name, ConfigError)
            if not isinstance(content, Mapping):
                raise ConfigError(f"{file}: image_processor: not an object")
            try:
                return cls._from_fields(FieldReader(content), image_size)
            except ConfigError as error:
                raise ConfigError(f"{file}: {error}") from None
        except ConfigError as error:
            raise ImageProcessingError(str(error)) from None

    @classmethod
    def _from_fields(cls, get: FieldReader, image_size: int) -> ImageProcessing:
        default = cls()
        if not get.boolean("do_resize", True):
            raise ConfigError("do_resize: False is not supported; must be true (images are always resized to tiles)")
        do_rescale, do_normalize = get.boolean("do_rescale", True), get.boolean("do_normalize", True)
        if do_normalize and not do_rescale:
            raise ConfigError("do_rescale: False is not supported where do_normalize is true; must be true")
        return cls(
            size=_size(get, image_size),
            max_patches=get.integer("max_patches", default.max_patches),
            resize_to_max_canvas=get.boolean("resize_to_max_canvas", default.resize_to_max_canvas),
            image_mean=_three(get, "image_mean", default.image_mean, -_MOST),
            image_std=_three(get, "image_std", default.image_std, _LEAST),
            rescale_factor=_number("rescale_factor", get.value("rescale_factor", default.rescale_factor), _LEAST),
            do_rescale=do_rescale,
            do_normalize=do_normalize,
            resample=_resample(get, default.resample),
        )


def _size(get: FieldReader, image_size: int) -> int:
    """One number, or height and width; they must equal the vision tower's input size."""
    value = get.value("size", image_size)
    sides = [value.get("height"), value.get("width")] if isinstance(value, Mapping) else [value, value]
    if any(type(side) is not int or side != image_size for side in sides):
        raise ConfigError(f"size: {shown(value)} is not {image_size} x {image_size}, the vision tower's image_size")
    return image_size


def _three(
    get: FieldReader, name: str, default: tuple[float, float, float], least: float
) -> tuple[float, float, float]:
    """Values for red, green and blue; a single number applies to all three."""
    value = get.value(name, default)
    values = value if isinstance(value, list | tuple) else [value] * 3
    if len(values) != 3:
        raise ConfigError(f"{name}: {shown(value)} is not a list of three numbers")
    red, green, blue = (_number(name, number, least) for number in values)
    return red, green, blue


def _number(name: str, value: object, least: float) -> float:
    """A number from `least` to _MOST."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= _MOST:
        raise ConfigError(f"{name}: {shown(value)} is not a number from {least:g} to {_MOST:g}")
    return float(value)


def _resample(get: FieldReader, default: int) -> int:
    value: object = get.value("resample", default)
    if type(value) is not int or value not in _RESAMPLE_NAMES:
        known = ", ".join(f"{number} ({name.lower()})" for number, name in _RESAMPLE_NAMES.items())
        raise ConfigError(f"resample: {shown(value)} is not supported; must be one of {known}")
    return value
